//! The target's guest runs while pages of it are still at the source (S11).
//!
//! ```text
//! QEMU's fault -Wanted-> source -Urgent, lanes-> feed (each page once) -> QEMU
//! link lost: Absent on the next connection, fresh lanes        every page fed: QEMU says `completed`
//! ```

use std::sync::Arc;

use qemu_glue::stream::PAGE_SIZE;
use tokio::sync::mpsc;
use transport::block::{
    AbsentPages, BlockId, Fault, LANES, Layout, PageAddress, PageRun, Root, Sink, Urgent,
    unpack_urgent,
};
use transport::quic::driver::{LaneSink, TargetLanes};
use transport::session::target::Input;
use transport::wire::Frame;
use transport::wire::limits::{ABSENT_MAX_RANGES, MISSING_MAX_RUNS};

use super::driver::Driver;
use crate::faults::Faults;
use crate::feed::{Elsewhere, FeedSink, Feeder, Filling};
use crate::peer::send_frame;
use crate::waiting::now;

/// Urgent frames that wait for their thread: each at most 1 MiB.
const URGENT_MAX: usize = 16;

/// What is lacking, and who brings it.
#[derive(Debug)]
pub(crate) struct PostCopy {
    layout: Arc<Layout>,
    pub(super) absent: Arc<AbsentPages>,
    pub(super) faults: Arc<Faults>,
    urgent: mpsc::Sender<Urgent>,
    failed: mpsc::Receiver<String>,
    /// QEMU names a block once and then means it.
    last_block: Option<u16>,
    /// The package is fed: SHUT(0) then means that every page is there.
    pub(super) is_fed: bool,
    pub(super) pages: u64,
}

impl PostCopy {
    /// Starts the thread that unpacks urgent pages.
    pub(crate) fn start(
        layout: &Arc<Layout>,
        sink: FeedSink,
        key: [u8; 32],
        filling: Filling,
    ) -> std::io::Result<Self> {
        let (urgent, waiting) = mpsc::channel(URGENT_MAX);
        let (told, failed) = mpsc::channel(1);
        let of_thread = layout.clone();
        std::thread::Builder::new()
            .name("urgent".into())
            .spawn(move || {
                if let Err(detail) = feed_urgent(waiting, sink, &of_thread, &key) {
                    let told = told.blocking_send(detail);
                    tracing::debug!(session = told.is_ok(), "urgent pages ended");
                }
            })?;
        Ok(Self {
            absent: filling.absent,
            faults: filling.faults,
            layout: layout.clone(),
            urgent,
            failed,
            last_block: None,
            is_fed: false,
            pages: 0,
        })
    }

    /// QEMU waits for these bytes: what is to be done for it.
    pub(crate) fn lacking(&mut self, block: Option<&[u8]>, start: u64, length: u32) -> Lacking {
        let Some(at) = self.requested(block, start, length) else {
            tracing::warn!(start, length, "target QEMU asks for what is no page");
            return Lacking::Nothing;
        };
        match self.absent.fault(at) {
            Fault::Wanted => {
                self.faults.begin(at, now());
                Lacking::Ask(vec![PageRun {
                    first: at,
                    count: 1,
                }])
            }
            Fault::Never => Lacking::Never(at),
            Fault::Waiting | Fault::Here => Lacking::Nothing,
        }
    }

    /// Hands urgent pages to their thread.
    pub(crate) async fn urgent(&self, urgent: Urgent) {
        if self.urgent.send(urgent).await.is_err() {
            tracing::debug!("urgent pages have ended");
        }
    }

    /// Which page a request of QEMU's means.
    fn requested(&mut self, block: Option<&[u8]>, start: u64, length: u32) -> Option<PageAddress> {
        if let Some(name) = block {
            let place = self
                .layout
                .blocks()
                .iter()
                .position(|block| block.name.as_bytes() == name);
            self.last_block = place.and_then(|place| u16::try_from(place).ok());
        }
        let at = PageAddress {
            block: BlockId(self.last_block?),
            page: u32::try_from(start / PAGE_SIZE as u64).ok()?,
        };
        let is_page = u64::from(length) == PAGE_SIZE as u64 && self.layout.contains(at);
        is_page.then_some(at)
    }
}

/// What a fault asks for.
#[derive(Debug)]
pub(crate) enum Lacking {
    /// The source has these pages.
    Ask(Vec<PageRun>),
    /// Nobody has it: it is zero.
    Never(PageAddress),
    /// It was asked for, or is here.
    Nothing,
}

