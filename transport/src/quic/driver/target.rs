//! The target's lanes: each is read in order, decoded, checked, and given to its sink.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Basis, Workers, lock, per_lane};
use crate::block::{
    AbsentPages, LANES, LaneDecoder, Layout, Ledger, PAGE_SIZE, PageAddress, PageHash, PageHasher,
    PageRun, Root, Sink, Urgent,
};
use crate::quic::{Connection, LaneReceiver};
use crate::wire::{Frame, FrameReader, LaneFramer, LaneItem};

/// Where one lane's pages go. Calls may block: that is the back pressure to the source.
pub trait LaneSink: Sink + Send + 'static {
    /// A page of the basis, `None` for zero: only the guest needs it, the replica has it.
    ///
    /// # Errors
    /// When the guest's side has ended.
    fn seed(&mut self, at: PageAddress, content: Option<&[u8; PAGE_SIZE]>) -> std::io::Result<()>;
    /// The batch is whole; it took so many bytes on the lane.
    ///
    /// # Errors
    /// When the guest's side has ended.
    fn batch_end(&mut self, wire_bytes: u64) -> std::io::Result<()>;
    /// The lane has reached this barrier.
    ///
    /// # Errors
    /// When the guest's side has ended.
    fn mark(&mut self, barrier: u32) -> std::io::Result<()>;
}

/// What the session is told.
#[derive(Debug)]
pub enum LaneFault {
    /// References of a batch did not resolve: its pages must come again.
    Missing(Vec<PageRun>),
    /// Pages that the guest waits for (post-copy).
    Urgent(Urgent),
    /// A lane cannot go on.
    Failed(String),
}

/// The eight lanes of a session at the target.
#[derive(Debug)]
pub struct TargetLanes {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    layout: Arc<Layout>,
    key: [u8; 32],
    decoders: [Mutex<LaneDecoder>; LANES],
    /// Pages that did not resolve, with their version when they did not.
    missing: [Mutex<Vec<(PageAddress, u32)>>; LANES],
    faults: mpsc::Sender<LaneFault>,
}

impl TargetLanes {
    /// Puts the basis into the guest, waits for the source's lanes beside the caller and starts
    /// them, one sink each. A lane that fails says why.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn start<S: LaneSink>(
        connection: Connection,
        layout: &Arc<Layout>,
        key: &[u8; 32],
        source_incarnation: u64,
        workers: &Workers,
        basis: Option<Basis>,
        sinks: Vec<S>,
    ) -> std::io::Result<(TargetLanes, mpsc::Receiver<LaneFault>)> {
        let (faults, found) = mpsc::channel(LANES);
        let mut parts = Ledger::split(layout, key);
        if let Some(basis) = &basis {
            basis.seed(&mut parts, None);
        }
        let decoders = per_lane(parts, |part| {
            Ok(Mutex::new(LaneDecoder::new(part, key, source_incarnation)?))
        })?;
        let shared = Arc::new(Shared {
            layout: layout.clone(),
            key: *key,
            decoders,
            missing: std::array::from_fn(|_| Mutex::default()),
            faults: faults.clone(),
        });
        let (of_lanes, workers) = (shared.clone(), workers.clone());
        let work = async move {
            let sinks = seed_all(basis, of_lanes.key, &workers, sinks).await?;
            run_lanes(connection, of_lanes, workers, sinks).await
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(detail) = work.await {
                let told = faults.send(LaneFault::Failed(detail)).await;
                tracing::debug!(session = told.is_ok(), "lanes ended");
            }
        });
        Ok((
            TargetLanes {
                shared,
                _tasks: tasks,
            },
            found,
        ))
    }

    /// Root over the ledger as applied: for when all lanes have reached a barrier.
    #[must_use]
    pub fn root(&self) -> Root {
        let guards: [MutexGuard<'_, LaneDecoder>; LANES] =
            std::array::from_fn(|lane| lock(&self.shared.decoders[lane]));
        let parts = std::array::from_fn(|lane| guards[lane].ledger());
        Ledger::root(&self.shared.layout, &parts, &self.shared.key)
    }

    /// Pages that did not resolve and have not come again.
    #[must_use]
    pub fn missing_pages(&self) -> u64 {
        let mut pages = 0;
        for (decoder, missing) in self.shared.decoders.iter().zip(&self.shared.missing) {
            let decoder = lock(decoder);
            let mut missing = lock(missing);
            missing.retain(|(at, version)| {
                let now = decoder.ledger().get(*at);
                now.is_none_or(|(_, now)| now <= *version)
            });
            pages += missing.len() as u64;
        }
        pages
    }

    /// Post-copy: pages that come later are left out of the ledger. Returns the root over the rest.
    #[must_use]
    pub fn leave_out(&self, absent: &AbsentPages) -> Root {
        absent.for_each(&mut |at| {
            let lane = self.shared.layout.lane_of(at);
            lock(&self.shared.decoders[lane]).ledger_mut().forget(at);
        });
        self.root()
    }

    /// Shows every announced page with its hash as applied. Locks lane by lane: for when they rest.
    pub fn for_each_announced(&self) -> impl FnOnce(&mut dyn FnMut(PageAddress, PageHash)) + use<> {
        let shared = self.shared.clone();
        move |show| {
            for decoder in &shared.decoders {
                for (at, hash) in lock(decoder).ledger().iter() {
                    show(at, hash);
                }
            }
        }
    }
}

