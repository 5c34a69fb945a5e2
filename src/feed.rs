//! Gives target QEMU a stream: one thread writes what the lanes have decoded, another reads the
//! return path.
//!
//! ```text
//! lanes -Feed (bounded)-> writer -unix-> target QEMU -return path-> Fed to the session
//! ```
//!
//! In post-copy each page is fed once: the set of lacking pages says whether it still is.
//!
//! A page counts as applied when it is in QEMU's socket; a barrier when QEMU has consumed
//! everything before it (it answers an in-stream PING).

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use qemu_glue::stream::{
    Command, PAGE_SIZE, Phase, RamBlock, WriteError, Writer, devices_of, return_path,
};
use tokio::sync::mpsc;
use transport::block::{AbsentPages, BlockSpec, LANES, PageAddress, Replica, Sink};
use transport::quic::driver::LaneSink;
use transport::wire::tail;

use crate::faults::Faults;
pub(crate) use crate::fed::Fed;
use crate::fed::{PACKAGE_PING, read_bitmaps, read_return_path};
use crate::mapped::TargetMemory;
use crate::shared::Shared;
use crate::waiting::now;

/// Decoded batches that wait for QEMU: each at most 256 KiB of pages, so at most 4 MiB.
const WAITING_MAX: usize = 16;
/// Number of our ram section: QEMU's own sections count from 0, so it meets none of them.
const SECTION_ID: u32 = 0x7fff_0000;
/// Events that may wait for the session.
const EVENTS_MAX: usize = 64;

/// One thing to write.
enum Feed {
    Batch {
        lane: usize,
        batch: Batch,
        wire_bytes: u64,
    },
    Mark {
        lane: usize,
        barrier: u32,
    },
    Tail(Vec<(Bytes, u32)>),
    Package {
        pieces: Vec<(Bytes, u32)>,
        filling: Filling,
    },
    /// A page that the source never announced, and that the guest waits for.
    Never(PageAddress),
    /// Bytes of a relayed stream, as they are.
    Raw(Bytes),
}

/// What is still lacking when the guest may run.
#[derive(Debug, Clone)]
pub(crate) struct Filling {
    pub(crate) absent: Arc<AbsentPages>,
    pub(crate) faults: Arc<Faults>,
}

/// Pages of one batch, decoded.
#[derive(Debug, Clone, Default)]
struct Batch {
    zeros: Vec<(PageAddress, u32)>,
    pages: Vec<PageAddress>,
    contents: Vec<u8>,
}

impl Batch {
    fn write_into(&self, replica: &dyn Replica) -> std::io::Result<()> {
        for (first, count) in &self.zeros {
            replica.zero(*first, *count)?;
        }
        self.runs()
            .try_for_each(|(first, contents)| replica.write(first, contents))
    }

    /// Writes what belongs into shared memory there and returns the rest, for QEMU's stream.
    fn write_shared(self, memory: &TargetMemory) -> std::io::Result<Batch> {
        let mut rest = Batch::default();
        for (first, count) in &self.zeros {
            if memory.is_shared(first.block) {
                memory.zero(*first, *count)?;
            } else {
                rest.zeros.push((*first, *count));
            }
        }
        for (first, contents) in self.runs() {
            if memory.is_shared(first.block) {
                memory.write(first, contents)?;
                continue;
            }
            for page in 0..contents.len() / PAGE_SIZE {
                let page = first.page + u32::try_from(page).unwrap_or(0);
                rest.pages.push(PageAddress { page, ..first });
            }
            rest.contents.extend_from_slice(contents);
        }
        Ok(rest)
    }

    /// Neighbours with their contents.
    fn runs(&self) -> impl Iterator<Item = (PageAddress, &[u8])> {
        let follows = |one: &PageAddress, next: &PageAddress| {
            one.block == next.block && one.page + 1 == next.page
        };
        let mut contents = &self.contents[..];
        self.pages.chunk_by(follows).map(move |run| {
            let (these, rest) = contents.split_at(run.len() * PAGE_SIZE);
            contents = rest;
            (run[0], these)
        })
    }
}

/// The feeding threads' handle.
#[derive(Debug)]
pub(crate) struct Feeder {
    socket: UnixStream,
    queue: SyncSender<Feed>,
    applied: Arc<[AtomicU64; LANES]>,
}

impl Feeder {
    /// Writes head and block list into the connected socket and starts the threads.
    pub(crate) fn start(
        mut socket: UnixStream,
        head: &[u8],
        blocks: &[BlockSpec],
        post_copy: bool,
    ) -> anyhow::Result<(Feeder, mpsc::Receiver<Fed>)> {
        let blocks: Vec<RamBlock> = blocks
            .iter()
            .map(|block| RamBlock {
                name: block.name.clone(),
                pages: block.pages,
            })
            .collect();
        let mut writer = Writer::new();
        writer.head(head)?;
        writer.command(Command::OpenReturnPath)?;
        if post_copy {
            // It erases RAM, so it stands before all pages, and nothing is written beside the stream.
            writer.postcopy_advise()?;
        }
        writer.ram_start(SECTION_ID, &blocks)?;
        writer.ram_end()?;
        socket.write_all(&writer.take())?;
        Self::start_threads(socket, writer)
    }

