//! Pages that leave the ledger again: those that the target misses go once more, those that post-copy
//! leaves behind are named.

use super::{SourceLanes, lock};
use crate::block::{AbsentRange, PageAddress, PageHasher, PageRun, RANGE_PAGES, Root};

impl SourceLanes {
    /// References of the target's did not resolve: these pages go again, as if never sent.
    ///
    /// # Errors
    /// When the target names pages that do not exist.
    pub fn missing(&self, runs: &[PageRun]) -> Result<(), String> {
        let shared = &self.shared;
        let layout = shared.dirty.layout();
        let zero = PageHasher::new(&shared.key).zero();
        for run in runs {
            let last = run
                .first
                .page
                .checked_add(u32::from(run.count).saturating_sub(1));
            let is_sound = last.is_some_and(|page| {
                let last = PageAddress { page, ..run.first };
                layout.contains(run.first)
                    && layout.contains(last)
                    && run.first.page / RANGE_PAGES == page / RANGE_PAGES
            });
            if !is_sound {
                return Err(format!(
                    "the target misses {run:?}, which is no run of pages"
                ));
            }
            // Pages are taken under this lock too: what is clean here is in the ledger.
            let mut encoder = lock(&shared.encoders[layout.lane_of(run.first)]);
            for offset in 0..u32::from(run.count) {
                let at = PageAddress {
                    page: run.first.page + offset,
                    ..run.first
                };
                let sent = encoder.ledger().get(at);
                encoder.ledger_mut().forget(at);
                if let Some(copies) = &shared.held.copies {
                    copies.forget(at);
                }
                if let Some((hash, _)) = sent {
                    shared.dirty.mark_again(at, hash == zero);
                }
            }
        }
        shared.wake.notify_waiters();
        Ok(())
    }

    /// Post-copy, when all lanes are held and marked: what is dirty is left out of the ledger. Returns
    /// the ranges with such pages and the root over the rest.
    #[must_use]
    pub fn leave_out_dirty(&self) -> (Vec<AbsentRange>, Root) {
        let shared = &self.shared;
        let layout = shared.dirty.layout();
        let mut absent = Vec::new();
        for range in 0..layout.ranges_total() {
            let Some(dirty) = shared.dirty.absent(range) else {
                continue;
            };
            let span = layout.range(range);
            let mut encoder = lock(&shared.encoders[layout.lane_of(span.first)]);
            for page in dirty.pages_of(&span) {
                encoder.ledger_mut().forget(page);
                if let Some(copies) = &shared.held.copies {
                    copies.forget(page);
                }
            }
            absent.push(dirty);
        }
        (absent, shared.root())
    }
}
