//! One run: every page of the guest to the other end and back to rest.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::{Notify, mpsc};
use transport::block::{
    BatchStats, Contents, CopyIndex, DirtySet, Disable, LANES, PAGE_SIZE, PageAddress, Replica,
    Root, Sink,
};
use transport::quic::driver::{
    Held, LaneEvent, LaneFault, LaneSettings, LaneSink, SourceLanes, TargetLanes, Workers,
};
use transport::quic::{CloseCode, Connection, Endpoint, Identity, Tuning};

use super::guest::{Arrived, Guest, Memory};
use crate::report::cpu_seconds;
use crate::waiting::now;

/// Bytes that may be under way: what a migration may have at most.
const FLIGHT_MAX_BYTES: u64 = 24 << 20;
/// How often the source hears what is applied.
const TELL_INTERVAL: Duration = Duration::from_millis(5);
const COPIES_MAX_BYTES: usize = 16 << 20;
const KEY: [u8; 32] = [7; 32];
const INCARNATION: u64 = 1;

/// The guest, the memory that it goes to, and what the source keeps of what it sent.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) guest: Arc<Guest>,
    arrived: Arc<Memory>,
    replica: Arc<Memory>,
}

impl Pair {
    pub(super) fn of(guest: Guest) -> Pair {
        Pair {
            arrived: Arc::new(guest.0.empty_like()),
            replica: Arc::new(guest.0.empty_like()),
            guest: Arc::new(guest),
        }
    }

    pub(super) fn is_equal(&self) -> bool {
        self.guest.0.is_equal(&self.arrived)
    }
}

/// How to transfer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) level: i32,
    pub(super) disable: Disable,
    pub(super) threads: usize,
}

/// What a run took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Took {
    pub(super) span: Duration,
    pub(super) guest_bytes: u64,
    pub(super) lane_bytes: u64,
    pub(super) cpu_s: f64,
    pub(super) stats: BatchStats,
}

impl Transfer {
    /// The first pass over a guest that the target knows nothing of.
    pub(super) async fn run(&self, pair: &Pair) -> Result<Took> {
        let mut session = self.open(pair).await?;
        let took = session.pass(1).await;
        session.end().await;
        took
    }

    /// A pass before, unmeasured, then `change` and one over all pages again: what did not change
    /// costs nothing.
    pub(super) async fn run_again(&self, pair: &Pair, change: impl FnOnce(&Guest)) -> Result<Took> {
        let mut session = self.open(pair).await?;
        session.pass(1).await?;
        change(&pair.guest);
        let took = session.pass(2).await;
        session.end().await;
        took
    }

    async fn open(&self, pair: &Pair) -> Result<Session> {
        let any = (std::net::Ipv4Addr::LOCALHOST, 0).into();
        let tuning = Tuning::default();
        let listener = Endpoint::bind(any, &Identity::generate()?, &tuning)?;
        let dialer = Endpoint::bind(any, &Identity::generate()?, &tuning)?;
        let (dialled, accepted) =
            tokio::join!(dialer.dial(listener.local_address()?), listener.accept());
        let (to_target, to_source) = (dialled?, accepted?);
        let layout = pair.guest.0.layout.clone();

        let told: Arc<Told> = Arc::default();
        let sinks = (0..LANES)
            .map(|lane| CountingSink {
                lane,
                memory: Arrived(pair.arrived.clone()),
                told: told.clone(),
            })
            .collect();
        let workers = Workers::start(self.threads)?;
        let (target, faults) =
            TargetLanes::start(to_source, &layout, &KEY, INCARNATION, &workers, None, sinks)?;

        let dirty = Arc::new(DirtySet::new(layout.clone()));
        let contents: Arc<dyn Contents> = pair.guest.clone();
        let replica: Arc<dyn Replica> = pair.replica.clone();
        let held = Held {
            replica: Some(replica),
            copies: (!self.disable.copy)
                .then(|| Arc::new(CopyIndex::new(&layout, COPIES_MAX_BYTES))),
            ..Held::default()
        };
        let settings = LaneSettings {
            incarnation: INCARNATION,
            key: KEY,
            level: self.level,
            level_max: self.level,
            disable: self.disable,
        };
        let wake = Arc::new(Notify::new());
        let (source, events) = SourceLanes::start(
            to_target.open_lanes().await?,
            &dirty,
            &contents,
            held,
            &settings,
            Workers::start(self.threads)?,
            wake.clone(),
        )?;
        source.set_budget(FLIGHT_MAX_BYTES);
        Ok(Session {
            dirty,
            wake,
            source,
            events,
            target,
            faults,
            told,
            connection: to_target,
            ends: (dialer, listener),
        })
    }
}

