//! The side whose guest lacks pages: QEMU says which, on a new stream; they are fed as they come.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use qemu_glue::qmp::{MigrationStatus, QmpError};
use tokio::sync::mpsc;
use transport::block::{AbsentPages, PageRun};
use transport::quic::driver::{LaneFault, TargetLanes, Workers};
use transport::wire::limits::{ABSENT_MAX_RANGES, MISSING_MAX_RUNS};
use transport::wire::{Frame, Purpose, Verdict};

use super::Resumed;
use crate::feed::{Elsewhere, Fed, Feeder, Filling};
use crate::peer::{Peer, send_frame};
use crate::target::{Lacking, PostCopy, sinks, urgent_failed};
use crate::waiting::next;

const MEET_INTERVAL: Duration = Duration::from_secs(1);
/// How often the source hears what is applied.
const TICK: Duration = Duration::from_millis(20);
/// A main loop that waits for a page does not answer; any other does within this.
const PROMPT_MAX: Duration = Duration::from_secs(1);
/// Looks at QEMU until it has noticed that its stream broke, or that it is complete.
const LOOKS_MAX: u32 = 1000;
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Feeds QEMU until it has every page, and returns the connection on which the source is to hear it;
/// `None` when it had all of them already.
pub(crate) async fn fill(resumed: &Resumed<'_>, socket: &Path) -> anyhow::Result<Option<Peer>> {
    if socket.exists() {
        std::fs::remove_file(socket)?;
    }
    if !recovers(resumed, socket).await? {
        return Ok(None);
    }
    let stream = UnixStream::connect(socket)?;
    let absent = Arc::new(AbsentPages::new(resumed.layout.clone()));
    let filling = Filling {
        absent,
        faults: Arc::default(),
    };
    let (layout, of_feeder) = (resumed.layout.clone(), filling.clone());
    let again = move || Feeder::start_again(stream, layout.blocks(), of_feeder);
    let (feeder, mut fed) = tokio::task::spawn_blocking(again).await??;
    tracing::info!(pages = filling.absent.left(), "QEMU lacks");
    let mut complete = false;
    loop {
        let mut peer = match resumed.door.meet(resumed.me, Purpose::Settle).await {
            Ok(peer) => peer,
            Err(error) => {
                tracing::info!("the source is not reached: {error:#}");
                tokio::time::sleep(MEET_INTERVAL).await;
                continue;
            }
        };
        match serve(
            resumed,
            &feeder,
            &filling,
            (&mut fed, &mut complete),
            &mut peer,
        )
        .await
        {
            Ok(()) => return Ok(Some(peer)),
            Err(Lost::Link(detail)) => tracing::info!("pages are still lacking: {detail}"),
            Err(Lost::Qemu(detail)) => bail!("target QEMU: {detail}"),
        }
        tokio::time::sleep(MEET_INTERVAL).await;
    }
}

