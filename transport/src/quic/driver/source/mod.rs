//! The source's lanes: each takes its dirty pages, encodes them when the budget allows, sends.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, sleep_until};

use super::effort::Effort;
use super::turn::Turns;
use super::{Basis, Workers, lock, per_lane};
use crate::block::{
    AbsentRange, BatchStats, Contents, CopyIndex, DirtySet, Disable, FIRST_SEQ, KnownTable, LANES,
    LaneCursor, LaneEncoder, Ledger, PageAddress, PageHash, PageHasher, PageRun, RANGE_PAGES,
    Replica, Root, Sources, Taken,
};
use crate::quic::LaneSender;
use crate::wire::limits::{BATCH_MAX_BYTES, BATCH_MAX_PAGES};
use crate::wire::put_mark;

/// What a lane will roughly add to the flight while it is being encoded.
const RESERVE_BYTES: u64 = 64 * 1024;

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
            let lane = Lane {
                index: sender.index(),
                sender,
                shared: shared.clone(),
                cursor: None,
                marked: 0,
                lane_bytes: 0,
            };
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

struct Lane {
    index: usize,
    sender: LaneSender,
    shared: Arc<Shared>,
    cursor: Option<LaneCursor>,
    marked: u32,
    /// Bytes of batches so far.
    lane_bytes: u64,
}

impl Lane {
    async fn run(mut self, incarnation: u64) {
        if let Err(detail) = self.send_all(incarnation).await {
            let told = self.shared.events.send(LaneEvent::Failed(detail)).await;
            tracing::debug!(lane = self.index, session = told.is_ok(), "lane ended");
        }
    }

    async fn send_all(&mut self, incarnation: u64) -> Result<(), String> {
        let mut header = BytesMut::new();
        lock(&self.shared.encoders[self.index])
            .header(incarnation)
            .put(&mut header);
        self.send(header).await?;
        loop {
            let shared = self.shared.clone();
            let mut woken = std::pin::pin!(shared.wake.notified());
            // Registered before the look, so that no wake between look and wait is lost.
            woken.as_mut().enable();
            let barrier = shared.barrier.load(Ordering::Acquire);
            let may_take = !shared.is_held.load(Ordering::Acquire);
            let has_pages = shared.turns.has_early(self.index)
                || may_take && shared.dirty.lane_dirty(self.index) > 0;
            if has_pages {
                self.batch().await?;
            } else if barrier > self.marked {
                self.mark(barrier).await?;
            } else {
                woken.await;
            }
        }
    }

    async fn batch(&mut self) -> Result<(), String> {
        self.reserve().await;
        let shared = self.shared.clone();
        let lane = self.index;
        let mut cursor = self.cursor.take().unwrap_or_else(|| LaneCursor::new(lane));
        let work = move || {
            let mut out = BytesMut::with_capacity(BATCH_MAX_BYTES / 2);
            let mut encoder = lock(&shared.encoders[lane]);
            let taken = shared.take(&mut cursor);
            let level = encoder.set_level(shared.effort.level());
            let began = Instant::now();
            let encoded = level.and_then(|()| encoder.encode(&taken, &shared.sources(), &mut out));
            if let Ok(stats) = &encoded {
                shared.effort.count(stats, began.elapsed());
            }
            let last_seq = encoder.last_seq();
            (cursor, out, encoded, last_seq)
        };
        let result = self.shared.workers.run(lane, work).await;
        self.shared
            .reserved_bytes
            .fetch_sub(RESERVE_BYTES, Ordering::Relaxed);
        let (cursor, out, encoded, last_seq) = result.ok_or("a worker thread is gone")?;
        self.cursor = Some(cursor);
        let stats = encoded.map_err(|error| format!("a page could not be encoded: {error}"))?;
        *lock(&self.shared.stats) += stats;
        self.shared
            .sent_bytes
            .fetch_add(out.len() as u64, Ordering::Relaxed);
        if out.is_empty() {
            return Ok(());
        }
        self.lane_bytes += out.len() as u64;
        if self.shared.held.copies.is_some() {
            lock(&self.shared.unacknowledged[lane]).push_back((self.lane_bytes, last_seq));
        }
        self.pace(out.len()).await;
        self.send(out).await
    }

    /// Waits until the rate cap lets so many bytes go.
    async fn pace(&self, bytes: usize) {
        let rate = self.shared.rate_max.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let nanos = (bytes as u64).saturating_mul(1_000_000_000) / rate;
        let at = {
            let mut due = lock(&self.shared.due);
            let at = (*due).max(Instant::now());
            *due = at + Duration::from_nanos(nanos);
            at
        };
        sleep_until(at).await;
    }

    /// Waits until the flight has room, then counts this lane's batch in.
    async fn reserve(&self) {
        let shared = &self.shared;
        loop {
            let mut room = std::pin::pin!(shared.room.notified());
            room.as_mut().enable();
            let sent = shared.sent_bytes.load(Ordering::Relaxed);
            let flight = sent.saturating_sub(shared.applied_bytes.load(Ordering::Relaxed))
                + shared.reserved_bytes.load(Ordering::Relaxed);
            if flight < shared.budget_bytes.load(Ordering::Relaxed) {
                shared
                    .reserved_bytes
                    .fetch_add(RESERVE_BYTES, Ordering::Relaxed);
                return;
            }
            room.await;
        }
    }

    async fn mark(&mut self, barrier: u32) -> Result<(), String> {
        let mut out = BytesMut::new();
        put_mark(&mut out, barrier);
        self.send(out).await?;
        self.marked = barrier;
        lock(&self.shared.encoders[self.index])
            .ledger_mut()
            .refresh();
        self.shared.marks[self.index].store(barrier, Ordering::Release);
        let marks = self.shared.marks.iter();
        let reached = marks.map(|mark| mark.load(Ordering::Acquire)).min();
        if let Some(barrier) = reached
            && self.shared.told.fetch_max(barrier, Ordering::AcqRel) < barrier
        {
            let root = self.shared.root();
            let event = LaneEvent::Marked { barrier, root };
            self.shared
                .events
                .send(event)
                .await
                .map_err(|_| "the session has ended")?;
        }
        Ok(())
    }

    async fn send(&mut self, bytes: BytesMut) -> Result<(), String> {
        self.sender
            .send(bytes.freeze())
            .await
            .map_err(|error| error.to_string())
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