/// Both ends of one connection.
struct Session {
    dirty: Arc<DirtySet>,
    wake: Arc<Notify>,
    source: SourceLanes,
    events: mpsc::Receiver<LaneEvent>,
    target: TargetLanes,
    faults: mpsc::Receiver<LaneFault>,
    told: Arc<Told>,
    connection: Connection,
    ends: (Endpoint, Endpoint),
}

impl Session {
    /// Every page once, until the target has applied all of it.
    async fn pass(&mut self, barrier: u32) -> Result<Took> {
        let (began, cpu) = (now(), cpu_seconds());
        let before = self.source.counters();
        let layout = self.dirty.layout().clone();
        layout.pages().for_each(|at| {
            self.dirty.mark_data(at);
        });
        self.source.flush(barrier);
        self.wake.notify_waiters();
        let root = self.until_applied(barrier).await?;
        let span = now().duration_since(began);
        if self.target.root() != root {
            bail!("the ledgers of the two ends differ");
        }
        let after = self.source.counters();
        Ok(Took {
            span,
            guest_bytes: layout.pages_total() * PAGE_SIZE as u64,
            lane_bytes: after.sent_bytes - before.sent_bytes,
            cpu_s: cpu_seconds()
                .zip(cpu)
                .map_or(0.0, |(after, before)| after - before),
            stats: after.stats.since(&before.stats),
        })
    }

    /// Tells the source what is applied until all lanes have reached the barrier.
    async fn until_applied(&mut self, barrier: u32) -> Result<Root> {
        let lanes = u32::try_from(LANES).context("few lanes")?;
        let mut ticker = tokio::time::interval(TELL_INTERVAL);
        let mut root = None;
        loop {
            tokio::select! {
                event = self.events.recv() => match event.context("the lanes ended")? {
                    LaneEvent::Marked { root: sent, .. } => root = Some(sent),
                    LaneEvent::Failed(detail) => bail!("source: {detail}"),
                },
                fault = self.faults.recv() => match fault.context("the lanes ended")? {
                    LaneFault::Missing(runs) => bail!("references did not resolve: {runs:?}"),
                    LaneFault::Urgent(_) => bail!("urgent pages in a bench"),
                    LaneFault::Failed(detail) => bail!("target: {detail}"),
                },
                _ = ticker.tick() => {
                    self.source.applied(self.told.applied());
                    if let Some(root) = root
                        && self.told.marks.load(Ordering::Acquire) == lanes * barrier
                    {
                        return Ok(root);
                    }
                }
            }
        }
    }

    async fn end(self) {
        self.connection.close(CloseCode::Done, "done");
        let (dialer, listener) = self.ends;
        tokio::join!(dialer.close(), listener.close());
    }
}

/// What the target's lanes have done.
#[derive(Debug, Default)]
struct Told {
    applied: [AtomicU64; LANES],
    marks: AtomicU32,
}

impl Told {
    fn applied(&self) -> [u64; LANES] {
        std::array::from_fn(|lane| self.applied[lane].load(Ordering::Relaxed))
    }
}

/// Memory, and a count of what reached it.
#[derive(Debug)]
struct CountingSink {
    lane: usize,
    memory: Arrived,
    told: Arc<Told>,
}

impl Sink for CountingSink {
    fn zero(&mut self, first: PageAddress, count: u32) -> io::Result<()> {
        self.memory.zero(first, count)
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        self.memory.page(at, content)
    }

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.memory.read(at, into)
    }
}

impl LaneSink for CountingSink {
    fn seed(&mut self, at: PageAddress, content: Option<&[u8; PAGE_SIZE]>) -> io::Result<()> {
        match content {
            Some(content) => self.page(at, content),
            None => self.zero(at, 1),
        }
    }

    fn batch_end(&mut self, wire_bytes: u64) -> io::Result<()> {
        self.told.applied[self.lane].fetch_add(wire_bytes, Ordering::Relaxed);
        Ok(())
    }

    fn mark(&mut self, _: u32) -> io::Result<()> {
        self.told.marks.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