    /// For a relayed stream: nothing is written but what [`FeedSink::raw`] brings.
    pub(crate) fn start_relay(socket: UnixStream) -> anyhow::Result<(Feeder, mpsc::Receiver<Fed>)> {
        Self::start_threads(socket, Writer::new())
    }

    /// For a target whose post-copy stream broke, on a new socket: asks which pages it has, notes all
    /// others in `filling` and goes on. Blocks until QEMU has answered.
    pub(crate) fn start_again(
        mut socket: UnixStream,
        blocks: &[BlockSpec],
        filling: Filling,
    ) -> anyhow::Result<(Feeder, mpsc::Receiver<Fed>)> {
        let list: Vec<RamBlock> = blocks
            .iter()
            .map(|block| RamBlock {
                name: block.name.clone(),
                pages: block.pages,
            })
            .collect();
        let mut writer = Writer::postcopy_again(SECTION_ID, &list);
        for (block, _) in (0_u16..).zip(blocks) {
            writer.postcopy_ask_bitmap(block)?;
        }
        socket.write_all(&writer.take())?;
        read_bitmaps(&mut socket, &list, &filling.absent)?;
        writer.postcopy_resume()?;
        let is_whole = filling.absent.left() == 0;
        if is_whole {
            writer.postcopy_end()?;
        }
        socket.write_all(&writer.take())?;
        Self::start_with(socket, writer, Some(filling), is_whole)
    }

    fn start_threads(
        socket: UnixStream,
        writer: Writer,
    ) -> anyhow::Result<(Feeder, mpsc::Receiver<Fed>)> {
        Self::start_with(socket, writer, None, false)
    }

    fn start_with(
        socket: UnixStream,
        writer: Writer,
        filling: Option<Filling>,
        has_ended: bool,
    ) -> anyhow::Result<(Feeder, mpsc::Receiver<Fed>)> {
        let is_recovery = filling.is_some();
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let applied: Arc<[AtomicU64; LANES]> = Arc::default();
        let thread = FeedThread {
            socket: socket.try_clone()?,
            writer,
            applied: applied.clone(),
            marks: [0; LANES],
            reached: 0,
            filling,
            has_ended,
        };
        let failed = events.clone();
        std::thread::Builder::new()
            .name("feed".into())
            .spawn(move || {
                if let Err(error) = thread.run(&waiting) {
                    let told = failed.blocking_send(Fed::Failed(error.to_string()));
                    tracing::debug!(%error, session = told.is_ok(), "feeding ended");
                }
            })?;
        let reader = socket.try_clone()?;
        std::thread::Builder::new()
            .name("return-path".into())
            .spawn(move || {
                let parser = if is_recovery {
                    return_path::Parser::in_recovery(0)
                } else {
                    return_path::Parser::new()
                };
                read_return_path(reader, parser, &events);
            })?;
        Ok((
            Feeder {
                socket,
                queue,
                applied,
            },
            receiver,
        ))
    }

    /// Where a lane's decoded pages go.
    pub(crate) fn sink(&self, lane: usize, elsewhere: Elsewhere) -> FeedSink {
        FeedSink {
            lane,
            queue: self.queue.clone(),
            batch: Batch::default(),
            elsewhere,
            is_seeding: false,
        }
    }

    /// Wire bytes applied so far, per lane.
    pub(crate) fn applied_bytes(&self) -> [u64; LANES] {
        std::array::from_fn(|lane| self.applied[lane].load(Ordering::Relaxed))
    }

    /// Ends RAM and gives the device state. Waits only while batches are before it.
    pub(crate) fn tail(&self, pieces: Vec<(Bytes, u32)>) -> anyhow::Result<()> {
        self.queue
            .send(Feed::Tail(pieces))
            .map_err(|_| anyhow::anyhow!("target QEMU's stream has ended"))
    }

    /// Throws away what QEMU has of the lacking pages, gives it the device state and lets it run (or
    /// be paused, as it was told before). From here on only lacking pages are fed, each once.
    pub(crate) fn package(
        &self,
        pieces: Vec<(Bytes, u32)>,
        filling: Filling,
    ) -> anyhow::Result<()> {
        self.queue
            .send(Feed::Package { pieces, filling })
            .map_err(|_| anyhow::anyhow!("target QEMU's stream has ended"))
    }

