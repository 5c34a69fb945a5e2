//! Pages that the target lacks when its guest begins to run (post-copy).
//!
//! ```text
//! source: dirty at the stop -> ranges -> wire -> target: lacking -> arrives, once
//!                                                          fault -> wanted (once) | never announced
//! ```
//!
//! A bit for each page. Who writes pages into the guest and who answers its faults share one set: taking
//! a page out is what makes it arrive once, whichever way it came.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Layout, PageAddress, RANGE_PAGES, RangeSpan, index};

/// Bytes of one range's bits.
pub const ABSENT_RANGE_BYTES: usize = RANGE_PAGES as usize / 8;
/// Words of one range's bits.
const WORDS: usize = RANGE_PAGES as usize / 64;

/// The lacking pages of one range, page 0 in the lowest bit of the first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AbsentRange {
    /// Running number of the range.
    pub range: u32,
    /// A bit for each page.
    pub pages: [u8; ABSENT_RANGE_BYTES],
}

impl AbsentRange {
    /// The pages of this range whose bits are set, ascending; bits behind its end do not count.
    pub fn pages_of(&self, span: &RangeSpan) -> impl Iterator<Item = PageAddress> {
        let (bits, first) = (self.pages, span.first);
        (0..span.pages)
            .filter(move |page| bits[index(page / 8)] & (1 << (page % 8)) != 0)
            .map(move |page| PageAddress {
                page: first.page + page,
                ..first
            })
    }
}

/// A range that does not exist, or pages behind its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("pages of range {0} are named that do not exist")]
pub struct BadAbsent(u32);

/// What a fault of the target's guest means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The source must send the page.
    Wanted,
    /// It was asked for.
    Waiting,
    /// It has arrived; the fault and the page crossed.
    Here,
    /// The source never announced the page: it is zero. Told once.
    Never,
}

/// The set.
#[derive(Debug)]
pub struct AbsentPages {
    layout: Arc<Layout>,
    lacking: Box<[AtomicU64]>,
    asked: Box<[AtomicU64]>,
    /// Was lacking at some time, or has been told as never announced.
    told: Box<[AtomicU64]>,
    left: AtomicU64,
}

impl AbsentPages {
    /// Nothing is lacking.
    #[must_use]
    pub fn new(layout: Arc<Layout>) -> Self {
        let words = index(layout.ranges_total()) * WORDS;
        let bits = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Self {
            lacking: bits(),
            asked: bits(),
            told: bits(),
            left: AtomicU64::new(0),
            layout,
        }
    }

    /// Adds the pages of a range.
    ///
    /// # Errors
    /// When one does not exist; nothing is then added.
    pub fn insert(&self, absent: &AbsentRange) -> Result<(), BadAbsent> {
        let bad = BadAbsent(absent.range);
        if absent.range >= self.layout.ranges_total() {
            return Err(bad);
        }
        let span = self.layout.range(absent.range);
        let is_set = |page: u32| absent.pages[index(page / 8)] & (1 << (page % 8)) != 0;
        if (span.pages..RANGE_PAGES).any(is_set) {
            return Err(bad);
        }
        for page in absent.pages_of(&span) {
            self.insert_page(page);
        }
        Ok(())
    }

    /// Adds a page.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn insert_page(&self, at: PageAddress) {
        let (word, bit) = self.place(at);
        self.told[word].fetch_or(bit, Ordering::AcqRel);
        if self.lacking[word].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.left.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Number of pages that are lacking.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Takes a page out: whether it was asked for, or `None` when it was not lacking.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn arrive(&self, at: PageAddress) -> Option<bool> {
        let (word, bit) = self.place(at);
        if self.lacking[word].fetch_and(!bit, Ordering::AcqRel) & bit == 0 {
            return None;
        }
        self.left.fetch_sub(1, Ordering::AcqRel);
        Some(self.asked[word].load(Ordering::Acquire) & bit != 0)
    }

