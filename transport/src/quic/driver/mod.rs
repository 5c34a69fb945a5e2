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

mod source;
mod target;
mod workers;

pub use source::{LaneCounters, LaneEvent, LaneSettings, SourceLanes};
pub use target::{LaneSink, TargetLanes};
pub use workers::Workers;
