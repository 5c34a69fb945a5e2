//! Finds, by hash, the page that holds a content. All lanes share it, without a lock:
//!
//! ```text
//! slots   hash -> page        one cell per bucket, the latest wins
//! pages   page -> tag of the content last sent | version      one cell per page
//! ```
//!
//! An entry counts only while both tables agree, so a page that was sent again with other content is
//! found no more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::block::{LANES, Layout, PageAddress, PageHash, index};

/// Where content that was sent can be found again. Bounded by the bytes that it may take.
#[derive(Debug)]
pub struct CopyIndex {
    layout: Arc<Layout>,
    /// Running number of each block's first page.
    first_page: Vec<u64>,
    /// Page number + 1 by bits of the hash, 0 for none.
    slots: Box<[AtomicU32]>,
    /// Tag and version of the content last sent, 0 for none.
    pages: Box<[AtomicU64]>,
    /// Up to which batch the target has applied, by lane.
    acknowledged: [AtomicU32; LANES],
}

impl CopyIndex {
    /// An empty index of at most `max_bytes`. Where that is not enough for the whole image its last
    /// pages are never found.
    pub fn new(layout: &Arc<Layout>, max_bytes: usize) -> Self {
        let mut first_page = Vec::with_capacity(layout.blocks().len());
        let mut next = 0;
        for block in layout.blocks() {
            first_page.push(next);
            next += u64::from(block.pages);
        }
        // Eight bytes for each page, four for each bucket; a bucket per page, rounded down.
        let pages = usize::try_from(next.min(u64::from(u32::MAX) - 1)).unwrap_or(usize::MAX);
        let pages = pages.min(max_bytes / 12);
        let buckets = pages.checked_ilog2().map_or(0, |bits| 1 << bits);
        Self {
            layout: layout.clone(),
            first_page,
            slots: (0..buckets).map(|_| AtomicU32::new(0)).collect(),
            pages: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            acknowledged: [const { AtomicU32::new(0) }; LANES],
        }
    }

    /// A page's content was sent in batch `version` of its lane (or is seeded, version 1).
    pub fn insert(&self, hash: PageHash, at: PageAddress, version: u32) {
        let Some(number) = self.number(at) else {
            return;
        };
        let (bucket, tag) = self.split(hash);
        let cell = u64::from(tag) << 32 | u64::from(version);
        self.pages[number].store(cell, Ordering::Relaxed);
        let entry = u32::try_from(number + 1).expect("bounded in new");
        self.slots[bucket].store(entry, Ordering::Relaxed);
    }

    /// The target does not hold what was sent last for this page.
    pub fn forget(&self, at: PageAddress) {
        if let Some(number) = self.number(at) {
            self.pages[number].store(0, Ordering::Relaxed);
        }
    }

    /// The target has applied the lane's batches up to `seq`; earlier numbers are ignored. Nothing
    /// of a lane is found before: seeded pages need a call with 1 or more.
    pub fn acknowledge(&self, lane: usize, seq: u32) {
        self.acknowledged[lane].fetch_max(seq, Ordering::Relaxed);
    }

    /// A page with this content that the target has applied, and its version.
    pub fn find(&self, hash: PageHash) -> Option<(PageAddress, u32)> {
        if self.slots.is_empty() {
            return None;
        }
        let (bucket, tag) = self.split(hash);
        let number = self.slots[bucket].load(Ordering::Relaxed).checked_sub(1)?;
        let cell = self.pages[index(number)]
            .load(Ordering::Relaxed)
            .to_be_bytes();
        let [t0, t1, t2, t3, v0, v1, v2, v3] = cell;
        let version = u32::from_be_bytes([v0, v1, v2, v3]);
        if version == 0 || u32::from_be_bytes([t0, t1, t2, t3]) != tag {
            return None;
        }
        let at = self.address(number);
        let acknowledged = self.acknowledged[self.layout.lane_of(at)].load(Ordering::Relaxed);
        (version <= acknowledged).then_some((at, version))
    }

    /// Bucket and tag, from different bits of the hash.
    fn split(&self, hash: PageHash) -> (usize, u32) {
        let [b0, b1, b2, b3, t0, t1, t2, t3, ..] = hash.0;
        let bucket = index(u32::from_be_bytes([b0, b1, b2, b3])) & (self.slots.len() - 1);
        (bucket, u32::from_be_bytes([t0, t1, t2, t3]))
    }

    /// Running number of a page, `None` for one beyond the budget.
    fn number(&self, at: PageAddress) -> Option<usize> {
        let number = self.first_page.get(usize::from(at.block.0))? + u64::from(at.page);
        usize::try_from(number)
            .ok()
            .filter(|number| *number < self.pages.len())
    }

    fn address(&self, number: u32) -> PageAddress {
        let number = u64::from(number);
        let block = self.first_page.partition_point(|first| *first <= number) - 1;
        let page = number - self.first_page[block];
        PageAddress {
            block: crate::block::BlockId(crate::block::length_u16(block)),
            page: u32::try_from(page).expect("pages of a block are u32"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockSpec};

    fn layout() -> Arc<Layout> {
        let block = |name: &str, pages| BlockSpec {
            name: name.into(),
            pages,
        };
        Layout::new(vec![block("ram", 600), block("rom", 40)])
            .unwrap()
            .into()
    }

    fn at(block: u16, page: u32) -> PageAddress {
        PageAddress {
            block: BlockId(block),
            page,
        }
    }

    fn hash(seed: u32) -> PageHash {
        PageHash(
            *blake3::hash(&seed.to_be_bytes())
                .as_bytes()
                .first_chunk()
                .unwrap(),
        )
    }

    /// Only what the target has applied is found, and only while it is the page's last content.
    #[test]
    fn only_applied_content_is_found() {
        let index = CopyIndex::new(&layout(), 1 << 20);
        index.insert(hash(1), at(0, 513), 7);
        assert_eq!(index.find(hash(1)), None);
        index.acknowledge(0, 9);
        assert_eq!(index.find(hash(1)), None, "another lane's");
        index.acknowledge(1, 6);
        assert_eq!(index.find(hash(1)), None);
        index.acknowledge(1, 7);
        index.acknowledge(1, 5);
        assert_eq!(index.find(hash(1)), Some((at(0, 513), 7)));
        index.insert(hash(2), at(0, 513), 7);
        assert_eq!(index.find(hash(1)), None, "the page is another one");
        assert_eq!(index.find(hash(2)), Some((at(0, 513), 7)));
        index.forget(at(0, 513));
        assert_eq!(index.find(hash(2)), None);
    }

    /// Every page of every block has its own place; a short budget only finds less.
    #[test]
    fn budget_bounds_the_index() {
        let layout = layout();
        let index = CopyIndex::new(&layout, 1 << 20);
        (0..LANES).for_each(|lane| index.acknowledge(lane, 3));
        for page in [at(0, 0), at(0, 599), at(1, 0), at(1, 39)] {
            index.insert(hash(page.page), page, 3);
            assert_eq!(index.find(hash(page.page)), Some((page, 3)));
        }
        for max_bytes in [0, 11, 12, 100, 4000] {
            let index = CopyIndex::new(&layout, max_bytes);
            assert!(index.slots.len() * 4 + index.pages.len() * 8 <= max_bytes);
            (0..LANES).for_each(|lane| index.acknowledge(lane, 3));
            for page in layout.pages() {
                index.insert(hash(page.page), page, 3);
            }
            let found = (0..600)
                .filter(|page| index.find(hash(*page)).is_some())
                .count();
            assert!(found <= max_bytes / 12, "{found}");
            assert!(max_bytes < 100 || found > 0);
        }
    }
}
