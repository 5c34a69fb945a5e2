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

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        assert!(self.layout.contains(at));
        *into = held(at.page);
        Ok(())
    }

    fn known(&mut self, number: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        if number > 1 << 20 {
            return Err(io::ErrorKind::NotFound.into());
        }
        *into = held(number);
        Ok(())
    }
}

/// What this side holds already, the same whatever was written: enough to resolve references.
fn held(number: u32) -> [u8; PAGE_SIZE] {
    [number.to_be_bytes()[3]; PAGE_SIZE]
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
            first_seq: FIRST_SEQ,
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
        first_seq: FIRST_SEQ,
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
                        Ok(applied) => {
                            assert!(applied.stats.batches == 1);
                            let missing = applied.missing.iter().map(|run| u64::from(run.count));
                            let missing: u64 = missing.sum();
                            assert!(missing == 0 || missing == applied.stats.pages());
                        }
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
        body[14..30].copy_from_slice(&digest);
    }
    body
}

//= docs/protocol.md#batch
fn digest(lane: usize, body: &[u8]) -> Option<[u8; 16]> {
    let seq = body.get(..4)?;
    let count = usize::from(u16::from_be_bytes(*body.get(4..)?.first_chunk()?));
    let literal_bytes = u32::from_be_bytes(*body.get(6..)?.first_chunk()?) as usize;
    let delta_bytes = u32::from_be_bytes(*body.get(10..)?.first_chunk()?) as usize;
    let records = body.get(30..30 + count * 9)?;
    let mut rest = &body[30 + count * 9..];
    // Each page with content: where it is and, for a reference, what it refers to.
    let mut pages: Vec<(u8, u16, u32, u32)> = Vec::new();
    for record in records.chunks_exact(9) {
        let block = u16::from_be_bytes([record[1], record[2]]);
        let first = u32::from_be_bytes(*record[3..].first_chunk()?);
        let count = u16::from_be_bytes([record[7], record[8]]);
        if count > 512 {
            return None;
        }
        let base = match record[0] {
            3 => {
                let (block, page) = (rest.get(..2)?, rest.get(2..6)?);
                rest = &rest[6..];
                let block = u32::from(u16::from_be_bytes(*block.first_chunk()?));
                block << 24 | u32::from_be_bytes(*page.first_chunk()?)
            }
            4 => {
                let number = u32::from_be_bytes(*rest.first_chunk()?);
                rest = &rest[4..];
                number
            }
            _ => 0,
        };
        for offset in 0..u32::from(count) {
            let page = first.checked_add(offset)?;
            pages.push((record[0], block, page, base.checked_add(offset)?));
        }
    }
    let (delta, rest) = rest.split_at_checked(delta_bytes)?;
    let (literal, raw) = rest.split_at_checked(literal_bytes)?;
    let bases: Vec<u8> = pages
        .iter()
        .filter(|page| page.0 == 5)
        .flat_map(|page| held(page.2))
        .collect();
    let mut decoder = zstd::bulk::Decompressor::new().ok()?;
    let literal = match literal {
        [] => Vec::new(),
        frame => decoder.decompress(frame, 64 * PAGE_SIZE).ok()?,
    };
    let delta = match delta {
        [] => Vec::new(),
        frame => {
            let mut context = zstd::zstd_safe::DCtx::create();
            context.ref_prefix(&bases).ok()?;
            let mut pages = vec![0; 64 * PAGE_SIZE];
            let bytes = context.decompress(&mut pages[..], frame).ok()?;
            pages.truncate(bytes);
            pages
        }
    };
    let mut literal = literal.chunks_exact(PAGE_SIZE);
    let mut delta = delta.chunks_exact(PAGE_SIZE);
    let mut raw = raw.chunks_exact(PAGE_SIZE);
    let mut contents: Vec<Vec<u8>> = Vec::new();
    let mut hasher =
        blake3::Hasher::new_keyed(&blake3::derive_key("scaleaway/1 batch digest", &KEY));
    hasher.update(&[lane as u8]).update(seq).update(records);
    for (encoding, _, _, base) in &pages {
        let content = match encoding {
            2 => vec![0; PAGE_SIZE],
            3 => {
                let earlier = pages[..contents.len()]
                    .iter()
                    .position(|page| u32::from(page.1) << 24 | page.2 == *base);
                match earlier {
                    Some(earlier) => contents[earlier].clone(),
                    None => held(base & 0xff_ffff).to_vec(),
                }
            }
            4 => held(*base).to_vec(),
            5 => delta.next()?.to_vec(),
            6 => literal.next()?.to_vec(),
            7 => raw.next()?.to_vec(),
            _ => return None,
        };
        hasher.update(&blake3::keyed_hash(&KEY, &content).as_bytes()[..16]);
        contents.push(content);
    }
    hasher.finalize().as_bytes().first_chunk().copied()
}
