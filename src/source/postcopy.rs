//! The source's guest runs at the target, and pages of it are still here (S11).
//!
//! ```text
//! stop: hot pages -> lanes                                             still before the mark
//! Wanted -> thread: takes the page, then its neighbours -> Urgent      first, on a stream of its own
//! dirty set -> lanes                                                   the rest, likely pages first
//! new connection: Absent -> a dirty set of exactly that, fresh lanes
//! ```
//!
//! Taking a page out of the dirty set is what sends it once, whichever way it goes.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use transport::block::{
    AbsentPages, Contents, DirtySet, PageAddress, PageRun, RANGE_PAGES, Taken, pack_urgent,
    push_order,
};
use transport::quic::Connection;
use transport::session::WhenStuck;
use transport::session::source::Input;
use transport::wire::limits::ABSENT_MAX_RANGES;
use transport::wire::{Frame, Offer};

use super::driver::Driver;
use crate::waiting::now;

/// Neighbours on either side of a wanted page that go with it: 128 KiB at most, which a slow link takes
/// in some milliseconds, far below the round trip that each of them would cost.
const NEIGHBOURS: u32 = 16;
/// How long the link may take at most for pages that go with the stop: without them the guest would
/// wait a round trip for one after another.
const EARLY_MAX: Duration = Duration::from_millis(100);
/// Share of the wanted downtime that they may take.
const EARLY_SHARE: u32 = 3;
/// What a page about takes on the wire.
const PAGE_BYTES_ABOUT: u64 = 2048;
/// Questions and answers that wait. What finds no room is pushed over the lanes all the same.
const WANTED_MAX: usize = 256;
const URGENT_MAX: usize = 16;

/// Answers faults beside the lanes.
#[derive(Debug)]
pub(crate) struct Urgents {
    wanted: mpsc::Sender<Vec<PageRun>>,
}

impl Urgents {
    /// Starts the thread that takes, reads and packs, and who sends, on a stream behind the open lanes.
    pub(crate) fn start(
        dirty: &Arc<DirtySet>,
        contents: &Arc<dyn Contents>,
        key: [u8; 32],
        connection: &Connection,
    ) -> std::io::Result<Urgents> {
        let (wanted, asked) = mpsc::channel(WANTED_MAX);
        let (frames, urgent) = mpsc::channel(URGENT_MAX);
        let connection = connection.clone();
        tokio::spawn(async move {
            if let Err(error) = send_all(&connection, urgent).await {
                tracing::debug!("the urgent stream has ended: {error:#}");
            }
        });
        let (dirty, contents) = (dirty.clone(), contents.clone());
        std::thread::Builder::new()
            .name("urgent".into())
            .spawn(move || answer(asked, &frames, &dirty, &*contents, &key))?;
        Ok(Urgents { wanted })
    }

    /// The target wants these pages.
    pub(crate) fn ask(&self, runs: Vec<PageRun>) {
        if self.wanted.try_send(runs).is_err() {
            tracing::debug!("more faults than can be answered first: the lanes bring these pages");
        }
    }
}

/// What is not sent when the connection ends is lacking on the next one.
async fn send_all(
    connection: &Connection,
    mut frames: mpsc::Receiver<Frame>,
) -> anyhow::Result<()> {
    let mut stream = connection.open_urgent().await?;
    while let Some(frame) = frames.recv().await {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes)?;
        stream.send(bytes.freeze()).await?;
    }
    Ok(())
}

fn answer(
    mut asked: mpsc::Receiver<Vec<PageRun>>,
    frames: &mpsc::Sender<Frame>,
    dirty: &DirtySet,
    contents: &dyn Contents,
    key: &[u8; 32],
) {
    while let Some(runs) = asked.blocking_recv() {
        for at in runs.iter().flat_map(pages_of) {
            if !dirty.layout().contains(at) {
                tracing::warn!(?at, "the target wants what is no page");
                continue;
            }
            let first: Vec<Taken> = dirty.take_page(at).into_iter().collect();
            let near = neighbours(at, dirty);
            for taken in [first, near] {
                if taken.is_empty() {
                    continue;
                }
                match pack_urgent(&taken, contents, key) {
                    Ok(urgent) => {
                        let (digest, runs, data) = (urgent.digest, urgent.runs, urgent.data);
                        let frame = Frame::Urgent { digest, runs, data };
                        if frames.blocking_send(frame).is_err() {
                            return;
                        }
                    }
                    // They are still needed: the lanes try again.
                    Err(error) => {
                        tracing::error!(%error, "pages cannot be read");
                        for page in taken {
                            dirty.mark_again(page.at, page.zero);
                        }
                    }
                }
            }
        }
    }
}

fn pages_of(run: &PageRun) -> impl Iterator<Item = PageAddress> + use<> {
    let first = run.first;
    (0..u32::from(run.count)).filter_map(move |offset| {
        let page = first.page.checked_add(offset)?;
        Some(PageAddress { page, ..first })
    })
}

