use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::block::{BlockId, BlockSpec};

fn layout() -> Arc<Layout> {
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

fn ram(page: u32) -> PageAddress {
    PageAddress {
        block: BlockId(0),
        page,
    }
}

/// Taking continues where it stopped, in ascending order, and wraps once.
#[test]
fn takes_round_robin() {
    let set = DirtySet::new(layout());
    // Ranges 0, 8 and 16 of block 0 belong to lane 0.
    for page in [3, 9, 512 * 8, 512 * 16 + 1] {
        assert!(!set.mark_data(ram(page)));
    }
    let mut cursor = LaneCursor::new(0);
    let pages = |taken: Vec<Taken>| taken.iter().map(|t| t.at.page).collect::<Vec<_>>();
    assert_eq!(pages(set.take(&mut cursor, 1)), [3]);
    set.mark_data(ram(3));
    assert_eq!(pages(set.take(&mut cursor, 2)), [9, 512 * 8]);
    assert_eq!(pages(set.take(&mut cursor, 9)), [512 * 16 + 1, 3]);
    assert!(pages(set.take(&mut cursor, 9)).is_empty());
    assert_eq!(set.dirty_pages(), 0);
}

/// The second mark of a page says that the first was superseded; the last kind counts.
#[test]
fn later_mark_supersedes() {
    let set = DirtySet::new(layout());
    assert!(!set.mark_data(ram(1)));
    assert!(set.mark_zero(ram(1)));
    assert_eq!(set.lane_dirty(0), 1);
    let taken = set.take(&mut LaneCursor::new(0), 8);
    assert_eq!(
        taken,
        [Taken {
            at: ram(1),
            zero: true
        }]
    );
}

/// The part of zero pages is that of the ranges that are looked at.
#[test]
fn zero_pages_are_counted() {
    let set = DirtySet::new(layout());
    assert_eq!(set.zero_share(1024), 0.0);
    for page in 0..300 {
        set.mark_zero(ram(page));
    }
    for page in 512 * 3..512 * 3 + 100 {
        set.mark_data(ram(page));
    }
    assert_eq!(set.zero_share(1024), 0.75);
    // Every second range, then none beside the first.
    assert_eq!(set.zero_share(11), 1.0);
    assert_eq!(set.zero_share(0), 1.0);
}

/// The limits are reached: `max_pages` of data, and 512 zero pages beyond.
#[test]
fn take_is_bounded() {
    let set = DirtySet::new(layout());
    for page in (0..512).chain(512 * 8..512 * 9) {
        set.mark_zero(ram(page));
    }
    let mut cursor = LaneCursor::new(0);
    assert_eq!(set.take(&mut cursor, 64).len(), 512 + 64);
    assert_eq!(set.take(&mut cursor, 64).len(), 512 - 64);
    for page in 0..512 {
        set.mark_data(ram(page));
    }
    assert_eq!(set.take(&mut cursor, 64).len(), 64);
    assert_eq!(set.dirty_pages(), 512 - 64);
}

/// S7: with a marker that writes and marks while an encoder takes and reads, the last content of
/// every page is what the encoder read last. The writer stores the content before it marks; a
/// set that cleared its flag after the read would lose versions here.
#[test]
fn s7_no_version_is_lost_between_mark_and_take() {
    const PAGES: u32 = 64;
    let set = DirtySet::new(layout());
    let content: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    let mut seen = vec![0; PAGES as usize];
    let finished = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = 1_u32;
            for version in 1..200_000_u32 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let page = (random >> 16) % PAGES;
                content[index(page)].store(version, Ordering::Relaxed);
                set.mark_data(ram(page));
            }
            finished.store(1, Ordering::Release);
        });
        let mut cursor = LaneCursor::new(0);
        loop {
            let last_pass = finished.load(Ordering::Acquire) == 1;
            let taken = set.take(&mut cursor, 7);
            for page in &taken {
                let slot = index(page.at.page);
                let version = content[slot].load(Ordering::Relaxed);
                assert!(version >= seen[slot], "a page's versions go forward");
                seen[slot] = version;
            }
            if last_pass && taken.is_empty() {
                break;
            }
        }
    });
    let last: Vec<u32> = content.iter().map(|c| c.load(Ordering::Relaxed)).collect();
    assert_eq!(seen, last);
    assert_eq!(set.dirty_pages(), 0);
}

proptest! {
    /// Against a plain set: whatever is marked comes out exactly once, from the lane that owns it.
    #[test]
    fn behaves_like_a_set(
        steps in prop::collection::vec((0_u32..512 * 19 + 45, any::<bool>(), 0_usize..8, 0_usize..100), 1..200)
    ) {
        let set = DirtySet::new(layout());
        let mut model = BTreeSet::new();
        let mut cursors: Vec<_> = (0..LANES).map(LaneCursor::new).collect();
        for (number, zero, lane, max_pages) in steps {
            let at = match number.checked_sub(512 * 19 + 5) {
                Some(page) => PageAddress { block: BlockId(1), page },
                None => ram(number),
            };
            let superseded = if zero { set.mark_zero(at) } else { set.mark_data(at) };
            prop_assert_eq!(superseded, !model.insert(at));
            for page in set.take(&mut cursors[lane], max_pages) {
                prop_assert!(model.remove(&page.at));
                prop_assert_eq!(set.layout().lane_of(page.at), lane);
            }
            prop_assert_eq!(set.dirty_pages(), model.len() as u64);
        }
        for cursor in &mut cursors {
            while set.lane_dirty(cursor.lane()) > 0 {
                for page in set.take(cursor, 64) {
                    prop_assert!(model.remove(&page.at));
                }
            }
        }
        prop_assert!(model.is_empty());
    }
}
