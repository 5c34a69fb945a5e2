//! The block list of an image, checked once, and which lane carries which page.

use std::collections::BTreeSet;

use super::{BlockId, BlockSpec, LANES, PageAddress, RANGE_PAGES, index};
use crate::wire::limits::BLOCKS_MAX;

/// Most pages of one image (16 TiB).
const PAGES_MAX: u64 = 1 << 32;
/// [`LANES`] as the number that range numbers are divided by.
const LANE_COUNT: u32 = {
    assert!(LANES == 8, "keep both in step");
    8
};

/// Why a block list is no layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Zero blocks, or more than the limit.
    #[error("{0} RAM blocks; 1 to {BLOCKS_MAX} are supported")]
    BlockCount(usize),
    /// A name is empty or longer than 255 bytes.
    #[error("the name of RAM block {block} has {bytes} bytes; 1 to 255 are allowed")]
    NameLength {
        /// Place in the block list.
        block: usize,
        /// Length of the name.
        bytes: usize,
    },
    /// Two blocks have one name.
    #[error("two RAM blocks are named {0:?}")]
    DuplicateName(String),
    /// A block has no page.
    #[error("RAM block {0:?} is empty")]
    EmptyBlock(String),
    /// The sum of all blocks is above 16 TiB.
    #[error("RAM blocks hold {0} pages in all; the limit is {PAGES_MAX}")]
    TooManyPages(u64),
}

/// One range: up to [`RANGE_PAGES`] neighbours in one block, carried by one lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeSpan {
    /// First page of the range.
    pub first: PageAddress,
    /// Pages of the range, 1 to [`RANGE_PAGES`].
    pub pages: u32,
}

/// A checked block list: unique names, no empty block, bounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    blocks: Vec<BlockSpec>,
    /// Running number of each block's first range; one more entry for the end.
    first_range: Vec<u32>,
    pages_total: u64,
}

impl Layout {
    /// Checks a block list. The memory that it asks for later is the caller's to check: a target
    /// compares the list with its own QEMU's before it makes a ledger.
    ///
    /// # Errors
    /// The first rule that the list breaks.
    pub fn new(blocks: Vec<BlockSpec>) -> Result<Self, LayoutError> {
        if blocks.is_empty() || blocks.len() > BLOCKS_MAX {
            return Err(LayoutError::BlockCount(blocks.len()));
        }
        let mut names = BTreeSet::new();
        let mut first_range = Vec::with_capacity(blocks.len() + 1);
        let mut ranges = 0_u32;
        let mut pages_total = 0_u64;
        for (block, spec) in blocks.iter().enumerate() {
            if spec.name.is_empty() || spec.name.len() > 255 {
                return Err(LayoutError::NameLength {
                    block,
                    bytes: spec.name.len(),
                });
            }
            if !names.insert(spec.name.as_str()) {
                return Err(LayoutError::DuplicateName(spec.name.clone()));
            }
            if spec.pages == 0 {
                return Err(LayoutError::EmptyBlock(spec.name.clone()));
            }
            pages_total += u64::from(spec.pages);
            if pages_total > PAGES_MAX {
                return Err(LayoutError::TooManyPages(pages_total));
            }
            first_range.push(ranges);
            // At most 2^32 / 512 whole ranges and one short one per block: far below 2^32.
            ranges += spec.pages.div_ceil(RANGE_PAGES);
        }
        first_range.push(ranges);
        Ok(Self {
            blocks,
            first_range,
            pages_total,
        })
    }

    /// The blocks in QEMU's order.
    pub fn blocks(&self) -> &[BlockSpec] {
        &self.blocks
    }

    /// Pages of all blocks.
    pub fn pages_total(&self) -> u64 {
        self.pages_total
    }

    /// Whether the layout has this page.
    pub fn contains(&self, at: PageAddress) -> bool {
        self.blocks
            .get(usize::from(at.block.0))
            .is_some_and(|spec| at.page < spec.pages)
    }

    /// The lane that carries a page.
    ///
    /// # Panics
    /// When the layout has no such block: addresses from outside go through [`Self::contains`].
    pub fn lane_of(&self, at: PageAddress) -> usize {
        index(self.range_of(at) % LANE_COUNT)
    }

    /// Every page in block order.
    pub fn pages(&self) -> impl Iterator<Item = PageAddress> {
        self.blocks.iter().zip(0_u16..).flat_map(|(spec, block)| {
            (0..spec.pages).map(move |page| PageAddress {
                block: BlockId(block),
                page,
            })
        })
    }

    /// Number of ranges of all blocks.
    pub fn ranges_total(&self) -> u32 {
        *self
            .first_range
            .last()
            .expect("the end entry was pushed in new")
    }

    /// Number of ranges that a lane carries.
    pub fn lane_ranges(&self, lane: usize) -> u32 {
        let lane = u32::try_from(lane).unwrap_or(u32::MAX);
        if lane >= LANE_COUNT {
            0
        } else {
            (self.ranges_total() + LANE_COUNT - 1 - lane) / LANE_COUNT
        }
    }

