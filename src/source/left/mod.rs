//! What is left to send, in bytes: for the progress line and its time to go.
//!
//! Pages that QEMU announced as zero cost next to nothing, and in most guests they are the most, behind the
//! others. A page with content costs what those before it did, those of the last few hundred MiB: what
//! single batches cost says little of the rest.

use std::time::{Duration, Instant};

use transport::block::{BatchStats, DirtySet};

use crate::estimate::to_f64;

/// Guess before any page is sent, and for how many pages it counts.
const GUESS_BYTES: f64 = 2048.0;
const GUESS_PAGES: f64 = 512.0;
/// Pages that are remembered: 256 MiB.
const MEMORY_PAGES: f64 = 65_536.0;
/// How often flags are looked at, and in how many ranges: half a million pages.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
const LOOK_RANGES: u32 = 1024;
/// Before this, neither the link's rate nor the first pages' price says anything.
const SOUND_AFTER: Duration = Duration::from_secs(1);

/// An estimate that follows a move.
#[derive(Debug)]
pub(super) struct Left {
    /// Of what is left.
    zero_share: f64,
    began_at: Option<Instant>,
    looked_at: Option<Instant>,
    /// Bytes and pages that are remembered.
    bytes: f64,
    pages: f64,
    /// Totals that are in them.
    seen_bytes: u64,
    seen_pages: u64,
}

impl Left {
    pub(super) fn new() -> Left {
        Left {
            zero_share: 0.0,
            began_at: None,
            looked_at: None,
            bytes: GUESS_BYTES * GUESS_PAGES,
            pages: GUESS_PAGES,
            seen_bytes: 0,
            seen_pages: 0,
        }
    }

    /// Looks at the flags of what is left, where it is time to.
    pub(super) fn look(&mut self, now: Instant, dirty: &DirtySet) {
        self.began_at.get_or_insert(now);
        let is_due = |at| now.duration_since(at) >= LOOK_INTERVAL;
        if self.looked_at.is_none_or(is_due) {
            self.looked_at = Some(now);
            self.zero_share = dirty.zero_share(LOOK_RANGES);
        }
    }

    /// Takes the totals of what was sent.
    pub(super) fn sent(&mut self, bytes: u64, pages: u64) {
        let new_pages = to_f64(pages.saturating_sub(self.seen_pages));
        let new_bytes = to_f64(bytes.saturating_sub(self.seen_bytes));
        let kept = (1.0 - new_pages / MEMORY_PAGES).max(0.0);
        self.pages = self.pages * kept + new_pages;
        self.bytes = self.bytes * kept + new_bytes;
        (self.seen_bytes, self.seen_pages) = (bytes, pages);
    }

    /// Whether enough was seen to speak of time.
    pub(super) fn is_sound(&self, now: Instant) -> bool {
        let since = self.began_at.map(|at| now.duration_since(at));
        since.is_some_and(|since| since >= SOUND_AFTER)
    }

    /// Shortest and longest time to go, in s, where so many bytes are left and the guest may write as many
    /// again.
    pub(super) fn seconds(left_bytes: f64, bytes_per_s: f64) -> Option<(f64, f64)> {
        (bytes_per_s > 1.0).then(|| {
            let least = left_bytes / bytes_per_s;
            (least, 2.0 * least)
        })
    }

    /// Bytes for so many pages.
    pub(super) fn bytes(&self, pages: u64) -> f64 {
        to_f64(pages) * (1.0 - self.zero_share) * self.bytes / self.pages.max(1.0)
    }

    pub(super) fn zero_share(&self) -> f64 {
        self.zero_share
    }
}

/// Pages that were not announced as zero, what the target had included.
pub(super) fn with_content(stats: &BatchStats) -> u64 {
    stats.pages().saturating_sub(stats.zero.pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: &str = include_str!("demo.txt");

    /// What a move of a real guest would have been told: from its second second on the time that it took is
    /// within what is shown, while QEMU's zero pages, three of four, are still to come.
    #[test]
    fn a_recorded_move() {
        let lines = DEMO.lines().filter(|line| !line.starts_with('#'));
        let rows: Vec<Vec<f64>> = lines
            .map(|line| {
                let words = line.split_whitespace();
                words.map(|word| word.parse().expect("a number")).collect()
            })
            .collect();
        let end_ms = rows.last().expect("rows")[0];
        let mut left = Left::new();
        let mut checked = 0;
        for row in &rows {
            let whole = |column: usize| crate::estimate::to_u64(row[column]);
            left.zero_share = row[3];
            left.sent(whole(4), whole(5));
            if !(1_100.0..14_000.0).contains(&row[0]) {
                continue;
            }
            let bytes = left.bytes(whole(1) + whole(2));
            let (least, most) = Left::seconds(bytes, row[6] / 8.0).expect("a rate");
            let took = (end_ms - row[0]) / 1e3;
            // The rate is that of the moment.
            let shown = 0.9 * least..1.1 * most;
            assert!(shown.contains(&took), "{} ms: {shown:?} {took}", row[0]);
            checked += 1;
        }
        assert!(checked > 50, "{checked}");
    }
}
