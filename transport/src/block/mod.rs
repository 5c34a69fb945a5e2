//! An image and what its pages become on the wire.
//!
//! ```text
//! source:  dirty (which pages, taken lane by lane) -> encode (a stage for each encoding) -> batch bytes
//! target:  batch bytes -> decode (digest checked) -> sink (guest) -> ledger
//! ```
//!
//! A **lane** is one of [`LANES`] ordered bulk streams with the 2 MiB ranges that it carries: one
//! owner per address range on both sides, so a page's versions never overtake one another (S6).
//!
//! One page from source to target:
//!
//! ```
//! use std::{io, sync::Arc};
//! use transport::block::*;
//! use transport::wire::{LaneFramer, LaneItem};
//!
//! struct Guest([u8; PAGE_SIZE]);
//! impl Contents for Guest {
//!     fn read(&self, _: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
//!         Ok(into.copy_from_slice(&self.0))
//!     }
//! }
//! impl Sink for Guest {
//!     fn zero(&mut self, _: PageAddress, _: u32) -> io::Result<()> {
//!         Ok(self.0.fill(0))
//!     }
//!     fn page(&mut self, _: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
//!         Ok(self.0.copy_from_slice(content))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (key, incarnation, lane) = ([7; 32], 1, 0);
//! let layout = Arc::new(Layout::new(vec![BlockSpec { name: "ram".into(), pages: 1 }])?);
//! let part = || Ledger::split(&layout, &key)[lane].clone();
//! let (source, mut target) = (Guest([3; PAGE_SIZE]), Guest([0; PAGE_SIZE]));
//!
//! let dirty = DirtySet::new(Arc::clone(&layout));
//! dirty.mark_data(PageAddress { block: BlockId(0), page: 0 });
//! let mut encoder = LaneEncoder::new(part(), &key, FIRST_SEQ, Disable::default())?;
//! let mut stream = bytes::BytesMut::new();
//! encoder.header(incarnation).put(&mut stream);
//! let taken = dirty.take(&mut LaneCursor::new(lane), 64);
//! encoder.encode(&taken, &Sources::of(&source), &mut stream)?;
//!
//! let mut decoder = LaneDecoder::new(part(), &key, incarnation)?;
//! let mut framer = LaneFramer::new();
//! framer.push(&stream);
//! while let Some(item) = framer.next_item()? {
//!     match item {
//!         LaneItem::Header(header) => decoder.open(&header)?,
//!         LaneItem::Batch(body) => drop(decoder.apply(&body, &mut target)?),
//!         LaneItem::Mark { .. } => {}
//!     }
//! }
//! assert_eq!(source.0, target.0);
//! # Ok(())
//! # }
//! ```
//!
//! Reading order: layout, dirty, encode with its stages (zero, same, copy, known, delta, raw, literal),
//! batch, decode, ledger; for post-copy absent, heat, urgent.

mod absent;
mod batch;
mod copy;
mod decode;
mod delta;
mod dirty;
mod disable;
mod encode;
mod error;
mod hash;
mod heat;
mod known;
mod layout;
mod ledger;
mod level;
mod literal;
mod raw;
mod same;
mod sources;
mod stats;
mod urgent;
mod zero;

pub use absent::{ABSENT_RANGE_BYTES, AbsentPages, AbsentRange, BadAbsent, Fault};
pub use copy::CopyIndex;
pub use decode::{Applied, LaneDecoder};
pub use dirty::{DirtySet, LaneCursor, Taken};
pub use disable::{Disable, UnknownStage};
pub use encode::LaneEncoder;
pub use error::DecodeError;
pub use hash::PageHasher;
pub use heat::{Heat, push_order};
pub use known::KnownTable;
pub use layout::{Layout, LayoutError, RangeSpan};
pub use ledger::{FIRST_SEQ, Ledger, LedgerPart};
pub use level::{LevelObservation, approach_level, choose_level};
pub use literal::LEVEL_DEFAULT;
pub use sources::Sources;
pub use stats::{Amount, BatchStats};
pub use urgent::{Urgent, UrgentError, pack_urgent, unpack_urgent};

/// Bytes of one page. Guests with another target page size are refused.
pub const PAGE_SIZE: usize = 4096;
/// Number of ordered bulk streams.
pub const LANES: usize = 8;
/// Pages of one range; a range belongs to one lane.
pub const RANGE_PAGES: u32 = 512;

/// A RAM block by its place in the image's block list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

/// Where a page is: block and page number inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageAddress {
    /// The RAM block.
    pub block: BlockId,
    /// Page number inside the block (byte offset / [`PAGE_SIZE`]).
    pub page: u32,
}

/// Contiguous pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// First page.
    pub first: PageAddress,
    /// Number of pages.
    pub count: u16,
}

/// Name and size of one RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSpec {
    /// QEMU's name of the block, 1 to 255 bytes.
    pub name: String,
    /// Number of pages, at least one.
    pub pages: u32,
}

/// 16-byte keyed BLAKE3 of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash(pub [u8; 16]);

/// Root of a ledger: 32-byte keyed BLAKE3 (see docs/protocol.md#root).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root(pub [u8; 32]);

/// Where the source's page contents come from when a page is encoded.
pub trait Contents: Send + Sync {
    /// Copies the page into the caller's private buffer. A torn read is allowed while the guest
    /// runs: the page is then marked dirty again by whoever wrote it (S7).
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()>;
}

/// The image as the other side last had it: what was sent (source) or applied (target). It stays
/// when the attempt ends, and is the basis of the next one.
pub trait Replica: Send + Sync + std::fmt::Debug {
    /// Copies a page into the caller's buffer; a page that was never written is zero.
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()>;
    /// Keeps contiguous whole pages from `first` on.
    fn write(&self, first: PageAddress, contents: &[u8]) -> std::io::Result<()>;
    /// `count` pages from `first` on are all zero.
    fn zero(&self, first: PageAddress, count: u32) -> std::io::Result<()>;
}

/// Where the target's decoded pages go, in the order of their lane.
pub trait Sink {
    /// `count` pages from `first` on are all zero.
    fn zero(&mut self, first: PageAddress, count: u32) -> std::io::Result<()>;
    /// One page's content.
    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> std::io::Result<()>;
    /// A page as last applied, any lane's: base of a copy or a delta. A sink that cannot be read
    /// makes the decoder ask for the page again.
    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        let _ = (at, into);
        Err(std::io::ErrorKind::Unsupported.into())
    }
    /// Content outside the image, by the number that this side gave for it.
    fn known(&mut self, number: u32, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        let _ = (number, into);
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

const _: () = assert!(usize::BITS >= 32, "page numbers must fit an index");

/// A length that a limit keeps within 16 bits.
pub(crate) fn length_u16(length: usize) -> u16 {
    u16::try_from(length).expect("its limit is below 2^16")
}

/// A length that a limit keeps within 32 bits.
pub(crate) fn length_u32(length: usize) -> u32 {
    u32::try_from(length).expect("its limit is below 2^32")
}

/// A 32-bit number as an index.
pub(crate) const fn index(number: u32) -> usize {
    number as usize
}

#[cfg(test)]
mod tests;
