//! The bytes between two agents. docs/protocol.md is the spec.
//!
//! ```text
//! control stream:  frame (what is said) <-> codec (its bytes)
//! lane stream:     lane (header, then batches and marks); what a batch holds is block's business
//! ```

mod codec;
mod error;
mod frame;
mod lane;
pub mod limits;
pub mod tail;

pub use codec::FrameReader;
pub use error::WireError;
pub use frame::*;
pub(crate) use lane::put_batch;
pub use lane::{LANE_FRAME_HEAD_BYTES, LaneFramer, LaneHeader, LaneItem, put_mark};

/// Feature bits that this build has. Version 1 assigns none: what both sides must know is the
/// version's business, and a bit is for what one side may lack. Unknown bits are ignored.
pub const FEATURES: u64 = 0;
