//! S12: what a weak hash can do, which only a test can make.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bytes::BytesMut;

use super::hash::WEAK_KEY;
use super::*;
use crate::wire::{LaneFramer, LaneItem};

/// A guest, and a target that has one crafted page under every number.
#[derive(Debug, Default, Clone, PartialEq)]
struct Guest(BTreeMap<PageAddress, [u8; PAGE_SIZE]>);

impl Contents for Guest {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        *into = self.0.get(&at).copied().unwrap_or([0; PAGE_SIZE]);
        Ok(())
    }
}

impl Sink for Guest {
    fn zero(&mut self, first: PageAddress, count: u32) -> io::Result<()> {
        for page in first.page..first.page + count {
            self.0.remove(&PageAddress { page, ..first });
        }
        Ok(())
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        self.0.insert(at, *content);
        Ok(())
    }

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        Contents::read(self, at, into)
    }

    fn known(&mut self, _: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        *into = noise(0);
        Ok(())
    }
}

fn noise(seed: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_be_bytes());
    hasher.finalize_xof().fill(&mut page);
    page
}

/// Moves a guest of `pages` pages; returns what arrived and how many pages were missed.
fn moved(source: &Guest, pages: u32, known: &KnownTable) -> (Guest, u64) {
    let block = BlockSpec {
        name: "ram".into(),
        pages,
    };
    let layout = Arc::new(Layout::new(vec![block]).unwrap());
    let part = || Ledger::split(&layout, &WEAK_KEY)[0].clone();
    let mut encoder = LaneEncoder::new(part(), &WEAK_KEY, FIRST_SEQ, Disable::default()).unwrap();
    let mut decoder = LaneDecoder::new(part(), &WEAK_KEY, 1).unwrap();
    let copies = CopyIndex::new(&layout, 1 << 20);
    let sources = Sources {
        copies: Some(&copies),
        known: Some(known),
        ..Sources::of(source)
    };
    let dirty = DirtySet::new(Arc::clone(&layout));
    layout.pages().for_each(|at| assert!(!dirty.mark_data(at)));
    let (mut target, mut missed) = (Guest::default(), 0);
    let mut cursor = LaneCursor::new(0);
    let mut framer = LaneFramer::new();
    let mut out = BytesMut::new();
    encoder.header(1).put(&mut out);
    for _ in 0..1000 {
        let taken = dirty.take(&mut cursor, 5);
        encoder.encode(&taken, &sources, &mut out).unwrap();
        framer.push(&out.split());
        while let Some(item) = framer.next_item().unwrap() {
            match item {
                LaneItem::Header(header) => decoder.open(&header).unwrap(),
                LaneItem::Batch(body) => {
                    for run in decoder.apply(&body, &mut target).unwrap().missing {
                        for page in run.first.page..run.first.page + u32::from(run.count) {
                            let at = PageAddress { page, ..run.first };
                            encoder.ledger_mut().forget(at);
                            copies.forget(at);
                            dirty.mark_data(at);
                            missed += 1;
                        }
                    }
                    copies.acknowledge(0, encoder.last_seq());
                }
                LaneItem::Mark { .. } => {}
            }
        }
        if dirty.dirty_pages() == 0 {
            let pages = |ledger: &LedgerPart| ledger.iter().collect::<Vec<_>>();
            assert_eq!(pages(encoder.ledger()), pages(decoder.ledger()));
            return (target, missed);
        }
    }
    panic!("pages are missed for ever");
}

/// S12: every index finds every page for every other one, and the target's shared image holds a page
/// that one guest crafted. Both guests arrive as they were: the digest of each batch goes by whole
/// hashes, so that a wrong find costs a second sending and no more.
#[test]
fn s12_weak_hash_applies_nothing_wrong() {
    let at = |page| PageAddress {
        block: BlockId(0),
        page,
    };
    let guest = |first: u32| {
        Guest(
            (0..100)
                .map(|page| (at(page), noise(first + page)))
                .collect(),
        )
    };
    for (guest, known_number) in [
        (guest(0), Some(7)),
        (guest(5000), Some(7)),
        (guest(9000), None),
    ] {
        let known = KnownTable::new(10);
        if let Some(number) = known_number {
            assert!(known.insert([0x11; 8], number));
        }
        let (target, missed) = moved(&guest, 100, &known);
        assert!(target == guest, "memory differs");
        assert!(missed > 10, "{missed} pages were missed");
    }
}
