//! The data plane of both sides without I/O: what the drivers do with the eight lanes.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{Bytes, BytesMut};
use transport::block::{
    Contents, CopyIndex, DirtySet, Disable, FIRST_SEQ, LANES, LaneCursor, LaneDecoder, LaneEncoder,
    Layout, Ledger, PAGE_SIZE, PageAddress, PageHash, PageHasher, PageRun, Replica, Root, Sources,
};
use transport::wire::limits::{BATCH_MAX_BYTES, BATCH_MAX_PAGES};
use transport::wire::{LaneFramer, LaneItem, put_mark};

use crate::content::{self, KEY};
use crate::net::{Net, Way};
use crate::target_qemu::TargetQemu;

/// What QUIC takes of a lane beyond what is on the wire.
const STREAM_BYTES_MAX: usize = 128 * 1024;

/// Latest announced version of every page: stands for the shadow file.
#[derive(Debug)]
pub(crate) struct Shadow {
    layout: Arc<Layout>,
    versions: Vec<AtomicU32>,
}

impl Shadow {
    fn new(layout: Arc<Layout>) -> Shadow {
        let versions = layout.pages().map(|_| AtomicU32::new(0)).collect();
        Shadow { layout, versions }
    }
}

impl Contents for Shadow {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let page = content::number(&self.layout, at);
        content::content(page, self.versions[page].load(Ordering::Relaxed), into);
        Ok(())
    }
}

/// The captured image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) layout: Arc<Layout>,
    pub(crate) dirty: DirtySet,
    pub(crate) shadow: Shadow,
    pub(crate) announced_pages: u64,
}

impl Image {
    pub(crate) fn new(layout: Arc<Layout>) -> Image {
        Image {
            dirty: DirtySet::new(layout.clone()),
            shadow: Shadow::new(layout.clone()),
            layout,
            announced_pages: 0,
        }
    }

    /// A page of QEMU's stream: content first, flag second.
    pub(crate) fn page(&mut self, page: usize, version: u32) {
        let number = u32::try_from(page).expect("a small guest");
        let at = content::address(&self.layout, number);
        self.shadow.versions[page].store(version, Ordering::Relaxed);
        if content::is_zero(page, version) {
            self.dirty.mark_zero(at);
        } else {
            self.dirty.mark_data(at);
        }
        self.announced_pages += 1;
    }
}

/// What was sent, page by page: stands for the file on disk.
#[derive(Debug)]
struct Sent {
    layout: Arc<Layout>,
    pages: Mutex<Vec<Option<Box<[u8; PAGE_SIZE]>>>>,
}

impl Sent {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Box<[u8; PAGE_SIZE]>>>> {
        self.pages.lock().expect("no panic while it is held")
    }
}

impl Replica for Sent {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let pages = self.lock();
        match &pages[content::number(&self.layout, at)] {
            Some(page) => into.copy_from_slice(&page[..]),
            None => into.fill(0),
        }
        Ok(())
    }

    fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        let mut pages = self.lock();
        let from = content::number(&self.layout, first);
        for (page, content) in contents.as_chunks().0.iter().enumerate() {
            pages[from + page] = Some(Box::new(*content));
        }
        Ok(())
    }

    fn zero(&self, first: PageAddress, count: u32) -> io::Result<()> {
        let mut pages = self.lock();
        let from = content::number(&self.layout, first);
        for page in (from..).take(count as usize) {
            pages[page] = None;
        }
        Ok(())
    }
}

/// The source's eight lanes.
#[derive(Debug)]
pub(crate) struct SourceLanes {
    copies: CopyIndex,
    sent: Sent,
    /// The guest is stopped.
    pub(crate) last_round: bool,
    /// Per lane: end of each batch in lane bytes, and its number.
    unacknowledged: [VecDeque<(u64, u32)>; LANES],
    lane_bytes: [u64; LANES],
    encoders: Vec<LaneEncoder>,
    cursors: Vec<LaneCursor>,
    marked: [u32; LANES],
    pub(crate) barrier: u32,
    told: u32,
    pub(crate) sent_bytes: u64,
    pub(crate) content_pages: u64,
    applied_bytes: u64,
    pub(crate) budget_bytes: u64,
}

