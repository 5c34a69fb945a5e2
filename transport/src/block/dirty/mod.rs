//! Which pages wait to be sent: one marker writes, each lane's encoder takes.
//!
//! ```text
//! marker:  content is in place -> mark (Release)
//! encoder: take = swap to clean (Acquire) -> read the content once -> hash, compare, compress
//! ```
//!
//! The flag is cleared *before* the content is read (S7): a page that changes during the read is
//! marked again by whoever changed it, so a torn read is always followed by a whole one.

use std::sync::Arc;
#[cfg(not(all(test, model)))]
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

#[cfg(all(test, model))]
use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::{ABSENT_RANGE_BYTES, AbsentRange, LANES, Layout, PageAddress, RANGE_PAGES, index};

const CLEAN: u8 = 0;
const DATA: u8 = 1;
const ZERO: u8 = 2;

/// Zero pages that one take may return beyond its `max_pages`: they cost next to nothing.
const ZERO_PAGES_MAX: usize = RANGE_PAGES as usize;

/// A page taken out of the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Where the page is.
    pub at: PageAddress,
    /// It was announced as all zero; its content need not be read.
    pub zero: bool,
}

/// Where one lane's encoder continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneCursor {
    lane: usize,
    nth: u32,
    slot: usize,
}

impl LaneCursor {
    /// At the beginning of a lane.
    ///
    /// # Panics
    /// When there is no such lane.
    pub fn new(lane: usize) -> Self {
        assert!(lane < LANES, "lane {lane} does not exist");
        Self {
            lane,
            nth: 0,
            slot: 0,
        }
    }

    /// The lane.
    pub fn lane(&self) -> usize {
        self.lane
    }
}

/// The set of dirty pages. About one byte per page.
#[derive(Debug)]
pub struct DirtySet {
    layout: Arc<Layout>,
    /// One flag per page, [`RANGE_PAGES`] per range.
    flags: Box<[AtomicU8]>,
    /// Dirty pages per range. Counters are raised before the flag and lowered after it, so they
    /// never show less than the flags and never fall below zero.
    ranges: Box<[AtomicU32]>,
    lanes: [AtomicU64; LANES],
}

impl DirtySet {
    /// An empty set.
    pub fn new(layout: Arc<Layout>) -> Self {
        let ranges = layout.ranges_total();
        let flags = index(ranges) * index(RANGE_PAGES);
        Self {
            flags: (0..flags).map(|_| AtomicU8::new(CLEAN)).collect(),
            ranges: (0..ranges).map(|_| AtomicU32::new(0)).collect(),
            lanes: std::array::from_fn(|_| AtomicU64::new(0)),
            layout,
        }
    }

