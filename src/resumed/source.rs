//! The side that holds pages: reads them from a QEMU in `postmigrate`, until the target has all.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use qemu_glue::memory::GuestMemory;
use tokio::sync::{Notify, mpsc};
use transport::block::{
    AbsentPages, Contents, DirtySet, Disable, LEVEL_DEFAULT, PAGE_SIZE, PageAddress, push_order,
};
use transport::quic::driver::{Held, LaneEvent, LaneSettings, SourceLanes, Workers};
use transport::wire::{Frame, Purpose, Verdict};

use super::Resumed;
use crate::mapped;
use crate::peer::{Peer, send_frame};
use crate::source::Urgents;
use crate::waiting::next;

/// Between two tries to reach the target.
const MEET_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes under way that are not applied.
const FLIGHT_BYTES: u64 = 4 << 20;

/// Serves the target until it has every page; returns the connection, for the end.
pub(crate) async fn hold(resumed: &Resumed<'_>) -> anyhow::Result<Peer> {
    let contents: Arc<dyn Contents> = Arc::new(Memory::open(resumed).await?);
    loop {
        let mut peer = match resumed.door.meet(resumed.me, Purpose::Settle).await {
            Ok(peer) => peer,
            Err(error) => {
                tracing::info!("the target is not reached: {error:#}");
                tokio::time::sleep(MEET_INTERVAL).await;
                continue;
            }
        };
        match serve(resumed, &contents, &mut peer).await {
            Ok(()) => return Ok(peer),
            Err(error) => tracing::info!("pages are still held: {error:#}"),
        }
        tokio::time::sleep(MEET_INTERVAL).await;
    }
}

/// What runs on one connection once the target has said what it lacks.
struct Serving {
    urgents: Urgents,
    lanes: SourceLanes,
    events: mpsc::Receiver<LaneEvent>,
}

async fn serve(
    resumed: &Resumed<'_>,
    contents: &Arc<dyn Contents>,
    peer: &mut Peer,
) -> anyhow::Result<()> {
    let attempt = resumed.me.attempt;
    let (verdict, epoch) = (Verdict::Unknown, 0);
    let ask = Frame::Ask {
        attempt,
        verdict,
        epoch,
    };
    send_frame(&mut peer.sender, &ask).await?;
    let lacking = AbsentPages::new(resumed.layout.clone());
    let (mut serving, mut events) = (None, None);
    loop {
        tokio::select! {
            frame = peer.inbox.next() => {
                let frame = frame.map_err(anyhow::Error::msg)?;
                if frame == Frame::AllPages {
                    return Ok(());
                }
                if let Frame::Absent { ranges, more } = &frame {
                    ranges.iter().try_for_each(|range| lacking.insert(range))?;
                    if !*more {
                        let begun = begin(resumed, contents, peer, &lacking).await?;
                        let Serving { urgents, lanes, events: told } = begun;
                        events = Some(told);
                        serving = Some((urgents, lanes));
                    }
                }
                heard(frame, serving.as_ref())?;
            },
            event = next(&mut events) => if let LaneEvent::Failed(detail) = event {
                bail!(detail);
            },
        }
    }
}

/// Frames that only steer what is under way.
fn heard(frame: Frame, serving: Option<&(Urgents, SourceLanes)>) -> anyhow::Result<()> {
    match (frame, serving) {
        (Frame::Answer { verdict, .. }, _) if verdict != Verdict::Running => {
            bail!("the target answers {verdict:?}")
        }
        (Frame::Abort { detail, .. }, _) => bail!("the target said: {detail}"),
        (Frame::Wanted { runs }, Some((urgents, _))) => urgents.ask(runs),
        (Frame::Progress { applied_bytes }, Some((_, lanes))) => {
            lanes.applied(applied_bytes);
        }
        (frame, _) => tracing::debug!(frame = frame.name(), "while pages are held"),
    }
    Ok(())
}

/// Exactly what is lacking goes over this connection.
async fn begin(
    resumed: &Resumed<'_>,
    contents: &Arc<dyn Contents>,
    peer: &Peer,
    lacking: &AbsentPages,
) -> anyhow::Result<Serving> {
    tracing::info!(pages = lacking.left(), "the target lacks");
    let dirty = Arc::new(DirtySet::new(resumed.layout.clone()));
    lacking.for_each(&mut |at| {
        dirty.mark_data(at);
    });
    let settings = LaneSettings {
        incarnation: resumed.me.incarnation,
        key: peer.secret,
        level: LEVEL_DEFAULT,
        level_max: LEVEL_DEFAULT,
        disable: Disable::default(),
    };
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let (lanes, events) = SourceLanes::start(
        peer.connection.open_lanes().await?,
        &dirty,
        contents,
        Held::default(),
        &settings,
        Workers::start(cores)?,
        Arc::new(Notify::new()),
    )?;
    let urgents = Urgents::start(&dirty, contents, peer.secret, &peer.connection)?;
    lanes.begin_last_round();
    lanes.set_order(&push_order(&dirty, |_| 0), 0);
    lanes.set_budget(FLIGHT_BYTES);
    Ok(Serving {
        urgents,
        lanes,
        events,
    })
}

/// Memory of a stopped QEMU.
#[derive(Debug)]
struct Memory(GuestMemory);

impl Memory {
    async fn open(resumed: &Resumed<'_>) -> anyhow::Result<Self> {
        let blocks = resumed.qmp.ram_blocks().await?;
        let expected = mapped::expected(&resumed.layout);
        let memory = GuestMemory::open(resumed.qmp.peer_process(), &blocks, &expected);
        memory
            .map(Self)
            .context("cannot read source QEMU's memory (run as its user or as root)")
    }
}

impl Contents for Memory {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.0
            .read_page(usize::from(at.block.0), at.page, into)
            .map_err(io::Error::other)
    }
}