    /// The guest waits for a page.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn fault(&self, at: PageAddress) -> Fault {
        let (word, bit) = self.place(at);
        let asked = self.asked[word].fetch_or(bit, Ordering::AcqRel) & bit != 0;
        if self.lacking[word].load(Ordering::Acquire) & bit != 0 {
            return if asked { Fault::Waiting } else { Fault::Wanted };
        }
        let told = self.told[word].fetch_or(bit, Ordering::AcqRel) & bit != 0;
        if told { Fault::Here } else { Fault::Never }
    }

    /// What was asked for and has not come, to ask again on another connection.
    #[must_use]
    pub fn waiting(&self) -> Vec<PageAddress> {
        let mut found = Vec::new();
        self.show(
            |word, lacking| lacking & self.asked[word].load(Ordering::Acquire),
            &mut |at| {
                found.push(at);
            },
        );
        found
    }

    /// Shows every lacking page, ascending.
    pub fn for_each(&self, show: &mut dyn FnMut(PageAddress)) {
        self.show(|_, lacking| lacking, show);
    }

    /// The ranges with lacking pages, for the wire.
    #[must_use]
    pub fn ranges(&self) -> Vec<AbsentRange> {
        let ranges = (0..self.layout.ranges_total()).zip(self.lacking.chunks_exact(WORDS));
        ranges
            .filter_map(|(range, words)| {
                let mut pages = [0; ABSENT_RANGE_BYTES];
                let (bytes, _) = pages.as_chunks_mut::<8>();
                for (bytes, word) in bytes.iter_mut().zip(words) {
                    *bytes = word.load(Ordering::Acquire).to_le_bytes();
                }
                (pages != [0; ABSENT_RANGE_BYTES]).then_some(AbsentRange { range, pages })
            })
            .collect()
    }

    /// Runs (first page, number) of lacking pages of a block, ascending.
    #[must_use]
    pub fn runs(&self, block: usize) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        self.for_each(&mut |at| {
            if usize::from(at.block.0) != block {
                return;
            }
            match runs.last_mut() {
                Some((first, count)) if *first + *count == at.page => *count += 1,
                _ => runs.push((at.page, 1)),
            }
        });
        runs
    }

    fn show(&self, bits: impl Fn(usize, u64) -> u64, show: &mut dyn FnMut(PageAddress)) {
        for range in 0..self.layout.ranges_total() {
            let first = self.layout.range(range).first;
            for nth in 0..WORDS {
                let word = index(range) * WORDS + nth;
                let mut left = bits(word, self.lacking[word].load(Ordering::Acquire));
                while left != 0 {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    let offset = super::length_u32(nth) * 64 + bit;
                    show(PageAddress {
                        page: first.page + offset,
                        ..first
                    });
                }
            }
        }
    }

    fn place(&self, at: PageAddress) -> (usize, u64) {
        assert!(self.layout.contains(at), "{at:?} is not in the image");
        let place = self.layout.place(at);
        let word = index(place.range) * WORDS + place.slot / 64;
        (word, 1 << (place.slot % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockSpec};

    fn set() -> AbsentPages {
        let block = |name: &str, pages| BlockSpec {
            name: name.into(),
            pages,
        };
        let blocks = vec![block("ram", 600), block("rom", 3)];
        AbsentPages::new(Arc::new(Layout::new(blocks).unwrap()))
    }

    fn at(block: u16, page: u32) -> PageAddress {
        PageAddress {
            block: BlockId(block),
            page,
        }
    }

    /// Each page arrives once; a fault is told once for what it means.
    #[test]
    fn a_page_arrives_once() {
        let pages = set();
        for page in [at(0, 63), at(0, 64), at(0, 512), at(1, 2), at(1, 2)] {
            pages.insert_page(page);
        }
        assert_eq!(pages.left(), 4);
        assert_eq!(pages.fault(at(0, 64)), Fault::Wanted);
        assert_eq!(pages.fault(at(0, 64)), Fault::Waiting);
        assert_eq!(pages.waiting(), [at(0, 64)]);
        assert_eq!(pages.arrive(at(0, 64)), Some(true));
        assert_eq!(pages.arrive(at(0, 64)), None);
        assert_eq!(pages.fault(at(0, 64)), Fault::Here);
        assert_eq!(pages.arrive(at(1, 2)), Some(false));
        assert_eq!(pages.fault(at(1, 1)), Fault::Never);
        assert_eq!(pages.fault(at(1, 1)), Fault::Here);
        assert_eq!(pages.arrive(at(1, 1)), None);
        assert_eq!(pages.left(), 2);
        assert_eq!(pages.runs(0), [(63, 1), (512, 1)]);
        assert_eq!(pages.runs(1), []);
    }

    /// What is told to the other side is the same set there; pages that do not exist are refused.
    #[test]
    fn ranges_carry_the_set() {
        let (here, there) = (set(), set());
        for page in [at(0, 0), at(0, 1), at(0, 599), at(1, 2)] {
            here.insert_page(page);
        }
        for range in here.ranges() {
            there.insert(&range).unwrap();
        }
        let (mut one, mut two) = (Vec::new(), Vec::new());
        here.for_each(&mut |at| one.push(at));
        there.for_each(&mut |at| two.push(at));
        assert_eq!((one.len(), &one), (4, &two));
        assert_eq!(there.runs(0), [(0, 2), (599, 1)]);
        let mut pages = [0; ABSENT_RANGE_BYTES];
        pages[0] = 8;
        assert_eq!(
            there.insert(&AbsentRange { range: 2, pages }),
            Err(BadAbsent(2))
        );
        assert_eq!(
            there.insert(&AbsentRange { range: 3, pages }),
            Err(BadAbsent(3))
        );
        assert_eq!(there.left(), 4);
    }
}
