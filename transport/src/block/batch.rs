//! The bytes of one batch. docs/protocol.md#batch is the spec.

use bytes::{BufMut, BytesMut};

use super::hash::{DerivedKey, first_16};
use super::{BatchStats, BlockId, LANES, PAGE_SIZE, PageAddress, PageHash, PageRun, RANGE_PAGES};
use super::{copy, known};
use crate::wire::limits::{BATCH_MAX_BYTES, BATCH_MAX_PAGES, BATCH_MAX_RECORDS};

/// Bytes of a batch before its records: seq, record count, literal and delta bytes, digest.
pub(super) const HEAD_BYTES: usize = 4 + 2 + 4 + 4 + 16;
/// Bytes of one record.
pub(super) const RECORD_BYTES: usize = 1 + 2 + 4 + 2;

const _: () = assert!(
    HEAD_BYTES
        + BATCH_MAX_RECORDS * RECORD_BYTES
        + BATCH_MAX_PAGES * (PAGE_SIZE + copy::REFERENCE_BYTES)
        + 5
        <= BATCH_MAX_BYTES,
    "the largest batch fits its frame"
);
const _: () = assert!(
    LANES > 1,
    "a run ends with its range because the next one is another lane's"
);

/// How a run of pages is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// All zero, no payload.
    Zero,
    /// Content of other pages, in order.
    Copy,
    /// Content outside the image, by consecutive numbers.
    Known,
    /// In the batch's zstd frame over last versions.
    Delta,
    /// In the batch's zstd frame.
    Literal,
    /// In the batch's raw bytes.
    Raw,
}

impl Encoding {
    /// Numbers follow the order of the encodings; same (1) is never on the wire.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Zero => 2,
            Self::Copy => 3,
            Self::Known => 4,
            Self::Delta => 5,
            Self::Literal => 6,
            Self::Raw => 7,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        match code {
            2 => Some(Self::Zero),
            3 => Some(Self::Copy),
            4 => Some(Self::Known),
            5 => Some(Self::Delta),
            6 => Some(Self::Literal),
            7 => Some(Self::Raw),
            _ => None,
        }
    }

    /// Bytes that each run of this encoding has among the references.
    pub(super) fn reference_bytes(self) -> usize {
        match self {
            Self::Copy => copy::REFERENCE_BYTES,
            Self::Known => known::REFERENCE_BYTES,
            Self::Zero | Self::Delta | Self::Literal | Self::Raw => 0,
        }
    }

    /// Whether it draws on what the other side should have.
    pub(super) fn refers(self) -> bool {
        matches!(self, Self::Copy | Self::Known | Self::Delta)
    }
}

/// A run of neighbours with one encoding, inside one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) encoding: Encoding,
    pub(super) first: PageAddress,
    pub(super) count: u16,
}

impl Record {
    /// Whether a page continues this run.
    pub(super) fn continues_with(&self, encoding: Encoding, at: PageAddress) -> bool {
        self.encoding == encoding
            && self.first.block == at.block
            && u64::from(self.first.page) + u64::from(self.count) == u64::from(at.page)
            && self.first.page / RANGE_PAGES == at.page / RANGE_PAGES
    }

    pub(super) fn put(&self, out: &mut BytesMut) {
        out.put_u8(self.encoding.code());
        out.put_u16(self.first.block.0);
        out.put_u32(self.first.page);
        out.put_u16(self.count);
    }

    /// Splits a record's bytes; `None` for an unknown encoding.
    pub(super) fn parse(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let [code, b0, b1, p0, p1, p2, p3, c0, c1] = *bytes;
        Some(Self {
            encoding: Encoding::from_code(code)?,
            first: PageAddress {
                block: BlockId(u16::from_be_bytes([b0, b1])),
                page: u32::from_be_bytes([p0, p1, p2, p3]),
            },
            count: u16::from_be_bytes([c0, c1]),
        })
    }
}

impl From<Record> for PageRun {
    fn from(record: Record) -> Self {
        Self {
            first: record.first,
            count: record.count,
        }
    }
}

/// What stands before the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) seq: u32,
    pub(super) records: u16,
    pub(super) literal_bytes: u32,
    pub(super) delta_bytes: u32,
    pub(super) digest: [u8; 16],
}

impl Head {
    pub(super) fn put(&self, out: &mut BytesMut) {
        out.put_u32(self.seq);
        out.put_u16(self.records);
        out.put_u32(self.literal_bytes);
        out.put_u32(self.delta_bytes);
        out.put_slice(&self.digest);
    }

    pub(super) fn parse(bytes: &[u8; HEAD_BYTES]) -> Self {
        let [
            s0,
            s1,
            s2,
            s3,
            r0,
            r1,
            l0,
            l1,
            l2,
            l3,
            d0,
            d1,
            d2,
            d3,
            digest @ ..,
        ] = *bytes;
        Self {
            seq: u32::from_be_bytes([s0, s1, s2, s3]),
            records: u16::from_be_bytes([r0, r1]),
            literal_bytes: u32::from_be_bytes([l0, l1, l2, l3]),
            delta_bytes: u32::from_be_bytes([d0, d1, d2, d3]),
            digest,
        }
    }
}

/// Digest over what a batch says and what its pages hold: computed before encoding from the
/// page's own hashes, and after decoding from the decoded pages.
//= docs/protocol.md#batch
#[derive(Debug)]
pub(super) struct BatchDigest(blake3::Hasher);

impl BatchDigest {
    pub(super) fn new(key: &DerivedKey, lane: usize, seq: u32, records: &[u8]) -> Self {
        let mut hasher = key.hasher();
        let lane = u8::try_from(lane).expect("LANES fits a byte");
        hasher
            .update(&[lane])
            .update(&seq.to_be_bytes())
            .update(records);
        Self(hasher)
    }

    pub(super) fn page(&mut self, hash: PageHash) {
        self.0.update(&hash.0);
    }

    pub(super) fn finish(&self) -> [u8; 16] {
        first_16(&self.0.finalize())
    }
}

/// Pages of one encoding.
pub(super) fn count(records: &[Record], encoding: Encoding) -> usize {
    records
        .iter()
        .filter(|run| run.encoding == encoding)
        .map(|run| usize::from(run.count))
        .sum()
}

/// Bytes of a batch's parts that its records do not tell.
#[derive(Debug, Clone, Copy)]
pub(super) struct PartBytes {
    pub(super) delta: usize,
    pub(super) literal: usize,
    pub(super) frame: usize,
}

/// What a batch cost, by encoding; the same on both sides.
pub(super) fn measure<'a>(
    records: impl IntoIterator<Item = &'a Record>,
    bytes: PartBytes,
) -> BatchStats {
    let mut stats = BatchStats {
        batches: 1,
        frame_bytes: bytes.frame as u64,
        ..BatchStats::default()
    };
    stats.delta.bytes = bytes.delta as u64;
    stats.literal.bytes = bytes.literal as u64;
    for record in records {
        let amount = match record.encoding {
            Encoding::Zero => &mut stats.zero,
            Encoding::Copy => &mut stats.copy,
            Encoding::Known => &mut stats.known,
            Encoding::Delta => &mut stats.delta,
            Encoding::Literal => &mut stats.literal,
            Encoding::Raw => &mut stats.raw,
        };
        let pages = u64::from(record.count);
        amount.pages += pages;
        amount.bytes += (RECORD_BYTES + record.encoding.reference_bytes()) as u64;
        if record.encoding == Encoding::Raw {
            amount.bytes += pages * PAGE_SIZE as u64;
        }
    }
    stats
}