/// Makes QEMU listen for another stream, once it has noticed that its stream broke; false when it has
/// every page. Its main loop may wait for a page, and then answers no question.
async fn recovers(resumed: &Resumed<'_>, socket: &Path) -> anyhow::Result<bool> {
    let uri = format!("unix:{}", socket.display());
    let prompt = resumed.qmp.with_timeout(PROMPT_MAX);
    for _ in 0..LOOKS_MAX {
        match resumed.qmp.migrate_recover(&uri).await {
            Ok(()) => return Ok(true),
            Err(error) => tracing::debug!(%error, "not yet"),
        }
        match prompt.query_migrate().await.map(|info| info.status) {
            Ok(MigrationStatus::Completed) => return Ok(false),
            Ok(MigrationStatus::PostcopyActive | MigrationStatus::PostcopyPaused)
            | Err(QmpError::Timeout { .. }) => {}
            Ok(status) => bail!("target QEMU's load is {status}"),
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    bail!("target QEMU's stream is open: does a `receive` still live?")
}

/// Why serving a connection ends.
enum Lost {
    Link(String),
    Qemu(String),
}

impl From<anyhow::Error> for Lost {
    fn from(error: anyhow::Error) -> Self {
        Self::Link(format!("{error:#}"))
    }
}

async fn serve(
    resumed: &Resumed<'_>,
    feeder: &Feeder,
    filling: &Filling,
    (fed, complete): (&mut mpsc::Receiver<Fed>, &mut bool),
    peer: &mut Peer,
) -> Result<(), Lost> {
    let sink = feeder.sink(0, Elsewhere::default());
    let post_copy = PostCopy::start(&resumed.layout, sink, peer.secret, filling.clone());
    let mut post_copy = Some(post_copy.map_err(|error| Lost::Qemu(error.to_string()))?);
    let mut lanes: Option<(TargetLanes, Workers)> = None;
    let mut faults: Option<mpsc::Receiver<LaneFault>> = None;
    let mut ticker = tokio::time::interval(TICK);
    let mut told = 0;
    loop {
        tokio::select! {
            frame = peer.inbox.next() => {
                let frame = frame.map_err(Lost::Link)?;
                if let Frame::Ask { attempt, .. } = frame {
                    let (verdict, epoch) = (Verdict::Running, 0);
                    send_frame(&mut peer.sender, &Frame::Answer { attempt, verdict, epoch }).await?;
                    if *complete {
                        send_frame(&mut peer.sender, &Frame::AllPages).await?;
                        return Ok(());
                    }
                    let (begun, workers, found) = accept(resumed, feeder, peer)?;
                    (lanes, faults) = (Some((begun, workers)), Some(found));
                    tell(&filling.absent, peer).await?;
                } else if let Frame::Abort { detail, .. } = frame {
                    return Err(Lost::Link(detail));
                }
            },
            heard = fed.recv() => match heard {
                Some(Fed::Wanted { block, start, length }) => if let Some(post_copy) = &mut post_copy {
                    match post_copy.lacking(block.as_deref(), start, length) {
                        Lacking::Ask(runs) => {
                            send_frame(&mut peer.sender, &Frame::Wanted { runs }).await?;
                        }
                        Lacking::Never(at) => feeder
                            .never_announced(at)
                            .map_err(|error| Lost::Qemu(error.to_string()))?,
                        Lacking::Nothing => {}
                    }
                },
                Some(Fed::Loaded) => {
                    completed(resumed).await?;
                    *complete = true;
                    if lanes.is_some() {
                        send_frame(&mut peer.sender, &Frame::AllPages).await?;
                        return Ok(());
                    }
                }
                Some(Fed::Failed(detail)) => return Err(Lost::Qemu(detail)),
                Some(Fed::Barrier(_) | Fed::Listening) => {}
                None => return Err(Lost::Qemu("its stream has ended".into())),
            },
            fault = next(&mut faults) => match fault {
                LaneFault::Urgent(urgent) => if let Some(post_copy) = &post_copy {
                    post_copy.urgent(urgent).await;
                },
                // Nothing refers to anything here, so nothing can miss.
                LaneFault::Missing(_) => return Err(Lost::Link("pages miss".into())),
                LaneFault::Failed(detail) => return Err(Lost::Link(detail)),
            },
            detail = urgent_failed(&mut post_copy) => return Err(Lost::Link(detail)),
            _ = ticker.tick() => {
                let applied_bytes = feeder.applied_bytes();
                let total: u64 = applied_bytes.iter().sum();
                if total != told {
                    told = total;
                    send_frame(&mut peer.sender, &Frame::Progress { applied_bytes }).await?;
                }
            }
        }
    }
}

/// SHUT(0) is QEMU's word; `completed` is read before it counts.
async fn completed(resumed: &Resumed<'_>) -> Result<(), Lost> {
    for _ in 0..LOOKS_MAX {
        let info = resumed.qmp.query_migrate().await;
        let info = info.map_err(|error| Lost::Qemu(error.to_string()))?;
        if info.status == MigrationStatus::Completed {
            return Ok(());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Err(Lost::Qemu("does not say that it is complete".into()))
}

fn accept(
    resumed: &Resumed<'_>,
    feeder: &Feeder,
    peer: &Peer,
) -> anyhow::Result<(TargetLanes, Workers, mpsc::Receiver<LaneFault>)> {
    feeder.begin_again();
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let workers = Workers::start(cores)?;
    let (lanes, found) = TargetLanes::start(
        peer.connection.clone(),
        &resumed.layout,
        &peer.secret,
        peer.agreed.peer_incarnation,
        &workers,
        None,
        sinks(feeder, &Elsewhere::default()),
    )
    .context("lanes cannot be read")?;
    Ok((lanes, workers, found))
}

/// What is lacking, then what the guest waits for.
async fn tell(absent: &AbsentPages, peer: &mut Peer) -> anyhow::Result<()> {
    let ranges = absent.ranges();
    let chunks = ranges.len().div_ceil(ABSENT_MAX_RANGES);
    for (nth, ranges) in ranges.chunks(ABSENT_MAX_RANGES).enumerate() {
        let (ranges, more) = (ranges.to_vec(), nth + 1 < chunks);
        send_frame(&mut peer.sender, &Frame::Absent { ranges, more }).await?;
    }
    let waiting = absent.waiting().into_iter();
    let waiting: Vec<_> = waiting.map(|first| PageRun { first, count: 1 }).collect();
    for runs in waiting.chunks(MISSING_MAX_RUNS) {
        let runs = runs.to_vec();
        send_frame(&mut peer.sender, &Frame::Wanted { runs }).await?;
    }
    Ok(())
}