/// Waits for the thread's failure; for ever without post-copy.
pub(crate) async fn urgent_failed(post_copy: &mut Option<PostCopy>) -> String {
    match post_copy {
        Some(post_copy) => match post_copy.failed.recv().await {
            Some(detail) => detail,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

impl Driver {
    /// Frames of post-copy; the machine has its own view of them.
    pub(super) fn post_copy_frame(&mut self, frame: &Frame) {
        let Some(post_copy) = &self.post_copy else {
            return;
        };
        if let Frame::Absent { ranges, .. } = frame
            && !post_copy.is_fed
        {
            let added = ranges
                .iter()
                .try_for_each(|range| post_copy.absent.insert(range));
            if let Err(error) = added {
                self.machine
                    .handle(now(), Input::LaneFailed(error.to_string()));
            }
        }
    }

    /// Pages that the guest waits for; there are none before it is asked for them.
    pub(super) async fn urgent(&mut self, urgent: Urgent) {
        match &self.post_copy {
            Some(post_copy) if post_copy.is_fed => post_copy.urgent(urgent).await,
            _ => {
                let detail = "urgent pages that nobody asked for".into();
                self.machine.handle(now(), Input::LaneFailed(detail));
            }
        }
    }

    /// All pages that stay behind are named: both sides leave them out.
    pub(super) fn leave_out(&mut self, pages: u64) {
        let (Some(post_copy), Some(lanes)) = (&mut self.post_copy, &self.lanes) else {
            return;
        };
        let named = post_copy.absent.left();
        post_copy.pages = named;
        let left = if named == pages {
            Ok(lanes.leave_out(&post_copy.absent))
        } else {
            Err(format!("{named} pages are named, {pages} stay behind"))
        };
        if let Ok(root) = &left {
            self.tally.root = Some(*root);
        }
        self.machine.handle(now(), Input::LeftOut(left));
    }

    /// QEMU waits for a page.
    pub(super) async fn wanted(&mut self, block: Option<Vec<u8>>, start: u64, length: u32) {
        let Some(post_copy) = &mut self.post_copy else {
            return;
        };
        match post_copy.lacking(block.as_deref(), start, length) {
            Lacking::Ask(runs) => {
                if let Some(peer) = &mut self.peer
                    && let Err(error) = send_frame(&mut peer.sender, &Frame::Wanted { runs }).await
                {
                    tracing::debug!(%error, "not asked for: it is lacking on the next connection");
                }
            }
            Lacking::Never(at) => {
                if let Some(feeder) = &self.feeder
                    && let Err(error) = feeder.never_announced(at)
                {
                    tracing::debug!(%error, "QEMU's stream has ended");
                }
            }
            Lacking::Nothing => {}
        }
    }

    /// A new connection: the source hears what is lacking and begins anew with it.
    pub(super) async fn tell_absent(&mut self) {
        let Some(post_copy) = &self.post_copy else {
            return;
        };
        let ranges = post_copy.absent.ranges();
        let waiting: Vec<PageRun> = post_copy
            .absent
            .waiting()
            .into_iter()
            .map(|first| PageRun { first, count: 1 })
            .collect();
        tracing::info!(pages = post_copy.absent.left(), "lacking");
        let chunks = ranges.len().div_ceil(ABSENT_MAX_RANGES);
        self.accept_again();
        for (nth, ranges) in ranges.chunks(ABSENT_MAX_RANGES).enumerate() {
            let (ranges, more) = (ranges.to_vec(), nth + 1 < chunks);
            self.send(Frame::Absent { ranges, more }).await;
        }
        for runs in waiting.chunks(MISSING_MAX_RUNS) {
            let runs = runs.to_vec();
            self.send(Frame::Wanted { runs }).await;
        }
    }

    /// Lanes with empty ledgers: nothing is compared any more, and a page that is not lacking is not fed.
    fn accept_again(&mut self) {
        let (Some(peer), Some(layout), Some(feeder)) = (&self.peer, &self.layout, &self.feeder)
        else {
            return;
        };
        feeder.begin_again();
        self.told_bytes = 0;
        let started = TargetLanes::start(
            peer.connection.clone(),
            layout,
            &self.secret,
            peer.agreed.peer_incarnation,
            &self.workers,
            None,
            sinks(feeder, &Elsewhere::default()),
        );
        match started {
            Ok((lanes, faults)) => {
                self.lanes = Some(lanes);
                self.lane_faults = Some(faults);
            }
            Err(error) => tracing::error!(%error, "lanes cannot be read again"),
        }
    }
}

/// One sink for each lane.
pub(crate) fn sinks(feeder: &Feeder, elsewhere: &Elsewhere) -> Vec<FeedSink> {
    (0..LANES)
        .map(|lane| feeder.sink(lane, elsewhere.clone()))
        .collect()
}

fn feed_urgent(
    mut waiting: mpsc::Receiver<Urgent>,
    mut sink: FeedSink,
    layout: &Layout,
    key: &[u8; 32],
) -> Result<(), String> {
    while let Some(urgent) = waiting.blocking_recv() {
        let (pages, contents) =
            unpack_urgent(&urgent, layout, key).map_err(|error| error.to_string())?;
        let fed = pages
            .iter()
            .zip(contents.as_chunks().0)
            .try_for_each(
                |(at, content)| match content.iter().all(|byte| *byte == 0) {
                    true => sink.zero(*at, 1),
                    false => sink.page(*at, content),
                },
            );
        fed.and_then(|()| sink.batch_end(0))
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Root that a checkpoint may be noted with: after post-copy nobody has computed one over all pages.
pub(super) fn checkpoint_root(root: Option<Root>, post_copy: Option<&PostCopy>) -> Option<Root> {
    root.filter(|_| post_copy.is_none_or(|post_copy| !post_copy.is_fed))
}