    /// The `nth` range of a lane.
    ///
    /// # Panics
    /// When the lane has no such range.
    pub fn lane_range(&self, lane: usize, nth: u32) -> RangeSpan {
        assert!(
            nth < self.lane_ranges(lane),
            "range {nth} of lane {lane} does not exist"
        );
        let lane = u32::try_from(lane).expect("checked against LANES");
        self.range(nth * LANE_COUNT + lane)
    }

    /// Where a page is inside its lane: the lane's range and the page in that range.
    pub(super) fn place(&self, at: PageAddress) -> Place {
        let range = self.range_of(at);
        Place {
            lane: index(range % LANE_COUNT),
            nth: range / LANE_COUNT,
            range,
            slot: index(at.page % RANGE_PAGES),
        }
    }

    /// The ranges of one block, by their running numbers.
    pub(super) fn block_ranges(&self, block: usize) -> std::ops::Range<u32> {
        self.first_range[block]..self.first_range[block + 1]
    }

    /// The range of a running number.
    pub(crate) fn range(&self, range: u32) -> RangeSpan {
        let block = self.first_range.partition_point(|first| *first <= range) - 1;
        let first = (range - self.first_range[block]) * RANGE_PAGES;
        let pages = (self.blocks[block].pages - first).min(RANGE_PAGES);
        let block = BlockId(u16::try_from(block).expect("BLOCKS_MAX fits 16 bits"));
        RangeSpan {
            first: PageAddress { block, page: first },
            pages,
        }
    }

    fn range_of(&self, at: PageAddress) -> u32 {
        self.first_range[usize::from(at.block.0)] + at.page / RANGE_PAGES
    }
}

/// A page's place in the tables that are kept per lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The lane.
    pub(super) lane: usize,
    /// Number of the range inside the lane.
    pub(super) nth: u32,
    /// Running number of the range.
    pub(super) range: u32,
    /// Page inside the range.
    pub(super) slot: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, pages: u32) -> BlockSpec {
        BlockSpec {
            name: name.into(),
            pages,
        }
    }

    /// Each broken rule has its own error.
    #[test]
    fn bad_lists_are_refused() {
        let check = |blocks: Vec<BlockSpec>, expected: LayoutError| {
            assert_eq!(Layout::new(blocks), Err(expected));
        };
        check(vec![], LayoutError::BlockCount(0));
        let many = (0..=BLOCKS_MAX).map(|n| spec(&n.to_string(), 1)).collect();
        check(many, LayoutError::BlockCount(BLOCKS_MAX + 1));
        check(
            vec![spec("", 1)],
            LayoutError::NameLength { block: 0, bytes: 0 },
        );
        check(
            vec![spec(&"x".repeat(256), 1)],
            LayoutError::NameLength {
                block: 0,
                bytes: 256,
            },
        );
        check(
            vec![spec("a", 1), spec("a", 2)],
            LayoutError::DuplicateName("a".into()),
        );
        check(vec![spec("a", 0)], LayoutError::EmptyBlock("a".into()));
        check(
            vec![spec("a", u32::MAX), spec("b", 2)],
            LayoutError::TooManyPages(PAGES_MAX + 1),
        );
        assert!(Layout::new(vec![spec("a", u32::MAX), spec("b", 1)]).is_ok());
    }

    /// Ranges are counted through the blocks, so small blocks land on different lanes, and every
    /// page is in exactly one range of exactly one lane.
    #[test]
    fn ranges_cover_every_page_once() {
        let layout = Layout::new(vec![
            spec("ram", 512 * 9 + 7),
            spec("rom", 3),
            spec("vram", 512),
            spec("one", 1),
        ])
        .unwrap();
        assert_eq!(layout.ranges_total(), 10 + 1 + 1 + 1);
        let mut seen = Vec::new();
        for lane in 0..LANES {
            for nth in 0..layout.lane_ranges(lane) {
                let span = layout.lane_range(lane, nth);
                for page in span.first.page..span.first.page + span.pages {
                    let at = PageAddress {
                        block: span.first.block,
                        page,
                    };
                    assert_eq!(layout.lane_of(at), lane);
                    assert_eq!(layout.place(at).nth, nth);
                    seen.push(at);
                }
            }
        }
        seen.sort();
        assert_eq!(seen, layout.pages().collect::<Vec<_>>());
        assert_eq!(seen.len(), 512 * 10 + 11);
        assert_eq!(
            layout.lane_of(PageAddress {
                block: BlockId(1),
                page: 0
            }),
            10 % LANES
        );
        assert!(!layout.contains(PageAddress {
            block: BlockId(1),
            page: 3
        }));
        assert!(!layout.contains(PageAddress {
            block: BlockId(4),
            page: 0
        }));
    }
}
