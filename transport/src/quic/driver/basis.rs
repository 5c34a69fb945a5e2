//! What both sides hold before the first page: proved range by range, then put into both ledgers.
//!
//! ```text
//! source  hashes of its replica -digests keyed with the nonce-> target compares with its own
//! both    equal ranges -> ledger entries; target: the replica's content -> guest
//! ```

use std::sync::Arc;

use bytes::Bytes;

use crate::block::{CopyIndex, LANES, LedgerPart, Replica};
use crate::store::{BasisKey, RangeHashes};

/// A digest for every range of a replica; none when it is empty.
#[must_use]
pub fn digests(mine: &RangeHashes, nonce: &[u8; 16], key: &[u8; 32]) -> Vec<[u8; 16]> {
    if mine.is_empty() {
        return Vec::new();
    }
    let key = BasisKey::new(key);
    (0..mine.len())
        .map(|range| mine.digest(range, nonce, &key))
        .collect()
}

/// Which ranges are equal, one bit each, least significant first; empty when none is.
#[must_use]
pub fn agree(mine: &RangeHashes, theirs: &[[u8; 16]], nonce: &[u8; 16], key: &[u8; 32]) -> Bytes {
    let own = digests(mine, nonce, key);
    if own.len() != theirs.len() {
        return Bytes::new();
    }
    let mut bits = vec![0_u8; own.len().div_ceil(8)];
    for (range, (mine, theirs)) in own.iter().zip(theirs).enumerate() {
        bits[range / 8] |= u8::from(mine == theirs) << (range % 8);
    }
    if bits.iter().all(|bits| *bits == 0) {
        return Bytes::new();
    }
    bits.into()
}

/// What both sides hold: the agreed ranges of this side's replica.
#[derive(Debug, Clone)]
pub struct Basis {
    /// Equal ranges, as [`agree`] gives them.
    pub ranges: Bytes,
    /// This side's hashes.
    pub hashes: Arc<RangeHashes>,
    /// This side's content.
    pub replica: Arc<dyn Replica>,
}

impl Basis {
    /// The agreed ranges, ascending.
    pub fn agreed(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.hashes.len()).filter(|range| {
            let bits = self.ranges.get(crate::block::index(range / 8));
            bits.is_some_and(|bits| bits & (1 << (range % 8)) != 0)
        })
    }

    /// Notes every agreed page in the ledger, and at the source in the index of copies.
    pub(super) fn seed(&self, parts: &mut [LedgerPart; LANES], copies: Option<&CopyIndex>) {
        for range in self.agreed() {
            let holds_data = !self.hashes.is_zero(range);
            for (at, hash) in self.hashes.pages(range) {
                let lane = parts[0].layout().lane_of(at);
                parts[lane].seed(at, hash);
                if let (true, Some(copies)) = (holds_data, copies) {
                    copies.insert(hash, at, 1);
                }
            }
        }
        if let Some(copies) = copies {
            (0..LANES).for_each(|lane| copies.acknowledge(lane, 1));
        }
    }
}
