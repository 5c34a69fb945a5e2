//! Gives target QEMU a stream: one thread writes what the lanes have decoded, another reads the
//! return path.
//!
//! ```text
//! lanes: sink (a batch) -Feed (bounded)-> writing -unix-> target QEMU -return path-> Fed to the session
//! ```
//!
//! In post-copy each page is fed once: the set of lacking pages says whether it still is.
//!
//! A page counts as applied when it is in QEMU's socket; a barrier when QEMU has consumed
//! everything before it (it answers an in-stream PING).

mod batch;
mod fed;
mod sink;
mod writing;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use bytes::Bytes;
use qemu_glue::stream::{Command, RamBlock, Writer, return_path};
use tokio::sync::mpsc;
use transport::block::{AbsentPages, BlockSpec, LANES, PageAddress};

use self::batch::Batch;
pub(crate) use self::fed::Fed;
use self::fed::{read_bitmaps, read_return_path};
pub(crate) use self::sink::{Elsewhere, FeedSink};
use self::writing::FeedThread;
use crate::faults::Faults;

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
        let thread = FeedThread::new(
            socket.try_clone()?,
            writer,
            applied.clone(),
            filling,
            has_ended,
        );
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
        FeedSink::new(lane, self.queue.clone(), elsewhere)
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