impl SourceLanes {
    /// Opens the lanes: each begins with its header.
    pub(crate) fn open(layout: &Arc<Layout>, incarnation: u64, net: &mut Net) -> SourceLanes {
        let encoder = |part| {
            LaneEncoder::new(part, &KEY, FIRST_SEQ, Disable::default()).expect("zstd has memory")
        };
        let encoders: Vec<_> = Ledger::split(layout, &KEY)
            .into_iter()
            .map(encoder)
            .collect();
        for encoder in &encoders {
            let mut out = BytesMut::new();
            encoder.header(incarnation).put(&mut out);
            net.send(Way::ToTarget, encoder.lane() + 1, out.freeze());
        }
        let pages = usize::try_from(layout.pages_total()).expect("a small guest");
        SourceLanes {
            copies: CopyIndex::new(layout, 1 << 20),
            sent: Sent {
                layout: layout.clone(),
                pages: Mutex::new(vec![None; pages]),
            },
            last_round: false,
            unacknowledged: Default::default(),
            lane_bytes: [0; LANES],
            encoders,
            cursors: (0..LANES).map(LaneCursor::new).collect(),
            marked: [0; LANES],
            barrier: 0,
            told: 0,
            sent_bytes: 0,
            content_pages: 0,
            applied_bytes: 0,
            budget_bytes: 1 << 20,
        }
    }

    pub(crate) fn applied(&mut self, bytes: [u64; LANES]) {
        let total = bytes.iter().sum::<u64>().min(self.sent_bytes);
        self.applied_bytes = self.applied_bytes.max(total);
        for (lane, applied) in bytes.into_iter().enumerate() {
            let waiting = &mut self.unacknowledged[lane];
            while let Some((end, seq)) = waiting.front().copied()
                && end <= applied
            {
                self.copies.acknowledge(lane, seq);
                waiting.pop_front();
            }
        }
    }

    /// What the driver does with `Missing`.
    pub(crate) fn missing(&mut self, runs: &[PageRun], image: &Image) {
        let zero = PageHasher::new(&KEY).zero();
        for run in runs {
            for page in run.first.page..run.first.page + u32::from(run.count) {
                let at = PageAddress { page, ..run.first };
                let encoder = &mut self.encoders[image.layout.lane_of(at)];
                let sent = encoder.ledger().get(at);
                encoder.ledger_mut().forget(at);
                self.copies.forget(at);
                if let Some((hash, _)) = sent {
                    image.dirty.mark_again(at, hash == zero);
                }
            }
        }
    }

    /// Sends what budget and streams take; says once when a barrier is out on every lane.
    pub(crate) fn pump(&mut self, image: &Image, net: &mut Net) -> Option<(u32, Root)> {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for lane in 0..LANES {
                moved |= self.pump_lane(lane, image, net);
            }
        }
        let is_out = self.marked.iter().all(|marked| *marked == self.barrier);
        if !is_out || self.told == self.barrier {
            return None;
        }
        self.told = self.barrier;
        Some((self.barrier, self.root(&image.layout)))
    }

    fn pump_lane(&mut self, lane: usize, image: &Image, net: &mut Net) -> bool {
        let queued = net.queued_bytes(Way::ToTarget, lane + 1);
        assert!(
            queued <= STREAM_BYTES_MAX + BATCH_MAX_BYTES,
            "lane {lane} queues {queued} bytes"
        );
        if queued >= STREAM_BYTES_MAX {
            return false;
        }
        let mut out = BytesMut::new();
        if image.dirty.lane_dirty(lane) > 0 {
            let flight = self.sent_bytes - self.applied_bytes;
            if flight >= self.budget_bytes {
                return false;
            }
            let taken = image.dirty.take(&mut self.cursors[lane], BATCH_MAX_PAGES);
            let sources = Sources {
                contents: &image.shadow,
                replica: Some(&self.sent),
                copies: (!self.last_round).then_some(&self.copies),
                known: None,
            };
            let stats = self.encoders[lane]
                .encode(&taken, &sources, &mut out)
                .expect("a modelled page can be read");
            self.content_pages += stats.literal.pages + stats.raw.pages;
            let bytes = u64::try_from(out.len()).expect("a batch is small");
            self.sent_bytes += bytes;
            self.lane_bytes[lane] += bytes;
            let batch = (self.lane_bytes[lane], self.encoders[lane].last_seq());
            self.unacknowledged[lane].push_back(batch);
        } else if self.marked[lane] < self.barrier {
            self.marked[lane] = self.barrier;
            put_mark(&mut out, self.barrier);
        } else {
            return false;
        }
        if !out.is_empty() {
            net.send(Way::ToTarget, lane + 1, out.freeze());
        }
        true
    }

    /// Root over the ledger as sent.
    pub(crate) fn root(&self, layout: &Layout) -> Root {
        let parts = std::array::from_fn(|lane| self.encoders[lane].ledger());
        Ledger::root(layout, &parts, &KEY)
    }

    pub(crate) fn announced(&self) -> impl Iterator<Item = (PageAddress, PageHash)> {
        self.encoders.iter().flat_map(|lane| lane.ledger().iter())
    }

    /// Bytes under way, and how many may be.
    pub(crate) fn flight(&self) -> (u64, u64) {
        let batch = u64::try_from(BATCH_MAX_BYTES).expect("a batch is small");
        let lanes = u64::try_from(LANES).expect("few lanes");
        (
            self.sent_bytes - self.applied_bytes,
            self.budget_bytes + lanes * batch,
        )
    }
}

