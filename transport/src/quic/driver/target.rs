//! The target's lanes: each is read in order, decoded, checked, and given to its sink.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Workers, lock, per_lane};
use crate::block::{LANES, LaneDecoder, Layout, Ledger, PageAddress, PageHash, Root, Sink};
use crate::quic::{Connection, LaneReceiver};
use crate::wire::{LaneFramer, LaneItem};

/// Where one lane's pages go. Calls may block: that is the back pressure to the source.
pub trait LaneSink: Sink + Send + 'static {
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
}

impl TargetLanes {
    /// Waits for the source's lanes beside the caller and starts them, one sink each. A lane that
    /// fails says why.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn start<S: LaneSink>(
        connection: Connection,
        layout: &Arc<Layout>,
        key: &[u8; 32],
        source_incarnation: u64,
        workers: &Workers,
        sinks: Vec<S>,
    ) -> std::io::Result<(TargetLanes, mpsc::Receiver<String>)> {
        let (failures, failed) = mpsc::channel(LANES);
        let decoders = per_lane(Ledger::split(layout, key), |part| {
            Ok(Mutex::new(LaneDecoder::new(part, key, source_incarnation)?))
        })?;
        let shared = Arc::new(Shared {
            layout: layout.clone(),
            key: *key,
            decoders,
        });
        let work = run_lanes(connection, shared.clone(), workers.clone(), sinks);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(detail) = work.await {
                let told = failures.send(detail).await;
                tracing::debug!(session = told.is_ok(), "lanes ended");
            }
        });
        Ok((
            TargetLanes {
                shared,
                _tasks: tasks,
            },
            failed,
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
            let applied = apply(&mut lock(&shared.decoders[lane]), item, &mut sink);
            (sink, applied)
        };
        let result = self.workers.run(lane, work).await;
        let (sink, applied) = result.ok_or("a worker thread is gone")?;
        self.sink = Some(sink);
        applied
    }
}

fn apply<S: LaneSink>(
    decoder: &mut LaneDecoder,
    item: LaneItem,
    sink: &mut S,
) -> Result<(), String> {
    let wire_bytes = item.wire_bytes() as u64;
    match item {
        LaneItem::Header(header) => decoder.open(&header).map_err(|error| error.to_string()),
        LaneItem::Batch(body) => {
            decoder
                .apply(&body, sink)
                .map_err(|error| error.to_string())?;
            sink.batch_end(wire_bytes)
                .map_err(|error| error.to_string())
        }
        LaneItem::Mark { barrier } => {
            decoder.ledger_mut().refresh();
            sink.mark(barrier).map_err(|error| error.to_string())
        }
    }
}
