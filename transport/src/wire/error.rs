//! Why bytes are not the protocol.

use super::limits::{BATCH_MAX_BYTES, FRAME_MAX_BYTES};

/// Why control or lane bytes could not be read or written. `Peer` variants are the other side's
/// doing, `Local` ones are ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A control frame of a type that this version does not have.
    #[error("peer sent a frame of unknown type {0}")]
    UnknownFrame(u8),
    /// A lane frame of a kind that this version does not have.
    #[error("peer sent a lane frame of unknown kind {0}")]
    UnknownLaneFrame(u8),
    /// A control frame is empty or above the limit.
    #[error("peer announced a frame of {0} bytes; the limit is {FRAME_MAX_BYTES}")]
    PeerFrameLength(u32),
    /// A lane frame is empty or above the limit.
    #[error("peer announced a lane frame of {0} bytes; the limit is {BATCH_MAX_BYTES}")]
    PeerLaneFrameLength(u32),
    /// A lane does not begin as a lane.
    #[error("peer opened a stream that is no lane")]
    PeerLaneHeader,
    /// A frame ends inside a field.
    #[error("peer sent a frame of type {frame} that ends inside field {field}")]
    PeerTruncated {
        /// Type of the frame.
        frame: u8,
        /// The field.
        field: &'static str,
    },
    /// A frame has bytes after its last field.
    #[error("peer sent {bytes} bytes too many in a frame of type {frame}")]
    PeerTrailing {
        /// Type of the frame.
        frame: u8,
        /// Bytes left over.
        bytes: usize,
    },
    /// A field holds a value that it may not hold.
    #[error("peer sent a frame of type {frame} with a wrong value in field {field}")]
    PeerValue {
        /// Type of the frame.
        frame: u8,
        /// The field.
        field: &'static str,
    },
    /// A field is longer than its limit.
    #[error("peer sent {bytes} bytes in field {field}; the limit is {bytes_max}")]
    PeerTooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// Its limit.
        bytes_max: usize,
    },
    /// A compressed piece of device state does not unpack to its announced size.
    #[error("peer sent device state that does not unpack to {0} bytes")]
    PeerTail(u32),
    /// A field of a frame that we want to send is longer than its limit.
    #[error("field {field} has {bytes} bytes; the limit is {bytes_max}")]
    LocalTooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// Its limit.
        bytes_max: usize,
    },
    /// zstd could not compress a piece of device state.
    #[error("device state could not be compressed: {0}")]
    LocalCompress(String),
}
