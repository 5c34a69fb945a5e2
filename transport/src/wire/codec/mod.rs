//! Control frames to bytes and back. docs/protocol.md#control-frames is the spec.
//!
//! ```text
//! u32 length of the rest | u8 type | body        all numbers big-endian
//! ```

mod names;
mod postcopy;
mod read;
mod write;

use bytes::{Buf, BytesMut};

use super::limits::FRAME_MAX_BYTES;
use super::{Frame, WireError};

/// Frame types.
mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const READY: u8 = 2;
    pub(super) const LAYOUT: u8 = 3;
    pub(super) const LAYOUT_TAKEN: u8 = 4;
    pub(super) const PROGRESS: u8 = 5;
    pub(super) const APPLIED: u8 = 6;
    pub(super) const TAIL: u8 = 7;
    pub(super) const FINAL: u8 = 8;
    pub(super) const LOADED: u8 = 9;
    pub(super) const COMMIT: u8 = 10;
    pub(super) const RUNNING: u8 = 11;
    pub(super) const ANSWER: u8 = 12;
    pub(super) const ASK: u8 = 13;
    pub(super) const SETTLED: u8 = 14;
    pub(super) const ABORT: u8 = 15;
    pub(super) const STOPPED: u8 = 16;
    pub(super) const RELAY: u8 = 17;
    pub(super) const BASIS: u8 = 18;
    pub(super) const QUERY: u8 = 19;
    pub(super) const KNOWN: u8 = 20;
    pub(super) const MISSING: u8 = 21;
    pub(super) const ABSENT: u8 = 22;
    pub(super) const WANTED: u8 = 23;
    pub(super) const URGENT: u8 = 24;
    pub(super) const ALL_PAGES: u8 = 25;
    pub(super) const PROBE: u8 = 32;
}

/// Cuts a control stream into frames, however it is split. Holds at most one frame and what the
/// last `push` brought: drain it after each push.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: BytesMut,
}

impl FrameReader {
    /// At the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes in the order of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether the stream may end here: no frame is begun.
    pub fn is_between_frames(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are no frame of this version. The stream is unusable then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let Some(length) = self
            .buffer
            .first_chunk()
            .map(|bytes| u32::from_be_bytes(*bytes))
        else {
            return Ok(None);
        };
        let frame_bytes = crate::block::index(length).saturating_add(4);
        if length == 0 || frame_bytes > FRAME_MAX_BYTES {
            return Err(WireError::PeerFrameLength(length));
        }
        if self.buffer.len() < frame_bytes {
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(frame_bytes);
        frame.advance(4);
        let kind = frame.get_u8();
        read::frame(kind, frame.freeze()).map(Some)
    }
}
