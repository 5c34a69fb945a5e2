//! The source's lanes: each takes its dirty pages, encodes them when the budget allows, sends.
//!
//! `lane` is one lane's task; `taken_back` is for pages that were sent in vain, or shall not be sent.

mod lane;
mod taken_back;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::lane::Lane;
use super::effort::Effort;
use super::turn::Turns;
use super::{Basis, Workers, lock, per_lane};
use crate::block::{
    BatchStats, Contents, CopyIndex, DirtySet, Disable, FIRST_SEQ, KnownTable, LANES, LaneCursor,
    LaneEncoder, Ledger, PageAddress, PageHash, Replica, Root, Sources, Taken,
};
use crate::quic::LaneSender;
use crate::wire::limits::BATCH_MAX_PAGES;

/// How lanes encode.
#[derive(Debug, Clone)]
pub struct LaneSettings {
    /// Incarnation of this process, in every lane's header.
    pub incarnation: u64,
    /// The pair's secret.
    pub key: [u8; 32],
    /// zstd level of the first batches.
    pub level: i32,
    /// Highest level that may be chosen.
    pub level_max: i32,
    /// Stages that are switched off.
    pub disable: Disable,
}

/// What the target holds already, and what this side keeps of what it sends.
#[derive(Debug, Clone, Default)]
pub struct Held {
    /// The image as sent: bases of deltas.
    pub replica: Option<Arc<dyn Replica>>,
    /// What both sides agreed on before the first page.
    pub basis: Option<Basis>,
    /// Where content that was sent can be found again; `None` when the target cannot read its image.
    pub copies: Option<Arc<CopyIndex>>,
    /// The target's answers to questions.
    pub known: Option<Arc<KnownTable>>,
}

/// What the session is told.
#[derive(Debug)]
pub enum LaneEvent {
    /// Every lane has sent everything before the barrier, and its mark.
    Marked {
        /// The barrier.
        barrier: u32,
        /// Root over the ledger as sent.
        root: Root,
    },
    /// A lane cannot go on.
    Failed(String),
}

/// Running totals.
#[derive(Debug, Clone, Copy, Default)]
pub struct LaneCounters {
    /// Bytes of batches handed to QUIC.
    pub sent_bytes: u64,
    /// By encoding.
    pub stats: BatchStats,
}

/// The eight lanes of a session at the source.
#[derive(Debug)]
pub struct SourceLanes {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    dirty: Arc<DirtySet>,
    contents: Arc<dyn Contents>,
    held: Held,
    key: [u8; 32],
    encoders: [Mutex<LaneEncoder>; LANES],
    workers: Workers,
    /// Pages were marked, or a barrier was set.
    wake: Arc<Notify>,
    /// The budget has room again.
    room: Notify,
    budget_bytes: AtomicU64,
    /// Bytes per second, 0 for no cap.
    rate_max: AtomicU64,
    /// When the cap lets the next batch go.
    due: Mutex<Instant>,
    sent_bytes: AtomicU64,
    applied_bytes: AtomicU64,
    reserved_bytes: AtomicU64,
    stats: Mutex<BatchStats>,
    effort: Effort,
    /// Batches that are not acknowledged: sent bytes of the lane at the end of each, and its number.
    unacknowledged: [Mutex<VecDeque<(u64, u32)>>; LANES],
    /// Post-copy: no page is taken until it is over; marks are written at once.
    is_held: AtomicBool,
    turns: Turns,
    /// The guest is stopped: nothing may be referred to that a miss would ask for again (S10).
    last_round: AtomicBool,
    barrier: AtomicU32,
    /// The latest barrier of each lane's marks, and the latest that the session was told of.
    marks: [AtomicU32; LANES],
    told: AtomicU32,
    events: mpsc::Sender<LaneEvent>,
}

