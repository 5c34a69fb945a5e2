//! Which memory of the QEMU process is which RAM block, and reading it.
//!
//! [`ramblock`] (pure) reads QEMU's own table of its blocks, [`flat_view`] (pure) fills in what that
//! of an old QEMU lacks; [`process`] reads pages of a running or stopped guest from `/proc/PID/mem`,
//! [`shared`] reads and writes RAM that QEMU shares, found through [`maps`] (pure).
//! A block whose place is not certain is an error, never a
//! guess: one wrong page passes every later check of hashes (S9).

pub mod flat_view;
pub mod maps;
pub mod process;
pub mod ramblock;
pub mod shared;

pub use process::{ExpectedBlock, GuestMemory, MemoryError};
pub use ramblock::{RamBlock, RamBlockError};
pub use shared::SharedRam;
