//! Takes source QEMU's stream: one thread reads the socket at full speed, whatever the link does.
//!
//! ```text
//! QEMU -unix-> parser -> page content into the shadow file, then its dirty flag (S7's order)
//!                     -> head, block list, device state to the session, whole
//! ```
//!
//! Nothing here waits for the link, so QEMU never blocks on its socket, not even after a stop that
//! nobody asked for (S5): every page has its place in the shadow. Device state is bounded.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_glue::memory::SharedRam;
use qemu_glue::stream::{
    Command, EndWatch, Event, Limits, PAGE_SIZE, Parser, Phase, RamBlock, StreamError, TailState,
    return_path, xbzrle,
};
use tokio::sync::{Notify, mpsc};
use transport::block::{BlockId, BlockSpec, Contents, DirtySet, Heat, Layout, PageAddress};
use transport::wire::limits::{HEAD_MAX_BYTES, TAIL_MAX_BYTES};
use transport::wire::{Frame, tail};

use crate::mapped::SourceMemory;
use crate::relay::Spool;

/// Bytes per read of the socket: about eight of QEMU's own writes.
const READ_BYTES: usize = 1 << 20;
/// Contiguous pages that are stored with one write.
const RUN_MAX_BYTES: usize = 64 * PAGE_SIZE;
/// Silence after a complete description that makes it the end of the stream.
const QUIET: Duration = Duration::from_millis(5);
/// Empty sections in a row that end a pass without a page.
const EMPTY_SECTIONS: u32 = 3;
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

impl Reader {
    fn run(mut self) {
        let mut parser = Parser::new(Limits::default());
        let ended = match self.read_stream(&mut parser) {
            Err(CaptureError::Stream(error)) if error.may_relay() => match parser.take_prelude() {
                Some(prelude) => {
                    tracing::warn!(
                        "{error}: this migration is relayed byte for byte, without dedup, rounds or proof of memory"
                    );
                    self.relay(&prelude)
                }
                None => Err(error.into()),
            },
            other => other,
        };
        // Nothing may be read into a shadow that is not written; an error ends the attempt.
        if let Err(error) = ended {
            let told = self
                .events
                .blocking_send(Captured::Failed(error.to_string()));
            tracing::debug!(%error, session = told.is_ok(), "capture ended");
        }
    }

