//! Batches that no honest source sends: each is refused by its own error and leaves no trace.

use bytes::BytesMut;
use proptest::prelude::*;
use transport::block::*;
use transport::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};

use crate::memory::*;

/// A batch made by hand: records as (encoding, block, first page, count), then payload.
struct Forged {
    seq: u32,
    records: Vec<(u8, u16, u32, u16)>,
    references: Vec<u8>,
    delta: Vec<u8>,
    literal: Vec<u8>,
    raw: Vec<u8>,
    digest: Option<[u8; 16]>,
    record_count: Option<u16>,
}

impl Forged {
    fn new(records: Vec<(u8, u16, u32, u16)>) -> Self {
        Self {
            seq: FIRST_SEQ,
            records,
            references: Vec::new(),
            delta: Vec::new(),
            literal: Vec::new(),
            raw: Vec::new(),
            digest: None,
            record_count: None,
        }
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let count = self.record_count.unwrap_or(self.records.len() as u16);
        body.extend(self.seq.to_be_bytes());
        body.extend(count.to_be_bytes());
        body.extend((self.literal.len() as u32).to_be_bytes());
        body.extend((self.delta.len() as u32).to_be_bytes());
        body.extend(self.digest.unwrap_or_default());
        for (encoding, block, page, count) in &self.records {
            body.push(*encoding);
            body.extend(block.to_be_bytes());
            body.extend(page.to_be_bytes());
            body.extend(count.to_be_bytes());
        }
        body.extend(&self.references);
        body.extend(&self.delta);
        body.extend(&self.literal);
        body.extend(&self.raw);
        body
    }

    fn refused(&self) -> DecodeError {
        let mut decoder = decoder(0);
        let error = decoder.apply(&self.body(), &mut Untouched).unwrap_err();
        assert_eq!(decoder.ledger().announced_pages(), 0);
        error
    }
}

const ZERO: u8 = 2;
const COPY: u8 = 3;
const KNOWN: u8 = 4;
const DELTA: u8 = 5;
const LITERAL: u8 = 6;
const RAW: u8 = 7;

/// Records that do not describe pages of this lane in ascending order.
#[test]
fn wrong_records_are_refused() {
    let check = |records: Vec<(u8, u16, u32, u16)>, expected: &str| {
        let error = format!("{:?}", Forged::new(records).refused());
        assert!(error.starts_with(expected), "{error} is not {expected}");
    };
    check(vec![], "PeerRecordCount(0)");
    check(
        vec![(ZERO, 0, 0, 1); BATCH_MAX_RECORDS + 1],
        "PeerRecordCount(1025)",
    );
    check(vec![(0, 0, 0, 1)], "PeerEncoding(0)");
    check(vec![(1, 0, 0, 1)], "PeerEncoding(1)");
    check(vec![(8, 0, 0, 1)], "PeerEncoding(8)");
    check(vec![(ZERO, 0, 0, 0)], "PeerOutside");
    check(vec![(ZERO, 2, 0, 1)], "PeerOutside");
    check(vec![(ZERO, 0, 512 * 19 + 5, 1)], "PeerOutside");
    check(vec![(ZERO, 0, u32::MAX, 2)], "PeerOutside");
    check(vec![(ZERO, 0, 511, 2)], "PeerOutside");
    check(vec![(ZERO, 0, 0, u16::MAX)], "PeerOutside");
    check(
        vec![(ZERO, 0, 512, 1)],
        "PeerForeignLane { at: PageAddress { block: BlockId(0), page: 512 }, owner: 1, lane: 0 }",
    );
    check(vec![(ZERO, 0, 4, 2), (ZERO, 0, 5, 1)], "PeerOrder");
    check(vec![(ZERO, 0, 4, 1), (ZERO, 0, 3, 1)], "PeerOrder");
    check(vec![(RAW, 0, 0, 65)], "PeerTooManyPages(65)");
    check(
        vec![(RAW, 0, 0, 33), (LITERAL, 0, 33, 32)],
        "PeerTooManyPages(65)",
    );
}

/// Bodies that end early, or whose payload is not what the records announce.
#[test]
fn wrong_lengths_are_refused() {
    let whole = Forged {
        raw: vec![1; 4096],
        ..Forged::new(vec![(RAW, 0, 0, 1)])
    };
    for bytes in 0..30 + 9 {
        let error = decoder(0)
            .apply(&whole.body()[..bytes], &mut Untouched)
            .unwrap_err();
        assert!(
            matches!(error, DecodeError::PeerTruncated(found) if found == bytes),
            "{error}"
        );
    }
    for raw in [0, 4095, 4097, 8192] {
        let error = Forged {
            raw: vec![1; raw],
            ..Forged::new(vec![(RAW, 0, 0, 1)])
        }
        .refused();
        assert!(
            matches!(error, DecodeError::PeerPayload { expected: 4096, found } if found == raw)
        );
    }
    let error = Forged {
        record_count: Some(3),
        ..Forged::new(vec![(ZERO, 0, 0, 1)])
    }
    .refused();
    assert!(matches!(error, DecodeError::PeerTruncated(39)));
    let error = Forged {
        literal: vec![1],
        ..Forged::new(vec![(ZERO, 0, 0, 1)])
    }
    .refused();
    assert!(matches!(error, DecodeError::PeerLiteral(0)));
    let mut body = whole.body();
    body[6..10].copy_from_slice(&u32::MAX.to_be_bytes());
    let error = decoder(0).apply(&body, &mut Untouched).unwrap_err();
    assert!(matches!(error, DecodeError::PeerPayload { .. }));
}