impl SourceLanes {
    /// Starts the lanes. `wake` is notified by whoever marks pages dirty.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn start(
        senders: Vec<LaneSender>,
        dirty: &Arc<DirtySet>,
        contents: &Arc<dyn Contents>,
        held: Held,
        settings: &LaneSettings,
        workers: Workers,
        wake: Arc<Notify>,
    ) -> std::io::Result<(SourceLanes, mpsc::Receiver<LaneEvent>)> {
        let (events, receiver) = mpsc::channel(LANES * 2);
        let mut parts = Ledger::split(dirty.layout(), &settings.key);
        if let Some(basis) = &held.basis {
            basis.seed(&mut parts, held.copies.as_deref());
        }
        let encoders = per_lane(parts, |part| {
            let mut encoder = LaneEncoder::new(part, &settings.key, FIRST_SEQ, settings.disable)?;
            encoder.set_level(settings.level)?;
            Ok(Mutex::new(encoder))
        })?;
        let effort = Effort::new(settings.level, settings.level_max, workers.count());
        let shared = Arc::new(Shared {
            dirty: dirty.clone(),
            contents: contents.clone(),
            held,
            key: settings.key,
            encoders,
            workers,
            wake,
            room: Notify::new(),
            budget_bytes: AtomicU64::new(1 << 20),
            rate_max: AtomicU64::new(0),
            due: Mutex::new(Instant::now()),
            sent_bytes: AtomicU64::new(0),
            applied_bytes: AtomicU64::new(0),
            reserved_bytes: AtomicU64::new(0),
            stats: Mutex::new(BatchStats::default()),
            effort,
            unacknowledged: std::array::from_fn(|_| Mutex::default()),
            is_held: AtomicBool::new(false),
            turns: Turns::default(),
            last_round: AtomicBool::new(false),
            barrier: AtomicU32::new(0),
            marks: std::array::from_fn(|_| AtomicU32::new(0)),
            told: AtomicU32::new(0),
            events,
        });
        let mut tasks = JoinSet::new();
        for sender in senders {
            let lane = Lane::new(sender, shared.clone());
            tasks.spawn(lane.run(settings.incarnation));
        }
        Ok((
            SourceLanes {
                shared,
                _tasks: tasks,
            },
            receiver,
        ))
    }

    /// The target's running totals of applied bytes; returns their sum. Never runs backwards.
    pub fn applied(&self, bytes: [u64; LANES]) -> u64 {
        let total = bytes
            .iter()
            .fold(0_u64, |sum, lane| sum.saturating_add(*lane));
        let total = total.min(self.shared.sent_bytes.load(Ordering::Relaxed));
        self.shared
            .applied_bytes
            .fetch_max(total, Ordering::Relaxed);
        self.shared.room.notify_waiters();
        if let Some(copies) = &self.shared.held.copies {
            for (lane, applied) in bytes.into_iter().enumerate() {
                let mut waiting = lock(&self.shared.unacknowledged[lane]);
                while let Some((end, seq)) = waiting.front().copied()
                    && end <= applied
                {
                    copies.acknowledge(lane, seq);
                    waiting.pop_front();
                }
            }
        }
        total
    }

    /// The guest is stopped: from here on references stay within their batch (S10).
    pub fn begin_last_round(&self) {
        self.shared.last_round.store(true, Ordering::Relaxed);
    }

    /// Post-copy: lanes take no more pages until [`resume`](Self::resume); what they took goes out.
    pub fn hold(&self) {
        self.shared.is_held.store(true, Ordering::Release);
    }

    /// Post-copy: dirty pages go in this order from here on; held lanes send the first `early` of them.
    pub fn set_order(&self, order: &[PageAddress], early: usize) {
        self.shared.turns.set(order, early, &self.shared.dirty);
        self.shared.wake.notify_waiters();
    }

    /// Post-copy: what is dirty goes on.
    pub fn resume(&self) {
        self.shared.is_held.store(false, Ordering::Release);
        self.shared.wake.notify_waiters();
    }

    /// Bytes that may be under way and not applied.
    pub fn set_budget(&self, bytes: u64) {
        self.shared.budget_bytes.store(bytes, Ordering::Relaxed);
        self.shared.room.notify_waiters();
    }

    /// Caps what all lanes together hand to QUIC, in bytes per second.
    pub fn set_rate_max(&self, bytes_per_s: Option<u64>) {
        self.shared
            .rate_max
            .store(bytes_per_s.unwrap_or(0), Ordering::Relaxed);
    }

    /// Makes every lane send what is dirty, then the barrier's mark.
    pub fn flush(&self, barrier: u32) {
        self.begin_last_round();
        self.shared.barrier.store(barrier, Ordering::Release);
        self.shared.wake.notify_waiters();
    }

    /// Chooses the level for a link that takes so many bytes per second, from what encoding has taken
    /// since the last call. Returns it when it is another one.
    pub fn adapt_level(&self, link_bytes_per_s: u64) -> Option<i32> {
        let totals = self.counters().stats;
        self.shared.effort.adapt(link_bytes_per_s, &totals)
    }

    /// Totals so far.
    #[must_use]
    pub fn counters(&self) -> LaneCounters {
        LaneCounters {
            sent_bytes: self.shared.sent_bytes.load(Ordering::Relaxed),
            stats: *lock(&self.shared.stats),
        }
    }

    /// Shows every page that QEMU announced with its hash as sent. Locks lane by lane: for when they rest.
    pub fn for_each_announced(&self) -> impl FnOnce(&mut dyn FnMut(PageAddress, PageHash)) + use<> {
        let shared = self.shared.clone();
        move |show| {
            for encoder in &shared.encoders {
                for (at, hash) in lock(encoder).ledger().iter_announced() {
                    show(at, hash);
                }
            }
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("held", &self.held)
            .field("sent_bytes", &self.sent_bytes)
            .field("applied_bytes", &self.applied_bytes)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// What an encoder may draw on at this moment.
    fn sources(&self) -> Sources<'_> {
        let may_refer = !self.last_round.load(Ordering::Relaxed);
        Sources {
            contents: &*self.contents,
            replica: self.held.replica.as_deref(),
            copies: self.held.copies.as_deref().filter(|_| may_refer),
            known: self.held.known.as_deref().filter(|_| may_refer),
        }
    }

    /// What a lane sends next.
    fn take(&self, cursor: &mut LaneCursor) -> Vec<Taken> {
        let is_held = self.is_held.load(Ordering::Acquire);
        let first = self
            .turns
            .take(cursor.lane(), is_held, &self.dirty, BATCH_MAX_PAGES);
        if is_held || !first.is_empty() {
            return first;
        }
        self.dirty.take(cursor, BATCH_MAX_PAGES)
    }

    fn root(&self) -> Root {
        let guards: [MutexGuard<'_, LaneEncoder>; LANES] =
            std::array::from_fn(|lane| lock(&self.encoders[lane]));
        let parts = std::array::from_fn(|lane| guards[lane].ledger());
        Ledger::root(self.dirty.layout(), &parts, &self.key)
    }
}
