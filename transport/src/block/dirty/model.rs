//! S7 in every interleaving that the memory model allows: `RUSTFLAGS="--cfg model" cargo test -p
//! transport --lib model`.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::{DirtySet, LaneCursor};
use crate::block::{BlockId, BlockSpec, Layout, PageAddress};

const AT: PageAddress = PageAddress {
    block: BlockId(0),
    page: 0,
};

fn one_page() -> DirtySet {
    let block = BlockSpec {
        name: "ram".into(),
        pages: 1,
    };
    let layout = Layout::new(vec![block]).unwrap();
    DirtySet::new(std::sync::Arc::new(layout))
}

/// One take, and the read that follows it; `None` when nothing was dirty.
fn take_and_read(set: &DirtySet, content: &AtomicU32) -> Option<u32> {
    let taken = set.take(&mut LaneCursor::new(0), 1);
    taken.first().map(|_| content.load(Ordering::Relaxed))
}

/// A guest writes twice and each write is marked after it, while the encoder takes and reads: when
/// nothing is dirty any more the encoder has read the last content, and the counters are at zero.
#[test]
fn s7_last_content_is_read_after_its_mark() {
    loom::model(|| {
        let set = Arc::new(one_page());
        let content = Arc::new(AtomicU32::new(0));
        let marker = {
            let (set, content) = (set.clone(), content.clone());
            thread::spawn(move || {
                for version in 1..=2 {
                    content.store(version, Ordering::Relaxed);
                    set.mark_data(AT);
                }
            })
        };
        let mut read = take_and_read(&set, &content);
        marker.join().unwrap();
        if let Some(later) = take_and_read(&set, &content) {
            read = Some(later);
        }
        assert_eq!(read, Some(2), "the last content was never sent");
        assert_eq!((set.dirty_pages(), set.lane_dirty(0)), (0, 0));
    });
}

/// Two markers at once (QEMU's stream and a page that was missed) never lose the mark, and the
/// counters come out even.
#[test]
fn two_markers_lose_nothing() {
    loom::model(|| {
        let set = Arc::new(one_page());
        let content = Arc::new(AtomicU32::new(0));
        let other = {
            let (set, content) = (set.clone(), content.clone());
            thread::spawn(move || {
                content.store(1, Ordering::Relaxed);
                set.mark_data(AT);
            })
        };
        set.mark_data(AT);
        let first = take_and_read(&set, &content);
        other.join().unwrap();
        let last = take_and_read(&set, &content).or(first);
        assert_eq!(last, Some(1), "the write was never sent");
        assert_eq!((set.dirty_pages(), set.lane_dirty(0)), (0, 0));
    });
}
