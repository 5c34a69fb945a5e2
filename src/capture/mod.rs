//! Takes source QEMU's stream: one thread reads the socket at full speed, whatever the link does.
//!
//! ```text
//! QEMU -unix-> parser -> page content into the shadow file, then its dirty flag (S7's order)
//!                     -> head, block list, device state to the session, whole
//! ```
//!
//! Nothing here waits for the link, so QEMU never blocks on its socket, not even after a stop that
//! nobody asked for (S5): every page has its place in the shadow. Device state is bounded.

mod pages;
mod reading;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use qemu_glue::memory::SharedRam;
use qemu_glue::stream::{StreamError, return_path};
use tokio::sync::{Notify, mpsc};
use transport::block::{DirtySet, Heat, Layout, PageAddress};

use self::pages::{RUN_MAX_BYTES, Zeroed};
use crate::mapped::SourceMemory;
use crate::relay::Spool;

/// Events that may wait for the session; each is small, and few come.
const EVENTS_MAX: usize = 64;

/// What the session is told.
#[derive(Debug)]
pub(crate) enum Captured {
    /// The stream's head and the image that it describes.
    Head { head: Bytes, image: Image },
    /// The stream has something unknown before its first page: its bytes are relayed.
    Relay { spool: Arc<Spool> },
    /// A pass has no more pages. `era`: how often the stream was opened before it was read.
    PassDrained { pages: u64, era: u32 },
    /// All pages are in.
    RamEnd,
    /// Device state, compressed in pieces.
    Tail {
        pieces: Vec<(Bytes, u32)>,
        total_bytes: u64,
    },
    /// QEMU closed, or its stream is wrong, or the disk failed.
    Failed(String),
}

/// The captured image: shared by this thread and the lanes.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) layout: Arc<Layout>,
    pub(crate) dirty: Arc<DirtySet>,
    pub(crate) heat: Arc<Heat>,
    pub(crate) memory: Arc<SourceMemory>,
}

/// A running capture.
#[derive(Debug)]
pub(crate) struct Capture {
    socket: UnixStream,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    announced_pages: AtomicU64,
    era: AtomicU32,
    /// QEMU syncs without a pause: ends of passes tell nothing.
    is_armed: AtomicBool,
    spool: Mutex<Option<Arc<Spool>>>,
}

impl Capture {
    /// Takes the accepted socket. `folder` is where the shadow goes; `wake` is notified when pages
    /// were marked.
    pub(crate) fn start(
        socket: UnixStream,
        folder: PathBuf,
        shared: Option<SharedRam>,
        wake: Arc<Notify>,
    ) -> std::io::Result<(Capture, mpsc::Receiver<Captured>)> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let counters = Arc::new(Counters::default());
        let reader = Reader {
            socket: socket.try_clone()?,
            folder,
            shared,
            wake,
            events,
            is_stopped: false,
            counters: counters.clone(),
            head: Bytes::new(),
            head_told: false,
            image: None,
            run: Vec::with_capacity(RUN_MAX_BYTES),
            run_first: None,
            pass_pages: 0,
            empty_sections: 0,
            tail: Vec::new(),
            zeroed: Zeroed::default(),
        };
        std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || reader.run())?;
        Ok((Capture { socket, counters }, receiver))
    }

    /// Pages announced so far, every announcement counted.
    pub(crate) fn announced_pages(&self) -> u64 {
        self.counters.announced_pages.load(Ordering::Relaxed)
    }

    /// Ends of passes that are read from here on belong to the next era.
    pub(crate) fn next_era(&self) {
        self.counters.era.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether QEMU syncs without a pause: then nobody is told of the ends of its passes.
    pub(crate) fn set_armed(&self, is_armed: bool) {
        self.counters.is_armed.store(is_armed, Ordering::Release);
    }

    /// The only door of the return path (S4): messages of ours, never forwarded bytes.
    pub(crate) fn answer(&self, message: &return_path::Message) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        (&self.socket).write_all(&bytes)
    }

    /// The guest is stopped: a relay must take every byte from here on (S5).
    pub(crate) fn guest_stopped(&self) {
        let spool = self
            .counters
            .spool
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(spool) = &*spool {
            spool.open_wide();
        }
    }

    /// Closes the socket: without SHUT(0) before it, QEMU fails the migration and resumes.
    pub(crate) fn close(&self) {
        self.guest_stopped();
        if let Err(error) = self.socket.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "capture socket was closed already");
        }
    }
}

/// Why a capture ends.
#[derive(Debug, thiserror::Error)]
enum CaptureError {
    #[error("QEMU's stream: {0}")]
    Stream(#[from] StreamError),
    #[error("QEMU's socket or the shadow file: {0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Refused(String),
    #[error("the session has ended")]
    SessionGone,
}

struct Reader {
    socket: UnixStream,
    folder: PathBuf,
    shared: Option<SharedRam>,
    wake: Arc<Notify>,
    events: mpsc::Sender<Captured>,
    /// The guest is stopped: the stream and shared memory must agree.
    is_stopped: bool,
    counters: Arc<Counters>,
    head: Bytes,
    head_told: bool,
    image: Option<Image>,
    /// Contiguous pages that wait for one write.
    run: Vec<u8>,
    run_first: Option<PageAddress>,
    pass_pages: u64,
    empty_sections: u32,
    tail: Vec<u8>,
    /// Pages that QEMU sent last as zero: the base of their next xbzrle change.
    zeroed: Zeroed,
}