/// References to what does not exist, are cut short, or come where none belong.
#[test]
fn wrong_references_are_refused() {
    let check = |records: Vec<(u8, u16, u32, u16)>, references: Vec<u8>, expected: &str| {
        let forged = Forged {
            references,
            ..Forged::new(records)
        };
        let error = format!("{:?}", forged.refused());
        assert!(error.starts_with(expected), "{error} is not {expected}");
    };
    let copy_of = |block: u16, page: u32| {
        let (block, page) = (block.to_be_bytes(), page.to_be_bytes());
        [&block[..], &page[..]].concat()
    };
    check(vec![(COPY, 0, 0, 1)], vec![0; 5], "PeerTruncated");
    check(vec![(KNOWN, 0, 0, 1)], vec![0; 3], "PeerTruncated");
    check(vec![(COPY, 0, 0, 1)], copy_of(2, 0), "PeerCopyOutside");
    check(vec![(COPY, 0, 0, 2)], copy_of(1, 39), "PeerCopyOutside");
    check(
        vec![(COPY, 0, 0, 2)],
        copy_of(0, u32::MAX),
        "PeerCopyOutside",
    );
    check(vec![(KNOWN, 0, 0, 2)], vec![0xff; 4], "PeerKnownOutside");
    check(
        vec![(COPY, 0, 0, 65)],
        copy_of(0, 512),
        "PeerTooManyPages(65)",
    );
    check(
        vec![(KNOWN, 0, 0, 64), (COPY, 0, 64, 1)],
        vec![0; 10],
        "PeerTooManyPages(65)",
    );
    check(vec![(ZERO, 0, 0, 1)], vec![0; 6], "PeerPayload");
    let delta = |delta: Vec<u8>, records| {
        let forged = Forged {
            delta,
            ..Forged::new(records)
        };
        let error = decoder(0).apply(&forged.body(), &mut Memory::default());
        format!("{:?}", error.unwrap_err())
    };
    assert_eq!(delta(vec![1], vec![(ZERO, 0, 0, 1)]), "PeerDelta(0)");
    for frame in [
        vec![],
        b"no frame".to_vec(),
        zstd::bulk::compress(&[1; 4096], 3).unwrap(),
    ] {
        assert_eq!(delta(frame, vec![(DELTA, 0, 0, 2)]), "PeerDelta(2)");
    }
}

/// Batches of references alone, whose digest is wrong, are missed and leave no trace.
#[test]
fn forged_references_leave_no_trace() {
    for (records, references) in [
        (vec![(COPY, 0, 0, 3)], vec![0, 0, 0, 0, 2, 0]),
        (vec![(COPY, 0, 7, 3)], vec![0, 0, 0, 0, 0, 7]),
        (vec![(KNOWN, 0, 0, 3)], vec![0, 0, 0, 1]),
        (
            vec![(ZERO, 0, 0, 3), (COPY, 0, 5, 3)],
            vec![0, 0, 0, 0, 0, 1],
        ),
    ] {
        let mut decoder = decoder(0);
        let pages = records.len();
        let count: u16 = records.iter().map(|record| record.3).sum();
        let forged = Forged {
            references,
            ..Forged::new(records)
        };
        let mut target = Memory::default();
        let applied = decoder.apply(&forged.body(), &mut target).unwrap();
        assert_eq!(applied.missing.len(), pages);
        assert_eq!(
            applied.missing.iter().map(|run| run.count).sum::<u16>(),
            count
        );
        assert!(target == Memory::default());
        assert_eq!(decoder.ledger().announced_pages(), 0);
    }
}

/// A frame that unpacks to less or more than the records announce, a bomb among them: no byte
/// beyond the announced pages is ever written.
#[test]
fn decompression_is_bounded() {
    let check = |literal: Vec<u8>| {
        let error = Forged {
            literal,
            ..Forged::new(vec![(LITERAL, 0, 0, 2)])
        }
        .refused();
        assert!(matches!(error, DecodeError::PeerLiteral(2)), "{error}");
    };
    check(vec![]);
    check(b"no zstd frame".to_vec());
    check(zstd::bulk::compress(&[1; 4096], 3).unwrap());
    check(zstd::bulk::compress(&[1; 4096 * 3], 3).unwrap());
    let bomb = zstd::bulk::compress(&vec![0; 256 << 20], 3).unwrap();
    assert!(bomb.len() < 32 << 10, "the bomb is {} bytes", bomb.len());
    check(bomb);
}