/// What is still here of the pages around one, within its range.
fn neighbours(at: PageAddress, dirty: &DirtySet) -> Vec<Taken> {
    let begin = at.page - at.page % RANGE_PAGES;
    let first = at.page.saturating_sub(NEIGHBOURS).max(begin);
    let end = at.page.saturating_add(NEIGHBOURS + 1);
    (first..end.min(begin.saturating_add(RANGE_PAGES)))
        .map(|page| PageAddress { page, ..at })
        .filter(|at| dirty.layout().contains(*at))
        .filter_map(|at| dirty.take_page(at))
        .collect()
}

impl Driver {
    /// All lanes are marked. Held ones leave behind what is dirty: the target hears of it before
    /// `Final` does its work.
    pub(super) async fn marked(&mut self, barrier: u32, root: transport::block::Root) {
        let (mut root, mut absent_pages) = (root, 0);
        if self.holds_lanes
            && let Some(lanes) = &self.lanes
        {
            let (ranges, rest) = lanes.leave_out_dirty();
            root = rest;
            absent_pages = ranges
                .iter()
                .flat_map(|range| range.pages)
                .map(|bits| u64::from(bits.count_ones()))
                .sum();
            let chunks = ranges.len().div_ceil(ABSENT_MAX_RANGES);
            for (nth, ranges) in ranges.chunks(ABSENT_MAX_RANGES).enumerate() {
                let (ranges, more) = (ranges.to_vec(), nth + 1 < chunks);
                self.send(Frame::Absent { ranges, more }).await;
            }
            tracing::info!(pages = absent_pages, "stay behind, for post-copy");
            self.start_urgents();
        }
        self.left_behind = absent_pages;
        self.tally.root = Some(root);
        self.machine.handle(
            now(),
            Input::Marked {
                barrier,
                root,
                absent_pages,
            },
        );
    }

    /// A period of the guest's writing is over.
    pub(super) fn age_heat(&self) {
        if self.options.policy.when_stuck == WhenStuck::PostCopy
            && let Some(image) = &self.image
        {
            let heat = image.heat.clone();
            tokio::task::spawn_blocking(move || heat.age());
        }
    }

    /// The guest is stopped and lanes are held: what it uses most goes with the stop, the rest in the
    /// order of likely use.
    pub(super) fn order_pages(&self) {
        let (true, Some(lanes), Some(image)) = (self.holds_lanes, &self.lanes, &self.image) else {
            return;
        };
        let order = push_order(&image.dirty, |at| image.heat.bits(at));
        let time = (self.options.policy.downtime / EARLY_SHARE).min(EARLY_MAX);
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let early = self.link_bytes_per_s.saturating_mul(ms) / 1000 / PAGE_BYTES_ABOUT;
        lanes.set_order(&order, usize::try_from(early).unwrap_or(usize::MAX));
    }

    fn start_urgents(&mut self) {
        if self.urgents.is_some() {
            return;
        }
        let (Some(image), Some(peer)) = (&self.image, &self.peer) else {
            return;
        };
        let contents: Arc<dyn Contents> = image.memory.clone();
        match Urgents::start(&image.dirty, &contents, self.secret, &peer.connection) {
            Ok(urgents) => self.urgents = Some(urgents),
            Err(error) => tracing::error!(%error, "faults are answered by the lanes alone"),
        }
    }

    /// Frames of post-copy; the machine has its own view of them.
    pub(super) async fn post_copy_frame(&mut self, frame: &Frame) {
        if let Frame::Wanted { runs } = frame {
            self.faults += runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
            if let Some(urgents) = &self.urgents {
                urgents.ask(runs.clone());
            }
        } else if let Frame::Absent { ranges, more } = frame
            && self.left_behind > 0
        {
            let Some(image) = &self.image else { return };
            let lacking = self
                .lacking
                .get_or_insert_with(|| AbsentPages::new(image.layout.clone()));
            for range in ranges {
                if let Err(error) = lacking.insert(range) {
                    tracing::warn!(%error, "the target lacks what is no page");
                }
            }
            if !more {
                self.begin_again().await;
            }
        }
    }

    /// The target has named what it lacks: exactly that is sent on this connection.
    async fn begin_again(&mut self) {
        let (Some(lacking), Some(image)) = (self.lacking.take(), &mut self.image) else {
            return;
        };
        tracing::info!(pages = lacking.left(), "the target lacks");
        // The lanes of the lost connection end, and with them what they took and did not send.
        self.lanes = None;
        let dirty = Arc::new(DirtySet::new(image.layout.clone()));
        lacking.for_each(&mut |at| {
            dirty.mark_data(at);
        });
        image.dirty = dirty;
        (self.urgents, self.kept) = (None, None);
        if let Err(error) = self.open_lanes(Bytes::new(), Offer::default()).await {
            tracing::error!("lanes cannot be opened again: {error:#}");
        }
        self.start_urgents();
        if let (Some(lanes), Some(image)) = (&self.lanes, &self.image) {
            let order = push_order(&image.dirty, |at| image.heat.bits(at));
            lanes.set_order(&order, 0);
        }
    }
}
