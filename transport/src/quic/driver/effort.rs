//! How hard the lanes compress: what encoding has taken, and the level that follows from it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use tokio::time::{Duration, Instant};

use super::lock;
use crate::block::{BatchStats, LevelObservation, PAGE_SIZE, approach_level, choose_level};

/// Pages that must have been compressed before the level is looked at again: 2 MiB.
const LOOK_PAGES_MIN: u64 = 512;
/// The link's rate is not known before this.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// The level of all lanes, and what it is chosen from.
#[derive(Debug)]
pub(super) struct Effort {
    began: Instant,
    level: AtomicI32,
    level_max: i32,
    cores: u64,
    /// Time that workers spent on batches, and the bytes of their pages, since the last look.
    encoding_ns: AtomicU64,
    encoded_bytes: AtomicU64,
    /// Totals at the last look.
    looked: Mutex<BatchStats>,
}

impl Effort {
    pub(super) fn new(level: i32, level_max: i32, cores: usize) -> Effort {
        Effort {
            began: Instant::now(),
            level: AtomicI32::new(level),
            level_max,
            cores: cores as u64,
            encoding_ns: AtomicU64::new(0),
            encoded_bytes: AtomicU64::new(0),
            looked: Mutex::default(),
        }
    }

    /// zstd level of the next batches.
    pub(super) fn level(&self) -> i32 {
        self.level.load(Ordering::Relaxed)
    }

    /// Only batches of compressed pages say what compression costs.
    pub(super) fn count(&self, stats: &BatchStats, took: Duration) {
        let pages = stats.literal.pages + stats.raw.pages;
        if pages * 2 > stats.pages() {
            let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            self.encoding_ns.fetch_add(nanos, Ordering::Relaxed);
            self.encoded_bytes
                .fetch_add(pages * PAGE_SIZE as u64, Ordering::Relaxed);
        }
    }

    /// Chooses the level for a link that takes so many bytes per second, from the totals at this
    /// moment. Returns it when it is another one.
    pub(super) fn adapt(&self, link_bytes_per_s: u64, totals: &BatchStats) -> Option<i32> {
        let since = totals.since(&lock(&self.looked));
        let pages = since.literal.pages + since.raw.pages;
        let is_early = self.began.elapsed() < LOOK_AFTER;
        if is_early || pages < LOOK_PAGES_MIN || link_bytes_per_s == 0 {
            return None;
        }
        *lock(&self.looked) = *totals;
        let nanos = self.encoding_ns.swap(0, Ordering::Relaxed);
        let encoded = self.encoded_bytes.swap(0, Ordering::Relaxed);
        let level = self.level();
        let sent_bytes = since.literal.bytes + since.raw.bytes;
        let chosen = choose_level(&LevelObservation {
            level,
            link_bytes_per_s: as_f64(link_bytes_per_s),
            core_bytes_per_s: as_f64(encoded) / as_f64(nanos.max(1)) * 1e9,
            ratio: as_f64(pages * PAGE_SIZE as u64) / as_f64(sent_bytes.max(1)),
            cores: as_f64(self.cores),
            // Time on a crowded core counts as time of the encoder, which is the slower for it.
            busy_cores: 0.0,
        });
        let chosen = approach_level(level, chosen.min(self.level_max));
        self.level.store(chosen, Ordering::Relaxed);
        (chosen != level).then_some(chosen)
    }
}

#[expect(clippy::cast_precision_loss, reason = "estimates need no 53rd bit")]
fn as_f64(value: u64) -> f64 {
    value as f64
}
