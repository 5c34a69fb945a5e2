//! What a guest is likely to use first when it runs without its last pages (post-copy): what it wrote
//! again and again, then what lies scattered, then the rest.
//!
//! ```text
//! marked -> note         every second -> age: a page's bits move down by one
//! at the stop: absent pages + their bits + how many are absent around them -> order of sending
//! ```

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{DirtySet, Layout, PageAddress, RANGE_PAGES, index};

/// The present period.
const NOW: u8 = 0x80;
/// Periods of the last eight in which a hot page was written. A program that writes 60 MB/s over 256 MiB
/// at random meets a page in a fifth of them.
const HOT_PERIODS: u32 = 6;

/// In which of the last eight periods each page was written. A byte per page.
#[derive(Debug)]
pub struct Heat {
    layout: Arc<Layout>,
    pages: Box<[AtomicU8]>,
}

impl Heat {
    /// Nothing was written.
    #[must_use]
    pub fn new(layout: Arc<Layout>) -> Self {
        let pages = index(layout.ranges_total()) * index(RANGE_PAGES);
        Self {
            pages: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            layout,
        }
    }

    /// The page was written in this period.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn note(&self, at: PageAddress) {
        self.page(at).fetch_or(NOW, Ordering::Relaxed);
    }

    /// A period is over. A page that is noted meanwhile may count for either.
    pub fn age(&self) {
        for page in &self.pages {
            let bits = page.load(Ordering::Relaxed);
            if bits != 0 {
                // Where it fails the page was noted meanwhile.
                let _noted =
                    page.compare_exchange(bits, bits >> 1, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }

    /// Of the last eight periods those in which the page was written, the present one the highest bit.
    ///
    /// # Panics
    /// When the layout has no such page.
    #[must_use]
    pub fn bits(&self, at: PageAddress) -> u8 {
        self.page(at).load(Ordering::Relaxed)
    }

    fn page(&self, at: PageAddress) -> &AtomicU8 {
        assert!(self.layout.contains(at), "{at:?} is not in the image");
        let place = self.layout.place(at);
        &self.pages[index(place.range) * index(RANGE_PAGES) + place.slot]
    }
}

/// Order in which dirty pages are sent: hot ones first, the hottest of them in front. Then ranges with
/// few absent pages: those are of the kernel and of many programs, all of which wait for one another,
/// while ranges full of them are of one program that writes much.
#[must_use]
pub fn push_order(dirty: &DirtySet, heat: impl Fn(PageAddress) -> u8) -> Vec<PageAddress> {
    let layout = dirty.layout();
    let mut keyed = Vec::new();
    for range in (0..layout.ranges_total()).filter_map(|range| dirty.absent(range)) {
        let first = keyed.len();
        for at in range.pages_of(&layout.range(range.range)) {
            let bits = heat(at);
            let periods = bits.count_ones();
            let hot = if periods < HOT_PERIODS { 0 } else { periods };
            keyed.push(((Reverse(hot), 0, range.range), at));
        }
        let scattered = keyed.len() - first;
        keyed[first..]
            .iter_mut()
            .for_each(|(key, _)| key.1 = scattered);
    }
    // Stable: pages of a range stay in the order of their addresses.
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, at)| at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockSpec};

    fn at(page: u32) -> PageAddress {
        PageAddress {
            block: BlockId(0),
            page,
        }
    }

    fn layout() -> Arc<Layout> {
        let name = "ram".into();
        Arc::new(Layout::new(vec![BlockSpec { name, pages: 2048 }]).unwrap())
    }

    /// Bits move down, one for each period.
    #[test]
    fn pages_cool() {
        let heat = Heat::new(layout());
        heat.note(at(7));
        heat.age();
        heat.age();
        heat.note(at(7));
        assert_eq!((heat.bits(at(7)), heat.bits(at(8))), (0b1010_0000, 0));
        (0..7).for_each(|_| heat.age());
        assert_eq!(heat.bits(at(7)), 1);
        heat.age();
        assert_eq!(heat.bits(at(7)), 0);
    }

    /// Hot, then scattered, then the range that is full of them; each page once.
    #[test]
    fn likely_pages_first() {
        let (layout, heat) = (layout(), Heat::new(layout()));
        let dirty = DirtySet::new(layout.clone());
        for page in 0..300 {
            dirty.mark_data(at(page));
        }
        for page in [600, 601, 1900] {
            dirty.mark_data(at(page));
        }
        for period in 0..8 {
            heat.age();
            heat.note(at(123));
            if period < 7 {
                heat.note(at(601));
            }
            if period % 2 == 0 {
                heat.note(at(5));
            }
        }
        let order = push_order(&dirty, |at| heat.bits(at));
        let first: Vec<u32> = order.iter().map(|at| at.page).collect();
        assert_eq!(first[..6], [123, 601, 1900, 600, 0, 1]);
        assert_eq!(first.len(), 303);
        let unknown = push_order(&dirty, |_| 0);
        assert_eq!(unknown[0], at(1900));
    }
}
