//! QEMU's migration stream, read and written; no I/O, no clock.
//!
//! ```text
//! source QEMU -bytes-> Parser -Event-> (engine) -calls-> Writer -bytes-> target QEMU
//!                                                  return_path: the messages the other way
//!
//! Head, Command*, Blocks, section*, {ram and dirty-bitmap sections}*, GuestStopped,
//! {last ram and dirty-bitmap sections}, Tail* (opaque device state, EOF, description)
//! ```
//!
//! The parser takes any split of the input and copies only what a split cut. No body of a section
//! has a length in this format, so it must understand every section before the device state: `ram`
//! and `dirty-bitmap`. Anything else is [`StreamError::UnsupportedSection`] and the like; while no
//! page has been seen, [`Parser::take_prelude`] gives back every byte, and the caller may relay the
//! migration byte for byte. Device state is never looked into (see [`TailState`] for how its end is
//! found).
//!
//! Reading order: this file, `parser`, `ram`, `bitmap`, `tail`, `writer`, `postcopy`, `xbzrle`,
//! `return_path`.
//! Facts cite QEMU's tree: `migration/savevm.c`, `migration/ram.c`, `docs/devel/migration/main.rst`.

#![forbid(unsafe_code)]

mod bitmap;
mod cursor;
mod error;
mod head;
mod parser;
mod postcopy;
mod ram;
pub mod return_path;
mod section;
mod tail;
mod writer;
pub mod xbzrle;

pub use error::{Place, StreamError};
pub use parser::{Limits, Parser};
pub use postcopy::devices_of;
pub use tail::{EndWatch, TailState};
pub use writer::{WriteError, Writer};

/// Bytes of one guest page; sources with another target page size are refused.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] in the type of offsets.
const PAGE_SIZE_U64: u64 = 4096;

/// Name and size of a RAM block, as the source's block list has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of the block, 1 to 255 bytes.
    pub name: String,
    /// Number of pages of [`PAGE_SIZE`], at least one.
    pub pages: u32,
}

/// Where in the migration a section stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// START section: block list, headers.
    Setup,
    /// PART section: the guest runs (or has just stopped).
    Iterate,
    /// END section: the guest is stopped.
    Complete,
}

/// A command of the stream that a source sends in pre-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Asks the target to answer on the same socket.
    OpenReturnPath,
    /// Asks for a pong with this value once everything before it has been read.
    Ping(u32),
    /// Announces postcopy of dirty bitmaps only (no payload); postcopy of RAM is refused.
    PostcopyAdviseBitmaps,
    /// The guest is stopped and will not run at the source again unless the migration fails.
    SwitchoverStart,
}

/// What the parser found, in the order of the stream. Slices live until the sink returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Magic, version, configuration section and its subsections: the exact bytes.
    Head(&'a [u8]),
    /// A command.
    Command(Command),
    /// The ram section's start with the whole block list; later events name blocks by its index.
    Blocks {
        /// The source's number for the ram section.
        section_id: u32,
        /// The block list in the source's order.
        blocks: &'a [RamBlock],
    },
    /// A ram section of this phase begins ([`Phase::Setup`] is announced by `Blocks` alone).
    RamBegin(Phase),
    /// A page's content. It may be torn: the source then sends the page again.
    Page {
        /// Index in the block list.
        block: u16,
        /// Page number in the block.
        page: u32,
        /// The bytes.
        content: &'a [u8; PAGE_SIZE],
    },
    /// A page that is all zero.
    Zero {
        /// Index in the block list.
        block: u16,
        /// Page number in the block.
        page: u32,
    },
    /// A change of the last sent version of a page, for [`xbzrle::apply`].
    Xbzrle {
        /// Index in the block list.
        block: u16,
        /// Page number in the block.
        page: u32,
        /// The encoded change, 1 to [`PAGE_SIZE`] bytes.
        encoded: &'a [u8],
    },
    /// The source waits here for its other channels: it uses multifd, whose pages do not come
    /// through this stream.
    MultifdFlush,
    /// A ram section ended. No page in an [`Phase::Iterate`] section means that a pass is drained.
    RamEnd {
        /// The section's phase.
        phase: Phase,
        /// Page, zero and xbzrle records in it.
        pages: u64,
    },
    /// The guest is stopped: SWITCHOVER_START or the first END section, whichever came first.
    GuestStopped,
    /// Bytes of a whole section that only the target needs (`dirty-bitmap`), in pieces.
    Section {
        /// The section's phase.
        phase: Phase,
        /// The next bytes of it, from its type byte to its footer; never empty.
        bytes: &'a [u8],
        /// This piece is the section's last.
        last: bool,
    },
    /// Opaque bytes from the first section after RAM on: device state, EOF, description.
    Tail(&'a [u8]),
}

// Section types and framing (savevm.h).
const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const TYPE_EOF: u8 = 0x00;
const TYPE_START: u8 = 0x01;
const TYPE_PART: u8 = 0x02;
const TYPE_END: u8 = 0x03;
const TYPE_FULL: u8 = 0x04;
const TYPE_SUBSECTION: u8 = 0x05;
const TYPE_DESCRIPTION: u8 = 0x06;
const TYPE_CONFIGURATION: u8 = 0x07;
const TYPE_COMMAND: u8 = 0x08;
const TYPE_FOOTER: u8 = 0x7e;

// Commands (savevm.c, enum qemu_vm_cmd).
const COMMAND_OPEN_RETURN_PATH: u16 = 1;
const COMMAND_PING: u16 = 2;
const COMMAND_POSTCOPY_ADVISE: u16 = 3;
const COMMAND_POSTCOPY_LISTEN: u16 = 4;
const COMMAND_POSTCOPY_RUN: u16 = 5;
const COMMAND_POSTCOPY_RAM_DISCARD: u16 = 6;
const COMMAND_PACKAGED: u16 = 7;
const COMMAND_POSTCOPY_RESUME: u16 = 9;
const COMMAND_RECV_BITMAP: u16 = 10;
const COMMAND_SWITCHOVER_START: u16 = 11;

// Flags of a ram record (ram.h), in the low twelve bits of its offset.
const RAM_ZERO: u64 = 0x002;
const RAM_MEM_SIZE: u64 = 0x004;
const RAM_PAGE: u64 = 0x008;
const RAM_EOS: u64 = 0x010;
const RAM_CONTINUE: u64 = 0x020;
const RAM_XBZRLE: u64 = 0x040;
const RAM_MULTIFD_FLUSH: u64 = 0x200;

const RAM_SECTION: &[u8] = b"ram";
const RAM_SECTION_VERSION: u32 = 4;
const BITMAP_SECTION: &[u8] = b"dirty-bitmap";
const BITMAP_SECTION_VERSION: u32 = 1;
