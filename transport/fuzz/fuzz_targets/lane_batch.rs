//! Any bytes on a lane: never a panic, only whole batches reach memory, only of this lane, and the
//! ledger says what was written.
//!
//! The digest would stop nearly every changed batch, so each batch is first given the digest that
//! the spec asks for, computed here a second time.
#![no_main]

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use transport::block::*;
use transport::wire::{LaneFramer, LaneHeader, LaneItem};

const KEY: [u8; 32] = [1; 32];

/// Checks what reaches memory.
struct Checked {
    layout: Arc<Layout>,
    lane: usize,
    pages: u64,
}

impl Sink for Checked {
    fn zero(&mut self, first: PageAddress, count: u32) -> io::Result<()> {
        for page in first.page..first.page + count {
            let at = PageAddress {
                block: first.block,
                page,
            };
            assert!(self.layout.contains(at) && self.layout.lane_of(at) == self.lane);
        }
        self.pages += u64::from(count);
        Ok(())
    }

    fn page(&mut self, at: PageAddress, _: &[u8; PAGE_SIZE]) -> io::Result<()> {
        assert!(self.layout.contains(at) && self.layout.lane_of(at) == self.lane);
        self.pages += 1;
        Ok(())
    }
}

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (lane, piece, stream) = input;
    let lane = usize::from(lane) % LANES;
    let blocks = vec![
        BlockSpec {
            name: "ram".into(),
            pages: 5000,
        },
        BlockSpec {
            name: "rom".into(),
            pages: 40,
        },
    ];
    let layout = Arc::new(Layout::new(blocks).expect("a good layout"));
    let part = Ledger::split(&layout, &KEY)[lane].clone();
    let mut decoder = LaneDecoder::new(part, &KEY, 7).expect("memory for zstd");
    decoder
        .open(&LaneHeader {
            lane,
            incarnation: 7,
            first_seq: 1,
        })
        .expect("its own header");
    let mut sink = Checked {
        layout,
        lane,
        pages: 0,
    };

    let mut bytes = BytesMut::new();
    LaneHeader {
        lane,
        incarnation: 7,
        first_seq: 1,
    }
    .put(&mut bytes);
    bytes.extend_from_slice(stream);
    let mut framer = LaneFramer::new();
    for bytes in bytes.chunks(usize::from(piece).max(1)) {
        framer.push(bytes);
        loop {
            match framer.next_item() {
                Ok(Some(LaneItem::Batch(body))) => {
                    let body = seal(lane, &body);
                    match decoder.apply(&body, &mut sink) {
                        Ok(applied) => assert!(applied.stats.batches == 1),
                        Err(_) => return,
                    }
                    assert!(decoder.ledger().announced_pages() <= sink.pages);
                }
                Ok(Some(LaneItem::Header(_) | LaneItem::Mark { .. })) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});

/// Gives a body the digest that it should have, as far as it can be read.
fn seal(lane: usize, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    if let Some(digest) = digest(lane, &body) {
        body[10..26].copy_from_slice(&digest);
    }
    body
}

//= docs/protocol.md#batch
fn digest(lane: usize, body: &[u8]) -> Option<[u8; 16]> {
    let seq = body.get(..4)?;
    let count = usize::from(u16::from_be_bytes(*body.get(4..)?.first_chunk()?));
    let literal_bytes = u32::from_be_bytes(*body.get(6..)?.first_chunk()?) as usize;
    let records = body.get(26..26 + count * 9)?;
    let payload = &body[26 + count * 9..];
    let (frame, raw) = payload.split_at_checked(literal_bytes)?;
    let mut literal = Vec::new();
    if !frame.is_empty() {
        literal = vec![0; 64 * PAGE_SIZE];
        let bytes = zstd::bulk::decompress_to_buffer(frame, &mut literal[..]).ok()?;
        literal.truncate(bytes);
    }
    let page_hash = |page: &[u8]| *blake3::keyed_hash(&KEY, page).as_bytes();
    let zero = page_hash(&[0; PAGE_SIZE]);
    let (mut literal, mut raw) = (literal.chunks_exact(PAGE_SIZE), raw.chunks_exact(PAGE_SIZE));
    let mut hasher =
        blake3::Hasher::new_keyed(&blake3::derive_key("scaleaway/1 batch digest", &KEY));
    hasher.update(&[lane as u8]).update(seq).update(records);
    for record in records.chunks_exact(9) {
        let count = u16::from_be_bytes([record[7], record[8]]);
        if count > 512 {
            return None;
        }
        for _ in 0..count {
            let hash = match record[0] {
                2 => zero,
                6 => page_hash(literal.next()?),
                7 => page_hash(raw.next()?),
                _ => return None,
            };
            hasher.update(&hash[..16]);
        }
    }
    hasher.finalize().as_bytes().first_chunk().copied()
}