    fn read_stream(&mut self, parser: &mut Parser) -> Result<(), CaptureError> {
        let mut buffer = vec![0; READ_BYTES];
        let mut delivered = false;
        loop {
            let complete = parser.tail_state() == TailState::Complete;
            let wait = (complete && !delivered).then_some(QUIET);
            self.socket.set_read_timeout(wait)?;
            match self.socket.read(&mut buffer) {
                Ok(0) => return self.closed(parser, delivered),
                Ok(_) if delivered => {
                    return Err(CaptureError::Refused(
                        "QEMU's stream went on after its end".into(),
                    ));
                }
                Ok(count) => {
                    parser.push(&buffer[..count], &mut |event| self.event(event))?;
                    self.flush_run()?;
                    self.wake.notify_waiters();
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && complete => {
                    self.deliver_tail()?;
                    delivered = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Bytes as they come, until a whole description is followed by silence.
    fn relay(&mut self, prelude: &[u8]) -> Result<(), CaptureError> {
        let spool = Arc::new(Spool::create(&self.folder)?);
        *self
            .counters
            .spool
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(spool.clone());
        self.tell(Captured::Relay {
            spool: spool.clone(),
        })?;
        let mut watch = EndWatch::new();
        watch.push(prelude);
        spool.write(prelude)?;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let complete = watch.state() == TailState::Complete;
            self.socket.set_read_timeout(complete.then_some(QUIET))?;
            match self.socket.read(&mut buffer) {
                Ok(0) => {
                    let text = "QEMU closed its stream before the handover";
                    return Err(CaptureError::Refused(text.into()));
                }
                Ok(count) => {
                    watch.push(&buffer[..count]);
                    spool.write(&buffer[..count])?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && complete => {
                    spool.end();
                    return Ok(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// QEMU closes its socket only after SHUT(0), or when its migration failed.
    fn closed(&self, parser: &Parser, delivered: bool) -> Result<(), CaptureError> {
        if delivered {
            return Ok(());
        }
        parser.finish()?;
        Err(CaptureError::Refused(
            "QEMU closed its stream before the handover".into(),
        ))
    }

    fn event(&mut self, event: Event<'_>) -> Result<(), CaptureError> {
        match event {
            Event::Head(bytes) => self.head = Bytes::copy_from_slice(bytes),
            Event::Command(Command::Ping(value)) => self.pong(value)?,
            Event::Command(Command::OpenReturnPath | Command::SwitchoverStart) => {}
            Event::GuestStopped => self.is_stopped = true,
            // Set-up is over, no unknown section can come before the first page any more.
            Event::RamBegin(_) => self.tell_head()?,
            Event::Command(Command::PostcopyAdviseBitmaps) => {}
            Event::Blocks { blocks, .. } => self.blocks(blocks)?,
            Event::Page {
                block,
                page,
                content,
            } => self.page(address(block, page), content)?,
            Event::Zero { block, page } => self.zero(address(block, page))?,
            Event::Xbzrle {
                block,
                page,
                encoded,
            } => {
                self.xbzrle(address(block, page), encoded)?;
            }
            Event::MultifdFlush => {
                return Err(CaptureError::Refused(
                    "QEMU sends pages over other sockets (multifd)".into(),
                ));
            }
            Event::RamEnd { phase, pages } => self.ram_end(phase, pages)?,
            // Dirty bitmaps of disks travel with the device state, in their order.
            Event::Section { bytes, .. } | Event::Tail(bytes) => self.keep_tail(bytes)?,
        }
        Ok(())
    }

    fn pong(&self, value: u32) -> Result<(), CaptureError> {
        let mut bytes = Vec::new();
        return_path::Message::Pong(value).encode(&mut bytes);
        Ok((&self.socket).write_all(&bytes)?)
    }

    /// Makes room for every page before the first one is read.
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), CaptureError> {
        if self.head.len() > HEAD_MAX_BYTES {
            return Err(CaptureError::Refused(
                "the stream's head is over its limit".into(),
            ));
        }
        let specs = blocks
            .iter()
            .map(|block| BlockSpec {
                name: block.name.clone(),
                pages: block.pages,
            })
            .collect();
        let layout = Layout::new(specs)
            .map_err(|error| CaptureError::Refused(format!("this guest's memory: {error}")))?;
        let shared = self.shared.take();
        let memory = SourceMemory::create(&self.folder, &layout, shared).map_err(|error| {
            let mib = layout.pages_total() / 256;
            let folder = self.folder.display();
            CaptureError::Refused(format!(
                "cannot reserve {mib} MiB in {folder} for pages that wait for the link: {error}; \
                 free some space, or give --state-dir on a larger disk"
            ))
        })?;
        let layout = Arc::new(layout);
        let image = Image {
            dirty: Arc::new(DirtySet::new(layout.clone())),
            heat: Arc::new(Heat::new(layout.clone())),
            memory: Arc::new(memory),
            layout,
        };
        self.zeroed = Zeroed::of(&image.layout);
        self.image = Some(image);
        Ok(())
    }

    fn tell_head(&mut self) -> Result<(), CaptureError> {
        if self.head_told {
            return Ok(());
        }
        self.head_told = true;
        let image = self.image()?.clone();
        self.tell(Captured::Head {
            head: self.head.clone(),
            image,
        })
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> Result<(), CaptureError> {
        if self.image()?.memory.is_shared(at.block) {
            return self.shared_page(at, content);
        }
        let continues = self.run_first.is_some_and(|first| {
            let pages = self.run.len() / PAGE_SIZE;
            first.block == at.block && u64::from(first.page) + pages as u64 == u64::from(at.page)
        });
        if !continues || self.run.len() >= RUN_MAX_BYTES {
            self.flush_run()?;
            self.run_first = Some(at);
        }
        self.run.extend_from_slice(content);
        self.zeroed.set(at, false);
        self.announced()
    }

    /// The stream only says that the page is dirty; its content is read when it is sent (S7).
    fn shared_page(
        &mut self,
        at: PageAddress,
        content: &[u8; PAGE_SIZE],
    ) -> Result<(), CaptureError> {
        self.flush_run()?;
        let image = self.image()?;
        if self.is_stopped {
            // Nothing writes any more: if these differ, it is not the guest's memory (S9).
            let mut found = [0; PAGE_SIZE];
            image.memory.read(at, &mut found)?;
            if found != *content {
                return Err(CaptureError::Refused(format!(
                    "shared memory differs from QEMU's stream at {at:?}: use --mapped off"
                )));
            }
        }
        image.dirty.mark_data(at);
        image.heat.note(at);
        self.announced()
    }

    fn zero(&mut self, at: PageAddress) -> Result<(), CaptureError> {
        self.flush_run()?;
        let image = self.image()?;
        image.dirty.mark_zero(at);
        image.heat.note(at);
        self.zeroed.set(at, true);
        self.announced()
    }

    /// A change against the version that QEMU sent last, which is what the shadow holds (S8).
    fn xbzrle(&mut self, at: PageAddress, encoded: &[u8]) -> Result<(), CaptureError> {
        self.flush_run()?;
        let mut content = [0; PAGE_SIZE];
        let image = self.image()?;
        // The shadow keeps no zero pages.
        if image.memory.is_shared(at.block) {
            let text = "QEMU sends xbzrle changes, which exclude reading its memory (S8)";
            return Err(CaptureError::Refused(text.into()));
        }
        if !self.zeroed.get(at) {
            image.memory.read(at, &mut content)?;
        }
        xbzrle::apply(&mut content, encoded)
            .map_err(|error| CaptureError::Refused(format!("xbzrle: {error}")))?;
        self.page(at, &content)
    }

    /// Content first, flags second: whoever takes a flag finds the content.
    fn flush_run(&mut self) -> Result<(), CaptureError> {
        let Some(first) = self.run_first.take() else {
            return Ok(());
        };
        let image = self.image.as_ref().ok_or(CaptureError::SessionGone)?;
        image.memory.write(first, &self.run)?;
        let pages = u32::try_from(self.run.len() / PAGE_SIZE).unwrap_or(0);
        for page in first.page..first.page + pages {
            let at = PageAddress { page, ..first };
            image.dirty.mark_data(at);
            image.heat.note(at);
        }
        self.run.clear();
        Ok(())
    }

    fn announced(&mut self) -> Result<(), CaptureError> {
        self.counters
            .announced_pages
            .fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn image(&self) -> Result<&Image, CaptureError> {
        self.image.as_ref().ok_or(CaptureError::SessionGone)
    }

    fn ram_end(&mut self, phase: Phase, pages: u64) -> Result<(), CaptureError> {
        self.flush_run()?;
        match phase {
            Phase::Setup => Ok(()),
            Phase::Complete => self.tell(Captured::RamEnd),
            Phase::Iterate => self.pass_part(pages),
        }
    }

    fn pass_part(&mut self, pages: u64) -> Result<(), CaptureError> {
        if self.counters.is_armed.load(Ordering::Acquire) {
            (self.pass_pages, self.empty_sections) = (0, 0);
            return Ok(());
        }
        if pages > 0 {
            self.pass_pages += pages;
            self.empty_sections = 0;
            return Ok(());
        }
        self.empty_sections += 1;
        if self.pass_pages > 0 || self.empty_sections == EMPTY_SECTIONS {
            self.empty_sections = 0;
            let pages = std::mem::take(&mut self.pass_pages);
            let era = self.counters.era.load(Ordering::Acquire);
            return self.tell(Captured::PassDrained { pages, era });
        }
        Ok(())
    }

    fn keep_tail(&mut self, bytes: &[u8]) -> Result<(), CaptureError> {
        self.tail.extend_from_slice(bytes);
        if self.tail.len() as u64 > TAIL_MAX_BYTES {
            return Err(CaptureError::Refused(format!(
                "device state is larger than {} MiB",
                TAIL_MAX_BYTES >> 20
            )));
        }
        Ok(())
    }

    fn deliver_tail(&mut self) -> Result<(), CaptureError> {
        let total_bytes = self.tail.len() as u64;
        let pieces = compress(&self.tail)?;
        self.tell(Captured::Tail {
            pieces,
            total_bytes,
        })
    }

    fn tell(&self, event: Captured) -> Result<(), CaptureError> {
        self.events
            .blocking_send(event)
            .map_err(|_| CaptureError::SessionGone)
    }
}

/// One bit per page.
#[derive(Debug, Default)]
struct Zeroed(Vec<Vec<u64>>);

impl Zeroed {
    fn of(layout: &Layout) -> Zeroed {
        let words = |pages: u32| vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(0)];
        Zeroed(
            layout
                .blocks()
                .iter()
                .map(|block| words(block.pages))
                .collect(),
        )
    }

    fn set(&mut self, at: PageAddress, zero: bool) {
        let word = self.0.get_mut(usize::from(at.block.0));
        if let Some(word) = word.and_then(|words| words.get_mut(at.page as usize / 64)) {
            let bit = 1 << (at.page % 64);
            *word = if zero { *word | bit } else { *word & !bit };
        }
    }

    fn get(&self, at: PageAddress) -> bool {
        let word = self.0.get(usize::from(at.block.0));
        word.and_then(|words| words.get(at.page as usize / 64))
            .is_some_and(|word| word & (1 << (at.page % 64)) != 0)
    }
}

/// Device state in pieces for the control stream.
fn compress(tail: &[u8]) -> Result<Vec<(Bytes, u32)>, CaptureError> {
    let mut pieces = Vec::new();
    for piece in tail.chunks(tail::TAIL_PIECE_MAX_BYTES) {
        match tail::pack(piece) {
            Ok(Frame::Tail { data, raw_len }) => pieces.push((data, raw_len)),
            Ok(other) => return Err(CaptureError::Refused(format!("packed as {}", other.name()))),
            Err(error) => return Err(CaptureError::Refused(error.to_string())),
        }
    }
    Ok(pieces)
}

fn address(block: u16, page: u32) -> PageAddress {
    PageAddress {
        block: BlockId(block),
        page,
    }
}