    /// The guest waits for a page that the source never announced: it is zero.
    pub(crate) fn never_announced(&self, at: PageAddress) -> anyhow::Result<()> {
        self.queue
            .send(Feed::Never(at))
            .map_err(|_| anyhow::anyhow!("target QEMU's stream has ended"))
    }

    /// The lanes begin anew on another connection, and so does what counts as applied.
    pub(crate) fn begin_again(&self) {
        for lane in self.applied.iter() {
            lane.store(0, Ordering::Relaxed);
        }
    }

    /// Closes the socket to QEMU.
    pub(crate) fn close(&self) {
        if let Err(error) = self.socket.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "feeding socket was closed already");
        }
    }
}

/// What this host holds beside target QEMU's stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Elsewhere {
    /// Memory that QEMU shares: its pages are written there.
    pub(crate) memory: Option<Arc<TargetMemory>>,
    /// The image as applied, kept for the next trip, read for copies and deltas.
    pub(crate) replica: Option<Arc<dyn Replica>>,
    /// Disk images that the source may name.
    pub(crate) shared: Option<Shared>,
}

/// A lane's way to the feeding thread.
#[derive(Debug, Clone)]
pub(crate) struct FeedSink {
    lane: usize,
    queue: SyncSender<Feed>,
    batch: Batch,
    elsewhere: Elsewhere,
    /// The batch is of the basis: the replica has it.
    is_seeding: bool,
}

