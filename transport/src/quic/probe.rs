//! The lanes of a probe: filler at the source, counted and dropped at the target.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{LaneReceiver, LaneSender};
use crate::block::LANES;

/// Filler that is handed to a lane at once: short, so that a cap is kept from the first piece on.
const PIECE_BYTES: usize = 16 * 1024;
/// How often capped filler gets more.
const REFILL: Duration = Duration::from_millis(20);
/// Pieces that capped filler may have saved up.
const SAVED_MAX: usize = 64;

/// Fills all lanes until it is dropped.
#[derive(Debug)]
pub struct Filler {
    _tasks: JoinSet<()>,
}

impl Filler {
    /// Begins; `bytes_max` is what all lanes together send at most, `bytes_per_s_max` how fast.
    #[must_use]
    pub fn start(lanes: Vec<LaneSender>, bytes_max: u64, bytes_per_s_max: Option<u64>) -> Filler {
        let mut tasks = JoinSet::new();
        let piece = Bytes::from(vec![0; PIECE_BYTES]);
        let left = Arc::new(AtomicU64::new(bytes_max));
        let allowed = bytes_per_s_max.map(|_| Arc::new(Semaphore::new(0)));
        for mut lane in lanes {
            let (piece, left, allowed) = (piece.clone(), left.clone(), allowed.clone());
            tasks.spawn(async move {
                while take(&left, PIECE_BYTES as u64) {
                    if let Some(allowed) = &allowed {
                        match allowed.acquire().await {
                            Ok(permit) => permit.forget(),
                            Err(_) => return,
                        }
                    }
                    if lane.send(piece.clone()).await.is_err() {
                        return;
                    }
                }
                // The stream's end would be the target's: it waits for the source to close.
                std::future::pending::<()>().await;
            });
        }
        if let (Some(rate), Some(allowed)) = (bytes_per_s_max, allowed) {
            tasks.spawn(refill(rate, allowed));
        }
        Filler { _tasks: tasks }
    }
}

fn take(left: &AtomicU64, bytes: u64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        left.checked_sub(bytes)
    })
    .is_ok()
}

/// Gives one permit for each piece that the rate allows.
async fn refill(bytes_per_s: u64, allowed: Arc<Semaphore>) {
    let mut ticks = tokio::time::interval(REFILL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let per_tick = bytes_per_s / 50;
    let mut saved = 0;
    loop {
        ticks.tick().await;
        saved += per_tick;
        let pieces = usize::try_from(saved / PIECE_BYTES as u64).unwrap_or(SAVED_MAX);
        saved %= PIECE_BYTES as u64;
        let room = SAVED_MAX.saturating_sub(allowed.available_permits());
        allowed.add_permits(pieces.min(room));
    }
}

/// Counts what comes on the lanes, and drops it, until it is dropped itself.
#[derive(Debug)]
pub struct Drain {
    counts: Arc<[AtomicU64; LANES]>,
    _tasks: JoinSet<()>,
}

impl Drain {
    /// Begins with the lanes as they were accepted.
    #[must_use]
    pub fn start(lanes: Vec<LaneReceiver>) -> Drain {
        let counts: Arc<[AtomicU64; LANES]> = Arc::default();
        let mut tasks = JoinSet::new();
        for mut lane in lanes {
            let counts = counts.clone();
            tasks.spawn(async move {
                let place = lane.index();
                while let Ok(Some(bytes)) = lane.recv().await {
                    if let Some(count) = counts.get(place) {
                        count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                }
            });
        }
        Drain {
            counts,
            _tasks: tasks,
        }
    }

    /// Bytes of each lane so far.
    #[must_use]
    pub fn counts(&self) -> [u64; LANES] {
        std::array::from_fn(|lane| self.counts[lane].load(Ordering::Relaxed))
    }
}