/// The target's eight lanes.
#[derive(Debug)]
pub(crate) struct TargetLanes {
    decoders: Vec<LaneDecoder>,
    framers: Vec<LaneFramer>,
    /// Pages that did not resolve, with their version then.
    missing: Vec<(PageAddress, u32)>,
    marks: [u32; LANES],
    reached: u32,
    pub(crate) applied_bytes: [u64; LANES],
}

impl TargetLanes {
    pub(crate) fn new(layout: &Arc<Layout>, incarnation: u64) -> TargetLanes {
        let decoder = |part| LaneDecoder::new(part, &KEY, incarnation).expect("zstd has memory");
        TargetLanes {
            decoders: Ledger::split(layout, &KEY)
                .into_iter()
                .map(decoder)
                .collect(),
            framers: (0..LANES).map(|_| LaneFramer::new()).collect(),
            missing: Vec::new(),
            marks: [0; LANES],
            reached: 0,
            applied_bytes: [0; LANES],
        }
    }

    /// Takes bytes of a lane; says when all lanes have reached a barrier, and which pages must come
    /// again.
    pub(crate) fn push(
        &mut self,
        lane: usize,
        bytes: &Bytes,
        qemu: &mut TargetQemu,
    ) -> Result<(Option<u32>, Vec<PageRun>), String> {
        self.framers[lane].push(bytes);
        let mut reached = None;
        let mut missing = Vec::new();
        while let Some(item) = self.framers[lane].next_item().map_err(text)? {
            let wire_bytes = u64::try_from(item.wire_bytes()).map_err(text)?;
            match item {
                LaneItem::Header(header) => self.decoders[lane].open(&header).map_err(text)?,
                LaneItem::Batch(body) => {
                    let applied = self.decoders[lane].apply(&body, qemu).map_err(text)?;
                    missing.extend(applied.missing);
                    self.applied_bytes[lane] += wire_bytes;
                }
                LaneItem::Mark { barrier } => {
                    self.decoders[lane].ledger_mut().refresh();
                    self.marks[lane] = barrier;
                    let least = self.marks.into_iter().min().unwrap_or(0);
                    if least > self.reached {
                        self.reached = least;
                        reached = Some(least);
                    }
                }
            }
        }
        for run in &missing {
            for page in run.first.page..run.first.page + u32::from(run.count) {
                let at = PageAddress { page, ..run.first };
                let version = self.decoders[lane].ledger().get(at);
                self.missing
                    .push((at, version.map_or(0, |(_, version)| version)));
            }
        }
        Ok((reached, missing))
    }

    /// Pages that did not resolve and have not come again.
    pub(crate) fn missing_pages(&mut self, layout: &Layout) -> u64 {
        let decoders = &self.decoders;
        self.missing.retain(|(at, version)| {
            let now = decoders[layout.lane_of(*at)].ledger().get(*at);
            now.is_none_or(|(_, now)| now <= *version)
        });
        u64::try_from(self.missing.len()).expect("a small guest")
    }

    /// Root over the ledger as applied.
    pub(crate) fn root(&self, layout: &Layout) -> Root {
        let parts = std::array::from_fn(|lane| self.decoders[lane].ledger());
        Ledger::root(layout, &parts, &KEY)
    }

    pub(crate) fn announced(&self) -> impl Iterator<Item = (PageAddress, PageHash)> {
        self.decoders.iter().flat_map(|lane| lane.ledger().iter())
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
