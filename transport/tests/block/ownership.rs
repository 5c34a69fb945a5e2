//! S6: one owner per range, versions, incarnations.

use bytes::BytesMut;
use transport::block::*;
use transport::wire::LaneHeader;

use crate::memory::*;

fn batches(encoder: &mut LaneEncoder, memory: &Memory, taken: &[Taken]) -> Vec<Vec<u8>> {
    let mut out = BytesMut::new();
    encoder
        .encode(taken, &Sources::of(memory), &mut out)
        .unwrap();
    bodies(&out)
}

/// S6: a stream that an older connection opened is refused, and so is one of another lane.
#[test]
fn s6_old_incarnation_is_refused() {
    let mut decoder = LaneDecoder::new(part(3), &KEY, 2).unwrap();
    let header = |lane, incarnation| LaneHeader {
        lane,
        incarnation,
        first_seq: FIRST_SEQ,
    };
    let error = decoder.open(&header(3, 1)).unwrap_err();
    assert!(matches!(
        error,
        DecodeError::PeerIncarnation {
            expected: 2,
            found: 1
        }
    ));
    let error = decoder.open(&header(4, 2)).unwrap_err();
    assert!(matches!(
        error,
        DecodeError::PeerLane {
            expected: 3,
            found: 4
        }
    ));
    decoder.open(&header(3, 2)).unwrap();

    // The connection is replaced: what comes late on the old one finds no open stream.
    decoder.expect_incarnation(3);
    let body = batches(
        &mut encoder(3, Disable::default()),
        &Memory::default(),
        &data([512 * 3]),
    );
    let error = decoder.apply(&body[0], &mut Untouched).unwrap_err();
    assert!(matches!(error, DecodeError::PeerNoHeader));
}

/// S6: a page whose later version is applied keeps it when an older batch comes late; the other
/// pages of that batch are applied.
#[test]
fn s6_older_version_is_dropped() {
    let mut source = Memory::default();
    let mut encoder = encoder(0, Disable::default());
    source.write(ram(1), text_page(1));
    source.write(ram(2), random_page(1));
    // Batch 3: pages 1 (text), 2 (random), 3 to 6 (zero).
    let first = batches(&mut encoder, &source, &data(1..7));
    source.write(ram(1), text_page(2));
    source.write(ram(5), text_page(3));
    // Batch 4: pages 1 and 5.
    let second = batches(&mut encoder, &source, &data([1, 5]));

    let mut target = Memory::default();
    let mut decoder = decoder(0);
    let open_at = |decoder: &mut LaneDecoder, first_seq| {
        decoder
            .open(&LaneHeader {
                lane: 0,
                incarnation: INCARNATION,
                first_seq,
            })
            .unwrap();
    };
    open_at(&mut decoder, 4);
    decoder.apply(&second[0], &mut target).unwrap();
    open_at(&mut decoder, 3);
    let applied = decoder.apply(&first[0], &mut target).unwrap();
    assert_eq!(applied.old_pages, 2);
    assert_eq!(target, source);
    assert_eq!(decoder.ledger().get(ram(1)).unwrap().1, 4);
    assert_eq!(decoder.ledger().get(ram(2)).unwrap().1, 3);
    let pages = |ledger: &LedgerPart| ledger.iter().collect::<Vec<_>>();
    assert_eq!(pages(decoder.ledger()), pages(encoder.ledger()));
}

/// S6: batches of a lane are applied in their order, none twice, none left out.
#[test]
fn s6_sequence_has_no_gap() {
    let mut source = Memory::default();
    source.write(ram(1), text_page(1));
    let mut encoder = encoder(0, Disable::default());
    let first = batches(&mut encoder, &source, &data([1]));
    let second = batches(&mut encoder, &source, &data([2]));
    let mut decoder = decoder(0);
    let error = decoder.apply(&second[0], &mut Untouched).unwrap_err();
    assert!(matches!(
        error,
        DecodeError::PeerSequence {
            expected: 3,
            found: 4
        }
    ));
    decoder.apply(&first[0], &mut Memory::default()).unwrap();
    let error = decoder.apply(&first[0], &mut Untouched).unwrap_err();
    assert!(matches!(
        error,
        DecodeError::PeerSequence {
            expected: 4,
            found: 3
        }
    ));
}

/// S6: RAM first, then the ledger: when a write fails the ledger does not claim the page.
#[test]
fn s6_ledger_follows_memory() {
    #[derive(Debug)]
    struct FailsAt(u32);
    impl Sink for FailsAt {
        fn zero(&mut self, _: PageAddress, _: u32) -> std::io::Result<()> {
            Ok(())
        }
        fn page(&mut self, at: PageAddress, _: &[u8; PAGE_SIZE]) -> std::io::Result<()> {
            if at.page == self.0 {
                Err(std::io::Error::other("full"))
            } else {
                Ok(())
            }
        }
    }
    let mut source = Memory::default();
    for page in 0..4 {
        source.write(ram(page), text_page(page));
    }
    let body = batches(&mut encoder(0, Disable::default()), &source, &data(0..4));
    let mut decoder = decoder(0);
    let error = decoder.apply(&body[0], &mut FailsAt(2)).unwrap_err();
    assert!(matches!(error, DecodeError::LocalSink(_)));
    assert!(decoder.ledger().get(ram(1)).is_some());
    assert_eq!(decoder.ledger().get(ram(2)), None);
}
