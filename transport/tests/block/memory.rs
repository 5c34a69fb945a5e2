//! Two small images, a lane between them, and pages to put there.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use transport::block::*;
use transport::wire::{LaneFramer, LaneItem};

pub(crate) const KEY: [u8; 32] = [0x5a; 32];
pub(crate) const INCARNATION: u64 = 0x1122_3344_5566_7788;

/// Guest memory of either side: a page that is not in the map is zero.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Memory(pub(crate) BTreeMap<PageAddress, Box<[u8; PAGE_SIZE]>>);

impl Memory {
    pub(crate) fn write(&mut self, at: PageAddress, content: [u8; PAGE_SIZE]) {
        if content == [0; PAGE_SIZE] {
            self.0.remove(&at);
        } else {
            self.0.insert(at, Box::new(content));
        }
    }
}

impl Contents for Memory {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        match self.0.get(&at) {
            Some(content) => into.copy_from_slice(&content[..]),
            None => into.fill(0),
        }
        Ok(())
    }
}

impl Sink for Memory {
    fn zero(&mut self, first: PageAddress, count: u32) -> io::Result<()> {
        for page in first.page..first.page + count {
            self.0.remove(&PageAddress {
                block: first.block,
                page,
            });
        }
        Ok(())
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        self.write(at, *content);
        Ok(())
    }

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        Contents::read(self, at, into)
    }

    fn known(&mut self, number: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        if number >= DISK_PAGES {
            return Err(io::ErrorKind::NotFound.into());
        }
        *into = disk_page(number);
        Ok(())
    }
}

/// Pages of the disk image that both hosts have.
pub(crate) const DISK_PAGES: u32 = 50;

/// One page of that image.
pub(crate) fn disk_page(number: u32) -> [u8; PAGE_SIZE] {
    if number.is_multiple_of(2) {
        text_page(number + 7000)
    } else {
        random_page(number + 7000)
    }
}

/// The image as sent, as an encoder keeps it.
#[derive(Debug, Default)]
pub(crate) struct Kept(pub(crate) Mutex<Memory>);

impl Kept {
    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap()
    }
}

impl Replica for Kept {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        Contents::read(&*self.memory(), at, into)
    }

    fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        let (pages, rest) = contents.as_chunks();
        assert!(rest.is_empty(), "whole pages");
        for (page, content) in (first.page..).zip(pages) {
            self.memory().write(PageAddress { page, ..first }, *content);
        }
        Ok(())
    }

    fn zero(&self, first: PageAddress, count: u32) -> io::Result<()> {
        Sink::zero(&mut *self.memory(), first, count)
    }
}

/// A sink that fails when anything reaches it.
#[derive(Debug)]
pub(crate) struct Untouched;

impl Sink for Untouched {
    fn zero(&mut self, first: PageAddress, _: u32) -> io::Result<()> {
        panic!("{first:?} was written")
    }

    fn page(&mut self, at: PageAddress, _: &[u8; PAGE_SIZE]) -> io::Result<()> {
        panic!("{at:?} was written")
    }
}

/// "ram" of 20 ranges and a bit, "rom" of 40 pages: lane 4 has ranges of both.
pub(crate) fn layout() -> Arc<Layout> {
    let blocks = vec![
        BlockSpec {
            name: "ram".into(),
            pages: 512 * 19 + 5,
        },
        BlockSpec {
            name: "rom".into(),
            pages: 40,
        },
    ];
    Arc::new(Layout::new(blocks).unwrap())
}

pub(crate) fn ram(page: u32) -> PageAddress {
    PageAddress {
        block: BlockId(0),
        page,
    }
}

pub(crate) fn part(lane: usize) -> LedgerPart {
    Ledger::split(&layout(), &KEY)[lane].clone()
}

pub(crate) fn encoder(lane: usize, disable: Disable) -> LaneEncoder {
    LaneEncoder::new(part(lane), &KEY, FIRST_SEQ, disable).unwrap()
}

/// A decoder whose stream was opened.
pub(crate) fn decoder(lane: usize) -> LaneDecoder {
    let mut decoder = LaneDecoder::new(part(lane), &KEY, INCARNATION).unwrap();
    decoder
        .open(&encoder(lane, Disable::default()).header(INCARNATION))
        .unwrap();
    decoder
}

/// Bodies of the batches in a lane's bytes (without header).
pub(crate) fn bodies(lane_bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut stream = BytesMut::new();
    encoder(0, Disable::default())
        .header(INCARNATION)
        .put(&mut stream);
    stream.extend_from_slice(lane_bytes);
    let mut framer = LaneFramer::new();
    framer.push(&stream);
    let mut bodies = Vec::new();
    while let Some(item) = framer.next_item().unwrap() {
        if let LaneItem::Batch(body) = item {
            bodies.push(body.to_vec());
        }
    }
    assert!(framer.is_between_frames());
    bodies
}

pub(crate) fn data(pages: impl IntoIterator<Item = u32>) -> Vec<Taken> {
    pages
        .into_iter()
        .map(|page| Taken {
            at: ram(page),
            zero: false,
        })
        .collect()
}

/// Text that shrinks well, different for each seed.
pub(crate) fn text_page(seed: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let words = [
        &b"page "[..],
        b"of the guest ",
        b"is text ",
        b"and more ",
        b"\n",
    ];
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut filled = 0;
    while filled < PAGE_SIZE {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let word = words[(state >> 20) as usize % words.len()];
        let bytes = word.len().min(PAGE_SIZE - filled);
        page[filled..filled + bytes].copy_from_slice(&word[..bytes]);
        filled += bytes;
    }
    page
}

/// Bytes without any order, different for each seed.
pub(crate) fn random_page(seed: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut state = u64::from(seed) + 1;
    for word in page.chunks_exact_mut(8) {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    page
}
