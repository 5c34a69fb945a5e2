//! Pages with the content of another page: named by where the target has that content.
//!
//! The other page is an earlier one of the same batch, found by hash and compared byte by byte; or
//! one that the target has applied, found in the [`CopyIndex`]. A wrong guess makes the target ask
//! for the batch's pages again: its digest decides.

mod index;

use bytes::{BufMut, BytesMut};

pub use index::CopyIndex;

use super::{BlockId, PAGE_SIZE, PageAddress, PageHash};

/// Bytes of one run's reference: block and page of the first page that is copied.
pub(super) const REFERENCE_BYTES: usize = 2 + 4;

pub(super) fn put(base: PageAddress, out: &mut BytesMut) {
    out.put_u16(base.block.0);
    out.put_u32(base.page);
}

pub(super) fn parse(bytes: &[u8; REFERENCE_BYTES]) -> PageAddress {
    let [b0, b1, p0, p1, p2, p3] = *bytes;
    PageAddress {
        block: BlockId(u16::from_be_bytes([b0, b1])),
        page: u32::from_be_bytes([p0, p1, p2, p3]),
    }
}

/// Buckets of [`InBatch`]: eight for each page of a full batch.
const BUCKETS: usize = 1024;

/// The pages with content of the batch in progress, by hash: place in the slots + 1.
#[derive(Debug)]
pub(super) struct InBatch {
    buckets: Box<[u16; BUCKETS]>,
    is_empty: bool,
}

impl InBatch {
    pub(super) fn new() -> Self {
        Self {
            buckets: Box::new([0; BUCKETS]),
            is_empty: true,
        }
    }

    pub(super) fn clear(&mut self) {
        if !self.is_empty {
            self.buckets.fill(0);
            self.is_empty = true;
        }
    }

    /// Notes a page, and returns the slot of an earlier page whose hash may be the same.
    pub(super) fn replace(&mut self, hash: PageHash, slot: usize) -> Option<usize> {
        let bucket = usize::from(u16::from_be_bytes([hash.0[14], hash.0[15]])) % BUCKETS;
        let earlier = self.buckets[bucket];
        self.buckets[bucket] = super::length_u16(slot + 1);
        self.is_empty = false;
        usize::from(earlier).checked_sub(1)
    }
}

/// Whether two pages hold the same bytes.
pub(super) fn is_equal(slots: &[u8], one: usize, other: usize) -> bool {
    slots[one * PAGE_SIZE..][..PAGE_SIZE] == slots[other * PAGE_SIZE..][..PAGE_SIZE]
}
