//! Which pages of a lane have their turn before all others (post-copy).
//!
//! ```text
//! early   go out although lanes are held: with the stop
//! later   when lanes go on, before the walk in the order of addresses
//! ```

use std::collections::VecDeque;
use std::sync::Mutex;

use super::lock;
use crate::block::{DirtySet, LANES, PageAddress, Taken};

type Queues = [Mutex<VecDeque<PageAddress>>; LANES];

/// Pages in their order, lane by lane. One that is not dirty any more has gone another way.
#[derive(Debug, Default)]
pub(super) struct Turns {
    early: Queues,
    later: Queues,
}

impl Turns {
    /// Sets the order: the first `early` pages of it go although lanes are held.
    pub(super) fn set(&self, order: &[PageAddress], early: usize, dirty: &DirtySet) {
        let (first, rest) = order.split_at(early.min(order.len()));
        for (pages, queues) in [(first, &self.early), (rest, &self.later)] {
            queues.iter().for_each(|queue| lock(queue).clear());
            for at in pages {
                lock(&queues[dirty.layout().lane_of(*at)]).push_back(*at);
            }
        }
    }

    /// Whether a held lane has pages to send.
    pub(super) fn has_early(&self, lane: usize) -> bool {
        !lock(&self.early[lane]).is_empty()
    }

    /// Takes the next pages, in the order of their addresses; none when all have had their turn.
    pub(super) fn take(
        &self,
        lane: usize,
        is_held: bool,
        dirty: &DirtySet,
        max_pages: usize,
    ) -> Vec<Taken> {
        let mut taken = Vec::new();
        for queue in [Some(&self.early), Some(&self.later).filter(|_| !is_held)] {
            let Some(queue) = queue else { continue };
            let mut queue = lock(&queue[lane]);
            while taken.len() < max_pages
                && let Some(at) = queue.pop_front()
            {
                taken.extend(dirty.take_page(at));
            }
        }
        taken.sort_unstable_by_key(|page| page.at);
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::block::{BlockId, BlockSpec, Layout};

    /// Early pages go while lanes are held, the others later; what is clean has gone already.
    #[test]
    fn held_lanes_send_early_pages() {
        let name = "ram".into();
        let layout = Layout::new(vec![BlockSpec { name, pages: 512 }]).unwrap();
        let dirty = DirtySet::new(Arc::new(layout));
        let order = [9, 3, 400, 7].map(|page| PageAddress {
            block: BlockId(0),
            page,
        });
        for at in order {
            dirty.mark_data(at);
        }
        let turns = Turns::default();
        turns.set(&order, 2, &dirty);
        let pages = |is_held, max| -> Vec<u32> {
            let taken = turns.take(0, is_held, &dirty, max);
            taken.iter().map(|page| page.at.page).collect()
        };
        assert!(turns.has_early(0) && !turns.has_early(1));
        assert_eq!(pages(true, 64), [3, 9]);
        assert!(!turns.has_early(0));
        assert!(pages(true, 64).is_empty());
        dirty.take_page(order[3]);
        assert_eq!(pages(false, 1), [400]);
        assert!(pages(false, 64).is_empty());
        assert_eq!(dirty.dirty_pages(), 0);
    }
}