/// One changed bit anywhere in an honest batch never leads to other memory. (Some bits of a zstd
/// frame mean nothing to its content.)
#[test]
fn any_changed_bit_is_found() {
    let mut source = Memory::default();
    source.write(ram(0), text_page(0));
    source.write(ram(1), random_page(1));
    let mut out = BytesMut::new();
    encoder(0, Disable::default())
        .encode(&data(0..4), &Sources::of(&source), &mut out)
        .unwrap();
    let body = bodies(&out).remove(0);
    // Every bit of head, records and frame; the raw page by its ends.
    let frame_end = body.len() - 4096;
    for place in (0..frame_end).chain([frame_end, body.len() - 1]) {
        let mut changed = body.clone();
        changed[place] ^= 1 << (place % 8);
        let mut target = Memory::default();
        match decoder(0).apply(&changed, &mut target) {
            Ok(_) => assert!(target == source, "byte {place}"),
            Err(_) => assert!(target == Memory::default(), "byte {place}"),
        }
    }
    let mut changed = body.clone();
    changed[frame_end] ^= 1;
    let error = decoder(0).apply(&changed, &mut Untouched).unwrap_err();
    assert!(matches!(error, DecodeError::PeerDigest { seq: FIRST_SEQ }));
}

/// The last number of a lane is the last: it is not followed by 0.
#[test]
fn numbers_do_not_wrap() {
    let source = Memory::default();
    let mut encoder = LaneEncoder::new(part(0), &KEY, u32::MAX - 1, Disable::default()).unwrap();
    let mut decoder = LaneDecoder::new(part(0), &KEY, INCARNATION).unwrap();
    decoder.open(&encoder.header(INCARNATION)).unwrap();
    let mut out = BytesMut::new();
    encoder
        .encode(&data([1]), &Sources::of(&source), &mut out)
        .unwrap();
    let body = bodies(&out).remove(0);
    decoder.apply(&body, &mut Memory::default()).unwrap();
    let error = encoder
        .encode(&data([2]), &Sources::of(&source), &mut out)
        .unwrap_err();
    assert_eq!(error.to_string(), "lane has no numbers left");
}

/// The largest batch there can be is accepted: 64 raw pages, all other records zero pages.
#[test]
fn largest_batch_fits() {
    let mut source = Memory::default();
    let mut taken = Vec::new();
    for place in 0..BATCH_MAX_RECORDS as u32 {
        // Every second page, so that no two are one run.
        let (range, page) = (place / 256, place % 256 * 2);
        let at = ram(range / 2 * 512 * 8 + range % 2 + page);
        if place < BATCH_MAX_PAGES as u32 * 8 && place.is_multiple_of(8) {
            source.write(at, random_page(place));
        }
        taken.push(Taken { at, zero: false });
    }
    taken.sort_by_key(|page| page.at);
    let mut out = BytesMut::new();
    let stats = encoder(0, Disable::default())
        .encode(&taken, &Sources::of(&source), &mut out)
        .unwrap();
    assert_eq!(stats.pages(), BATCH_MAX_RECORDS as u64);
    let mut target = Memory::default();
    let mut decoder = decoder(0);
    for body in bodies(&out) {
        decoder.apply(&body, &mut target).unwrap();
    }
    assert_eq!(target, source);
}

proptest! {
    /// Any bytes: an error, never a panic, nothing written.
    #[test]
    fn any_bytes_are_refused(body in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decoder(0).apply(&body, &mut Untouched).is_err());
    }

    /// Bytes that pass the first checks: an error, never a panic, nothing written.
    #[test]
    fn any_records_are_refused(
        records in prop::collection::vec(
            (prop_oneof![Just(ZERO), Just(LITERAL), Just(RAW), 8_u8..], 0_u16..3, 0_u32..11_000, 0_u16..600),
            0..5
        ),
        literal in prop::collection::vec(any::<u8>(), 0..50),
        raw_pages in 0_usize..3,
    ) {
        let raw = vec![9; raw_pages * 4096];
        Forged { literal, raw, ..Forged::new(records) }.refused();
    }

    /// The same with references: an error or a miss, never a panic, nothing written.
    #[test]
    fn any_references_leave_no_trace(
        records in prop::collection::vec((any::<u8>(), 0_u16..3, 0_u32..11_000, 0_u16..70), 0..5),
        few in prop::collection::vec((2_u8..8, 0_u16..1, 0_u32..500, 1_u16..20), 0..5),
        references in prop::collection::vec(any::<u8>(), 0..30),
        delta in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let mut few = few;
        few.sort_by_key(|record| record.2);
        for records in [records, few] {
            let forged = Forged { references: references.clone(), delta: delta.clone(), ..Forged::new(records) };
            let mut decoder = decoder(0);
            let mut target = Memory::default();
            if let Ok(applied) = decoder.apply(&forged.body(), &mut target) {
                prop_assert!(!applied.missing.is_empty());
            }
            prop_assert!(target == Memory::default());
            prop_assert_eq!(decoder.ledger().announced_pages(), 0);
        }
    }
}
