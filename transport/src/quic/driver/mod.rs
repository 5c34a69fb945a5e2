//! Drives the lanes of one session: dirty pages to QUIC at the source, QUIC to a sink at the target.
//!
//! ```text
//! source  dirty set -(worker: take, encode)-> lane task -(budget)-> QUIC ==WAN==
//! target  ==WAN== QUIC -> lane task -(worker: decode, check)-> sink (blocks: back pressure)
//! ```
//!
//! Encoding and decoding run on sized worker threads, one batch of a lane at a time, so a lane's
//! order holds. A page is encoded when the link has room for it and not earlier: what is in QUIC's
//! send buffer can no longer be replaced by a newer version.

mod basis;
mod effort;
mod questions;
mod source;
mod target;
mod turn;
mod workers;

pub use basis::{Basis, agree, digests};
pub use questions::Questions;
pub use source::{Held, LaneCounters, LaneEvent, LaneSettings, SourceLanes};
pub use target::{LaneFault, LaneSink, TargetLanes};
pub use workers::Workers;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::{LANES, LedgerPart};

/// Makes one thing per lane, in order, or fails as a whole.
fn per_lane<T>(
    parts: [LedgerPart; LANES],
    mut make: impl FnMut(LedgerPart) -> io::Result<T>,
) -> io::Result<[T; LANES]> {
    let made: Vec<T> = parts
        .into_iter()
        .map(&mut make)
        .collect::<io::Result<_>>()?;
    made.try_into()
        .map_err(|_| io::Error::other("not one per lane"))
}

/// A lane's encoder or decoder is locked once per batch; a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