/// Pages of the basis that reach the guest in one go.
const SEED_PAGES: usize = 64;

/// Puts the agreed ranges into the guest, every lane's sink on its worker. All of them are there
/// before the first batch: a copy may name any lane's page.
async fn seed_all<S: LaneSink>(
    basis: Option<Basis>,
    key: [u8; 32],
    workers: &Workers,
    sinks: Vec<S>,
) -> Result<Vec<S>, String> {
    let Some(basis) = basis else { return Ok(sinks) };
    let zero = PageHasher::new(&key).zero();
    let mut lanes = JoinSet::new();
    for (lane, mut sink) in sinks.into_iter().enumerate() {
        let (basis, workers) = (basis.clone(), workers.clone());
        lanes.spawn(async move {
            let work = move || (seed(&basis, lane, zero, &mut sink), sink);
            (lane, workers.run(lane, work).await)
        });
    }
    let mut seeded = Vec::with_capacity(LANES);
    while let Some(joined) = lanes.join_next().await {
        let (lane, result) = joined.map_err(|error| error.to_string())?;
        let (result, sink) = result.ok_or("a worker thread is gone")?;
        result.map_err(|error| format!("the basis cannot be written: {error}"))?;
        seeded.push((lane, sink));
    }
    seeded.sort_by_key(|(lane, _)| *lane);
    Ok(seeded.into_iter().map(|(_, sink)| sink).collect())
}

fn seed<S: LaneSink>(
    basis: &Basis,
    lane: usize,
    zero: PageHash,
    sink: &mut S,
) -> std::io::Result<()> {
    let lanes = crate::block::length_u32(LANES);
    let mut content = [0; PAGE_SIZE];
    let mut pages = 0;
    for range in basis.agreed() {
        if crate::block::index(range % lanes) != lane {
            continue;
        }
        for (at, hash) in basis.hashes.pages(range) {
            if hash == zero {
                sink.seed(at, None)?;
            } else {
                basis.replica.read(at, &mut content)?;
                sink.seed(at, Some(&content))?;
                pages += 1;
            }
            if pages == SEED_PAGES {
                pages = 0;
                sink.batch_end(0)?;
            }
        }
    }
    sink.batch_end(0)
}

/// Runs all lanes until the first one fails; the others end with it.
async fn run_lanes<S: LaneSink>(
    connection: Connection,
    shared: Arc<Shared>,
    workers: Workers,
    sinks: Vec<S>,
) -> Result<(), String> {
    let receivers = connection
        .accept_lanes()
        .await
        .map_err(|error| error.to_string())?;
    let mut lanes = JoinSet::new();
    lanes.spawn(run_urgent(connection, shared.faults.clone()));
    for (receiver, sink) in receivers.into_iter().zip(sinks) {
        let lane = Lane {
            index: receiver.index(),
            sink: Some(sink),
            receiver,
            shared: shared.clone(),
            workers: workers.clone(),
        };
        lanes.spawn(lane.run());
    }
    match lanes.join_next().await {
        Some(Ok(ended)) => ended,
        Some(Err(error)) => Err(error.to_string()),
        None => Err("the source opened no lanes".into()),
    }
}

