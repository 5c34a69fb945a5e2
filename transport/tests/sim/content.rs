//! What guest pages hold: a pure function of page and version, so memories compare by numbers and
//! the wire still carries real bytes.

use std::sync::Arc;

use testbed_link::Random;
use transport::block::{BlockId, BlockSpec, Layout, PAGE_SIZE, PageAddress};

/// The pair's secret in every session.
pub(crate) const KEY: [u8; 32] = [0x5c; 32];
/// Pages of the small second block, which no guest program writes.
pub(crate) const ROM_PAGES: u32 = 24;

/// An image of one large and one small block.
pub(crate) fn layout(ram_pages: u32) -> Arc<Layout> {
    let block = |name: &str, pages| BlockSpec {
        name: name.into(),
        pages,
    };
    let blocks = vec![block("ram", ram_pages), block("rom", ROM_PAGES)];
    Arc::new(Layout::new(blocks).expect("two named blocks of some pages"))
}

/// Address of the page with this number, counted through both blocks.
pub(crate) fn address(layout: &Layout, number: u32) -> PageAddress {
    let ram = layout.blocks()[0].pages;
    if number < ram {
        PageAddress {
            block: BlockId(0),
            page: number,
        }
    } else {
        PageAddress {
            block: BlockId(1),
            page: number - ram,
        }
    }
}

/// Number of the page at this address.
pub(crate) fn number(layout: &Layout, at: PageAddress) -> usize {
    let before = if at.block == BlockId(0) {
        0
    } else {
        layout.blocks()[0].pages
    };
    usize::try_from(before + at.page).expect("a page number fits an index")
}

/// Whether the page is all zero in this version.
pub(crate) fn is_zero(page: usize, version: u32) -> bool {
    version == 0 || mix(page, version).is_multiple_of(16)
}

/// The page's bytes in this version: zero, random or like text. Every seventh page has one of few
/// contents, so that pages of all lanes are copies of one another; every fifth changes only here and
/// there from version to version.
pub(crate) fn content(page: usize, version: u32, into: &mut [u8; PAGE_SIZE]) {
    into.fill(0);
    if is_zero(page, version) {
        return;
    }
    if page.is_multiple_of(7) {
        return fill(mix(page % 4, version % 3), into);
    }
    if page.is_multiple_of(5) {
        fill(mix(page, 0), into);
        let changed = Random::new(mix(page, version)).bits().to_le_bytes();
        into[1000..1008].copy_from_slice(&changed);
        return;
    }
    fill(mix(page, version), into);
}

fn fill(seed: u64, into: &mut [u8; PAGE_SIZE]) {
    let mut random = Random::new(seed);
    let words: Vec<u64> = (0..8).map(|_| random.bits()).collect();
    let like_text = !seed.is_multiple_of(4);
    for (nth, word) in into.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let value = if like_text && !nth.is_multiple_of(8) {
            words[nth % 8]
        } else {
            random.bits()
        };
        *word = value.to_le_bytes();
    }
}

fn mix(page: usize, version: u32) -> u64 {
    let page = u64::try_from(page).expect("a page number fits 64 bits");
    Random::new((page << 32) ^ u64::from(version)).bits()
}