impl Sink for FeedSink {
    fn zero(&mut self, first: PageAddress, count: u32) -> std::io::Result<()> {
        self.batch.zeros.push((first, count));
        Ok(())
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> std::io::Result<()> {
        self.batch.pages.push(at);
        self.batch.contents.extend_from_slice(content);
        Ok(())
    }

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        match (&self.elsewhere.memory, &self.elsewhere.replica) {
            (Some(memory), _) if memory.is_shared(at.block) => memory.read(at, into),
            (_, Some(replica)) => replica.read(at, into),
            (_, None) => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }

    fn known(&mut self, number: u32, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        match &self.elsewhere.shared {
            Some(shared) => shared.read(number, into),
            None => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }
}

impl LaneSink for FeedSink {
    fn seed(&mut self, at: PageAddress, content: Option<&[u8; PAGE_SIZE]>) -> std::io::Result<()> {
        self.is_seeding = true;
        match content {
            Some(content) => self.page(at, content),
            None => match self.batch.zeros.last_mut() {
                Some((first, count))
                    if first.block == at.block && first.page + *count == at.page =>
                {
                    *count += 1;
                    Ok(())
                }
                _ => self.zero(at, 1),
            },
        }
    }

    fn batch_end(&mut self, wire_bytes: u64) -> std::io::Result<()> {
        let mut batch = std::mem::take(&mut self.batch);
        if !std::mem::take(&mut self.is_seeding) {
            self.keep(&batch);
        }
        if let Some(memory) = &self.elsewhere.memory {
            batch = batch.write_shared(memory)?;
        }
        self.send(Feed::Batch {
            lane: self.lane,
            batch,
            wire_bytes,
        })
    }

    fn mark(&mut self, barrier: u32) -> std::io::Result<()> {
        self.send(Feed::Mark {
            lane: self.lane,
            barrier,
        })
    }
}

impl FeedSink {
    /// Writes a batch into the replica, neighbours in one go. One that fails is used no more: the
    /// guest moves without it.
    fn keep(&mut self, batch: &Batch) {
        let Some(replica) = &self.elsewhere.replica else {
            return;
        };
        if let Err(error) = batch.write_into(&**replica) {
            tracing::warn!(%error, "the checkpoint is not kept any further");
            self.elsewhere.replica = None;
        }
    }

    /// Bytes of a relayed stream; waits while QEMU's socket is full.
    pub(crate) fn raw(&self, bytes: Bytes) -> std::io::Result<()> {
        self.send(Feed::Raw(bytes))
    }

    fn send(&self, feed: Feed) -> std::io::Result<()> {
        self.queue
            .send(feed)
            .map_err(|_| std::io::ErrorKind::BrokenPipe.into())
    }
}

/// Why feeding ends.
#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("target QEMU's stream: {0}")]
    Write(#[from] WriteError),
    #[error("target QEMU closed its stream: {0}")]
    Io(#[from] std::io::Error),
}

struct FeedThread {
    socket: UnixStream,
    writer: Writer,
    applied: Arc<[AtomicU64; LANES]>,
    /// The latest barrier of each lane, and the latest that all have reached.
    marks: [u32; LANES],
    reached: u32,
    /// Post-copy: the guest may run.
    filling: Option<Filling>,
    has_ended: bool,
}

impl FeedThread {
    fn run(mut self, waiting: &Receiver<Feed>) -> Result<(), FeedError> {
        while let Ok(feed) = waiting.recv() {
            match feed {
                Feed::Batch {
                    lane,
                    batch,
                    wire_bytes,
                } => {
                    match self.filling.clone() {
                        Some(filling) => self.fill(&filling, &batch)?,
                        None => self.batch(&batch)?,
                    }
                    self.applied[lane].fetch_add(wire_bytes, Ordering::Relaxed);
                }
                Feed::Mark { lane, barrier } => self.mark(lane, barrier)?,
                Feed::Tail(pieces) => self.tail(&pieces)?,
                Feed::Package { pieces, filling } => self.package(&pieces, filling)?,
                Feed::Never(at) => self.never(at)?,
                Feed::Raw(bytes) => self.socket.write_all(&bytes)?,
            }
        }
        Ok(())
    }

    fn batch(&mut self, batch: &Batch) -> Result<(), FeedError> {
        self.writer.ram_begin(Phase::Iterate)?;
        for (first, count) in &batch.zeros {
            for page in first.page..first.page + count {
                self.writer.zero(first.block.0, page)?;
            }
        }
        for (at, content) in batch.pages.iter().zip(batch.contents.as_chunks().0) {
            self.writer.page(at.block.0, at.page, content)?;
        }
        self.writer.ram_end()?;
        self.write_out()
    }

    /// Feeds what is lacking of a batch; the last page ends the stream.
    fn fill(&mut self, filling: &Filling, batch: &Batch) -> Result<(), FeedError> {
        if self.has_ended {
            return Ok(());
        }
        let mut waited = Vec::new();
        let mut arrives = |at| match filling.absent.arrive(at) {
            None => false,
            Some(was_asked) => {
                waited.extend(was_asked.then_some(at));
                true
            }
        };
        self.writer.ram_begin(Phase::Iterate)?;
        for (first, count) in &batch.zeros {
            for page in first.page..first.page + count {
                if arrives(PageAddress { page, ..*first }) {
                    self.writer.zero(first.block.0, page)?;
                }
            }
        }
        for (at, content) in batch.pages.iter().zip(batch.contents.as_chunks().0) {
            if arrives(*at) {
                self.writer.page(at.block.0, at.page, content)?;
            }
        }
        self.writer.ram_end()?;
        self.write_out()?;
        for at in waited {
            filling.faults.end(at, now());
        }
        self.end_filled(filling)
    }

    fn end_filled(&mut self, filling: &Filling) -> Result<(), FeedError> {
        if filling.absent.left() == 0 {
            self.has_ended = true;
            self.writer.postcopy_end()?;
            self.write_out()?;
        }
        Ok(())
    }

    fn never(&mut self, at: PageAddress) -> Result<(), FeedError> {
        if self.has_ended {
            return Ok(());
        }
        self.writer.ram_begin(Phase::Iterate)?;
        self.writer.zero(at.block.0, at.page)?;
        self.writer.ram_end()?;
        self.write_out()
    }

    fn package(&mut self, pieces: &[(Bytes, u32)], filling: Filling) -> Result<(), FeedError> {
        let mut tail = Vec::new();
        for (data, raw_len) in pieces {
            tail.extend(unpack(data, *raw_len)?);
        }
        let devices = devices_of(&tail);
        let devices = devices.ok_or_else(|| std::io::Error::other("device state has no end"))?;
        for block in 0..self.writer.blocks().len() {
            let runs = filling.absent.runs(block);
            let block = u16::try_from(block).map_err(std::io::Error::other)?;
            self.writer.postcopy_discard(block, &runs)?;
        }
        self.writer.postcopy_package(devices, PACKAGE_PING)?;
        self.write_out()?;
        self.end_filled(&filling)?;
        self.filling = Some(filling);
        Ok(())
    }

    /// When the last lane reaches a barrier QEMU is asked to say so in its turn. A lane may leave
    /// out one that a later one has replaced.
    fn mark(&mut self, lane: usize, barrier: u32) -> Result<(), FeedError> {
        self.marks[lane] = barrier;
        let reached = self.marks.into_iter().min().unwrap_or(0);
        if reached <= self.reached {
            return Ok(());
        }
        self.reached = reached;
        self.writer.command(Command::Ping(reached))?;
        self.write_out()
    }

    fn tail(&mut self, pieces: &[(Bytes, u32)]) -> Result<(), FeedError> {
        self.writer.ram_begin(Phase::Complete)?;
        self.writer.ram_end()?;
        for (data, raw_len) in pieces {
            self.writer.relayed(&unpack(data, *raw_len)?)?;
        }
        self.write_out()
    }

    fn write_out(&mut self) -> Result<(), FeedError> {
        self.socket.write_all(&self.writer.take())?;
        Ok(())
    }
}

fn unpack(data: &[u8], raw_len: u32) -> std::io::Result<Vec<u8>> {
    tail::unpack(data, raw_len).map_err(|error| std::io::Error::other(error.to_string()))
}