/// Reads urgent pages, if the source opens that stream.
async fn run_urgent(connection: Connection, faults: mpsc::Sender<LaneFault>) -> Result<(), String> {
    let accepted = connection.accept_urgent().await;
    let mut receiver = accepted.map_err(|error| error.to_string())?;
    let mut reader = FrameReader::new();
    loop {
        let bytes = receiver.recv().await.map_err(|error| error.to_string())?;
        let Some(bytes) = bytes else {
            // Nothing is urgent any more; the lanes go on.
            return std::future::pending().await;
        };
        reader.push(&bytes);
        while let Some(frame) = reader.next_frame().map_err(|error| error.to_string())? {
            let Frame::Urgent { digest, runs, data } = frame else {
                return Err(format!("{} on the urgent stream", frame.name()));
            };
            let urgent = LaneFault::Urgent(Urgent { digest, runs, data });
            let told = faults.send(urgent).await;
            told.map_err(|_| "the session has ended")?;
        }
    }
}

struct Lane<S> {
    index: usize,
    receiver: LaneReceiver,
    sink: Option<S>,
    shared: Arc<Shared>,
    workers: Workers,
}

impl<S: LaneSink> Lane<S> {
    async fn run(mut self) -> Result<(), String> {
        let mut framer = LaneFramer::new();
        loop {
            let bytes = self
                .receiver
                .recv()
                .await
                .map_err(|error| error.to_string())?;
            let Some(bytes) = bytes else {
                return Err("the source ended a lane".into());
            };
            framer.push(&bytes);
            while let Some(item) = framer.next_item().map_err(|error| error.to_string())? {
                self.item(item).await?;
            }
        }
    }

    /// The sink goes to the worker and comes back, so a lane has one item under way at a time.
    async fn item(&mut self, item: LaneItem) -> Result<(), String> {
        let mut sink = self.sink.take().ok_or("the lane has failed already")?;
        let shared = self.shared.clone();
        let lane = self.index;
        let work = move || {
            let mut decoder = lock(&shared.decoders[lane]);
            let applied = apply(&mut decoder, item, &mut sink);
            if let Ok(missing) = &applied {
                note_missing(missing, &decoder, &shared.missing[lane]);
            }
            (sink, applied)
        };
        let result = self.workers.run(lane, work).await;
        let (sink, applied) = result.ok_or("a worker thread is gone")?;
        self.sink = Some(sink);
        let missing = applied?;
        if !missing.is_empty() {
            let told = self.shared.faults.send(LaneFault::Missing(missing)).await;
            told.map_err(|_| "the session has ended")?;
        }
        Ok(())
    }
}

fn note_missing(runs: &[PageRun], decoder: &LaneDecoder, missing: &Mutex<Vec<(PageAddress, u32)>>) {
    let mut missing = lock(missing);
    for run in runs {
        for page in run.first.page..run.first.page + u32::from(run.count) {
            let at = PageAddress { page, ..run.first };
            let version = decoder.ledger().get(at).map_or(0, |(_, version)| version);
            missing.push((at, version));
        }
    }
}

fn apply<S: LaneSink>(
    decoder: &mut LaneDecoder,
    item: LaneItem,
    sink: &mut S,
) -> Result<Vec<PageRun>, String> {
    let wire_bytes = item.wire_bytes() as u64;
    let mut missing = Vec::new();
    match item {
        LaneItem::Header(header) => decoder.open(&header).map_err(|error| error.to_string())?,
        LaneItem::Batch(body) => {
            missing = decoder
                .apply(&body, sink)
                .map_err(|error| error.to_string())?
                .missing;
            sink.batch_end(wire_bytes)
                .map_err(|error| error.to_string())?;
        }
        LaneItem::Mark { barrier } => {
            decoder.ledger_mut().refresh();
            sink.mark(barrier).map_err(|error| error.to_string())?;
        }
    }
    Ok(missing)
}