    /// The layout of the image.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The page has content to send. Returns whether it was dirty already: that earlier version
    /// will never be sent.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn mark_data(&self, at: PageAddress) -> bool {
        self.mark(at, DATA)
    }

    /// The page is all zero. Returns whether it was dirty already.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn mark_zero(&self, at: PageAddress) -> bool {
        self.mark(at, ZERO)
    }

    /// What was sent last must go again. A page that is dirty keeps its later announcement.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn mark_again(&self, at: PageAddress, zero: bool) {
        assert!(self.layout.contains(at), "{at:?} is not in the image");
        let place = self.layout.place(at);
        self.lanes[place.lane].fetch_add(1, Ordering::AcqRel);
        self.ranges[index(place.range)].fetch_add(1, Ordering::AcqRel);
        let flag = &self.flags[index(place.range) * index(RANGE_PAGES) + place.slot];
        let kind = if zero { ZERO } else { DATA };
        let marked = flag.compare_exchange(CLEAN, kind, Ordering::AcqRel, Ordering::Acquire);
        if marked.is_err() {
            self.lower(place.lane, place.range, 1);
        }
    }

    /// Takes up to `max_pages` pages (and up to 512 zero pages beyond) of the cursor's lane,
    /// clean from here on. The caller reads their content only after this call.
    /// Empty only if no page of the lane was dirty during the whole call.
    pub fn take(&self, cursor: &mut LaneCursor, max_pages: usize) -> Vec<Taken> {
        let mut taken = Vec::new();
        self.take_into(cursor, max_pages, &mut taken);
        taken
    }

    /// [`take`](Self::take) into a buffer that is used again; it is emptied first.
    pub fn take_into(&self, cursor: &mut LaneCursor, max_pages: usize, taken: &mut Vec<Taken>) {
        taken.clear();
        let ranges = self.layout.lane_ranges(cursor.lane);
        if max_pages == 0 || ranges == 0 || self.lane_dirty(cursor.lane) == 0 {
            return;
        }
        let mut room = Room {
            data: max_pages,
            zero: ZERO_PAGES_MAX,
        };
        let start = *cursor;
        // The first range is visited once more at the end, for the pages before the start.
        for step in 0..=ranges {
            let until = if step == ranges {
                start.slot
            } else {
                index(RANGE_PAGES)
            };
            if !self.take_range(cursor, until, &mut room, taken) {
                return;
            }
            if step < ranges {
                cursor.slot = 0;
                cursor.nth = (cursor.nth + 1) % ranges;
            }
        }
    }

    /// Shows the pages of a range that have content to send, and takes none: for who looks ahead.
    ///
    /// # Panics
    /// When the layout has no such range.
    pub fn peek_data(&self, range: u32, show: &mut dyn FnMut(PageAddress)) {
        if self.ranges[index(range)].load(Ordering::Acquire) == 0 {
            return;
        }
        let first = self.layout.range(range).first;
        let flags = &self.flags[index(range) * index(RANGE_PAGES)..][..index(RANGE_PAGES)];
        for (page, flag) in (first.page..).zip(flags) {
            if flag.load(Ordering::Acquire) == DATA {
                show(PageAddress { page, ..first });
            }
        }
    }

    /// Takes one page, for who cannot wait for its lane's turn; `None` when it is clean. Its content is
    /// read only after this call.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn take_page(&self, at: PageAddress) -> Option<Taken> {
        assert!(self.layout.contains(at), "{at:?} is not in the image");
        let place = self.layout.place(at);
        let flag = &self.flags[index(place.range) * index(RANGE_PAGES) + place.slot];
        let kind = flag.swap(CLEAN, Ordering::AcqRel);
        if kind == CLEAN {
            return None;
        }
        self.lower(place.lane, place.range, 1);
        Some(Taken {
            at,
            zero: kind == ZERO,
        })
    }

    /// The dirty pages of a range as they are, `None` for none.
    ///
    /// # Panics
    /// When the layout has no such range.
    pub fn absent(&self, range: u32) -> Option<AbsentRange> {
        let mut pages = [0; ABSENT_RANGE_BYTES];
        if self.ranges[index(range)].load(Ordering::Acquire) > 0 {
            let flags = &self.flags[index(range) * index(RANGE_PAGES)..][..index(RANGE_PAGES)];
            for (slot, flag) in flags.iter().enumerate() {
                let is_dirty = flag.load(Ordering::Acquire) != CLEAN;
                pages[slot / 8] |= u8::from(is_dirty) << (slot % 8);
            }
        }
        (pages != [0; ABSENT_RANGE_BYTES]).then_some(AbsentRange { range, pages })
    }

    /// Which part of the dirty pages was announced as zero, for estimates: seen in at most `ranges_max` of
    /// the ranges that have some, spread over all.
    pub fn zero_share(&self, ranges_max: u32) -> f64 {
        let step = index(self.layout.ranges_total().div_ceil(ranges_max.max(1)));
        let (mut zero, mut all) = (0_u32, 0_u32);
        for range in (0..self.ranges.len()).step_by(step.max(1)) {
            if self.ranges[range].load(Ordering::Relaxed) == 0 {
                continue;
            }
            for flag in &self.flags[range * index(RANGE_PAGES)..][..index(RANGE_PAGES)] {
                let kind = flag.load(Ordering::Relaxed);
                all += u32::from(kind != CLEAN);
                zero += u32::from(kind == ZERO);
            }
        }
        f64::from(zero) / f64::from(all.max(1))
    }

    /// Dirty pages of all lanes. Exact when no one marks or takes.
    pub fn dirty_pages(&self) -> u64 {
        (0..LANES).map(|lane| self.lane_dirty(lane)).sum()
    }

    /// Dirty pages of one lane.
    pub fn lane_dirty(&self, lane: usize) -> u64 {
        self.lanes[lane].load(Ordering::Acquire)
    }

    fn mark(&self, at: PageAddress, kind: u8) -> bool {
        assert!(self.layout.contains(at), "{at:?} is not in the image");
        let place = self.layout.place(at);
        self.lanes[place.lane].fetch_add(1, Ordering::AcqRel);
        self.ranges[index(place.range)].fetch_add(1, Ordering::AcqRel);
        let flag = &self.flags[index(place.range) * index(RANGE_PAGES) + place.slot];
        let superseded = flag.swap(kind, Ordering::AcqRel) != CLEAN;
        if superseded {
            self.lower(place.lane, place.range, 1);
        }
        superseded
    }

    /// Takes pages of the cursor's range up to slot `until`; false when there is no room left.
    fn take_range(
        &self,
        cursor: &mut LaneCursor,
        until: usize,
        room: &mut Room,
        taken: &mut Vec<Taken>,
    ) -> bool {
        let span = self.layout.lane_range(cursor.lane, cursor.nth);
        let place = self.layout.place(span.first);
        if self.ranges[index(place.range)].load(Ordering::Acquire) == 0 {
            return true;
        }
        let flags = &self.flags[index(place.range) * index(RANGE_PAGES)..];
        let before = taken.len();
        let mut has_room = true;
        for page in 0..span.pages {
            let slot = index(page);
            if slot < cursor.slot {
                continue;
            }
            if slot >= until {
                break;
            }
            if flags[slot].load(Ordering::Relaxed) == CLEAN {
                continue;
            }
            if room.is_full() {
                cursor.slot = slot;
                has_room = false;
                break;
            }
            let kind = flags[slot].swap(CLEAN, Ordering::AcqRel);
            let at = PageAddress {
                block: span.first.block,
                page: span.first.page + page,
            };
            room.use_one(kind == ZERO);
            taken.push(Taken {
                at,
                zero: kind == ZERO,
            });
        }
        let count = u32::try_from(taken.len() - before).expect("at most RANGE_PAGES");
        self.lower(cursor.lane, place.range, count);
        has_room
    }

    fn lower(&self, lane: usize, range: u32, count: u32) {
        self.ranges[index(range)].fetch_sub(count, Ordering::AcqRel);
        self.lanes[lane].fetch_sub(u64::from(count), Ordering::AcqRel);
    }
}

/// What one take may still return.
#[derive(Debug)]
struct Room {
    data: usize,
    zero: usize,
}

impl Room {
    /// No page of any kind fits for sure: the next one may be data.
    fn is_full(&self) -> bool {
        self.data == 0
    }

    fn use_one(&mut self, zero: bool) {
        if zero && self.zero > 0 {
            self.zero -= 1;
        } else {
            self.data -= 1;
        }
    }
}

#[cfg(model)]
#[cfg(test)]
mod model;
#[cfg(not(model))]
#[cfg(test)]
mod tests;
