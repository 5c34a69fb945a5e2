//! The bytes of a lane: a header, then length-prefixed frames, each a batch or a mark.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::WireError;
use super::limits::BATCH_MAX_BYTES;
use crate::block::LANES;

/// First bytes of a lane: "SWL" and the protocol's version.
const MAGIC: [u8; 4] = *b"SWL\x01";
/// Bytes of the lane header.
const HEADER_BYTES: usize = 4 + 1 + 8 + 4;
/// Bytes of a lane frame before its body: length and kind.
pub const LANE_FRAME_HEAD_BYTES: usize = 4 + 1;

const KIND_BATCH: u8 = 1;
const KIND_MARK: u8 = 2;

/// First bytes of a lane's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneHeader {
    /// The lane, below [`LANES`].
    pub lane: usize,
    /// The source's incarnation for this connection; streams of an older one are refused (S6).
    pub incarnation: u64,
    /// Number of the first batch on this stream.
    pub first_seq: u32,
}

impl LaneHeader {
    /// Appends the header's bytes.
    ///
    /// # Panics
    /// When there is no such lane.
    pub fn put(&self, out: &mut BytesMut) {
        assert!(self.lane < LANES, "lane {} does not exist", self.lane);
        out.put_slice(&MAGIC);
        out.put_u8(u8::try_from(self.lane).expect("LANES fits a byte"));
        out.put_u64(self.incarnation);
        out.put_u32(self.first_seq);
    }
}

/// Appends the frame of a batch whose body of exactly `body_bytes` is written by `body`.
pub(crate) fn put_batch(out: &mut BytesMut, body_bytes: usize, body: impl FnOnce(&mut BytesMut)) {
    let frame_bytes = body_bytes + LANE_FRAME_HEAD_BYTES;
    assert!(
        frame_bytes <= BATCH_MAX_BYTES,
        "a batch of {frame_bytes} bytes"
    );
    out.reserve(frame_bytes);
    let end = out.len() + frame_bytes;
    out.put_u32(crate::block::length_u32(body_bytes + 1));
    out.put_u8(KIND_BATCH);
    body(out);
    assert_eq!(out.len(), end, "the body has the announced length");
}

/// Appends a mark: everything of this lane before it belongs to barrier `barrier` or an earlier one.
pub fn put_mark(out: &mut BytesMut, barrier: u32) {
    out.put_u32(1 + 4);
    out.put_u8(KIND_MARK);
    out.put_u32(barrier);
}

/// What a lane brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneItem {
    /// The header; always the first item and never again.
    Header(LaneHeader),
    /// Body of one batch, for [`LaneDecoder::apply`](crate::block::LaneDecoder::apply).
    Batch(Bytes),
    /// End of a round on this lane.
    Mark {
        /// Number of the barrier, counted from 1.
        barrier: u32,
    },
}

impl LaneItem {
    /// Bytes that the item took on the lane.
    pub fn wire_bytes(&self) -> usize {
        match self {
            Self::Header(_) => HEADER_BYTES,
            Self::Batch(body) => LANE_FRAME_HEAD_BYTES + body.len(),
            Self::Mark { .. } => LANE_FRAME_HEAD_BYTES + 4,
        }
    }
}

/// Cuts a lane's bytes into items, however they are split. Holds at most one frame and what the
/// last `push` brought: drain it after each push.
#[derive(Debug, Default)]
pub struct LaneFramer {
    buffer: BytesMut,
    has_header: bool,
}

impl LaneFramer {
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

    /// The next whole item, `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are no lane. The stream is unusable then.
    pub fn next_item(&mut self) -> Result<Option<LaneItem>, WireError> {
        if !self.has_header {
            return self.next_header();
        }
        let Some(length) = self
            .buffer
            .first_chunk()
            .map(|bytes| u32::from_be_bytes(*bytes))
        else {
            return Ok(None);
        };
        let frame_bytes = crate::block::index(length).saturating_add(4);
        if length == 0 || frame_bytes > BATCH_MAX_BYTES {
            return Err(WireError::PeerLaneFrameLength(length));
        }
        if self.buffer.len() < frame_bytes {
            self.buffer.reserve(frame_bytes - self.buffer.len());
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(frame_bytes);
        frame.advance(4);
        match (frame.get_u8(), frame.len()) {
            (KIND_BATCH, _) => Ok(Some(LaneItem::Batch(frame.freeze()))),
            (KIND_MARK, 4) => Ok(Some(LaneItem::Mark {
                barrier: frame.get_u32(),
            })),
            (KIND_MARK, _) => Err(WireError::PeerLaneFrameLength(length)),
            (kind, _) => Err(WireError::UnknownLaneFrame(kind)),
        }
    }

    fn next_header(&mut self) -> Result<Option<LaneItem>, WireError> {
        let known = self.buffer.len().min(MAGIC.len());
        if self.buffer[..known] != MAGIC[..known] {
            return Err(WireError::PeerLaneHeader);
        }
        if self.buffer.len() < HEADER_BYTES {
            return Ok(None);
        }
        let mut bytes = self.buffer.split_to(HEADER_BYTES);
        bytes.advance(MAGIC.len());
        let header = LaneHeader {
            lane: usize::from(bytes.get_u8()),
            incarnation: bytes.get_u64(),
            first_seq: bytes.get_u32(),
        };
        if header.lane >= LANES || header.first_seq == 0 {
            return Err(WireError::PeerLaneHeader);
        }
        self.has_header = true;
        Ok(Some(LaneItem::Header(header)))
    }
}
