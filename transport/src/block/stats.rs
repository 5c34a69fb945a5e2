//! Pages and bytes by encoding: what one batch, a round or a whole migration cost.

use std::ops::AddAssign;

/// Pages and their bytes on the lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Pages.
    pub pages: u64,
    /// Bytes of their records and payloads.
    pub bytes: u64,
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.bytes += other.bytes;
    }
}

/// What batches carried, by encoding, in the order of the report's `bytes_by_encoding`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchStats {
    /// Not sent: the target holds this content.
    pub same: Amount,
    /// All zero.
    pub zero: Amount,
    /// Same content as another page that the target holds.
    pub copy: Amount,
    /// Content that the target holds outside the image.
    pub known: Amount,
    /// Difference from an earlier version.
    pub delta: Amount,
    /// Compressed together with its neighbours.
    pub literal: Amount,
    /// As it is.
    pub raw: Amount,
    /// Batches.
    pub batches: u64,
    /// All bytes of the batches' frames; more than the sum above by the batches' heads.
    pub frame_bytes: u64,
}

impl BatchStats {
    /// Pages of all encodings.
    pub fn pages(&self) -> u64 {
        [
            self.same,
            self.zero,
            self.copy,
            self.known,
            self.delta,
            self.literal,
            self.raw,
        ]
        .iter()
        .map(|amount| amount.pages)
        .sum()
    }
}

impl BatchStats {
    /// What was added since an earlier look.
    #[must_use]
    pub fn since(&self, earlier: &BatchStats) -> BatchStats {
        let amount = |now: Amount, then: Amount| Amount {
            pages: now.pages - then.pages,
            bytes: now.bytes - then.bytes,
        };
        BatchStats {
            same: amount(self.same, earlier.same),
            zero: amount(self.zero, earlier.zero),
            copy: amount(self.copy, earlier.copy),
            known: amount(self.known, earlier.known),
            delta: amount(self.delta, earlier.delta),
            literal: amount(self.literal, earlier.literal),
            raw: amount(self.raw, earlier.raw),
            batches: self.batches - earlier.batches,
            frame_bytes: self.frame_bytes - earlier.frame_bytes,
        }
    }
}

impl AddAssign for BatchStats {
    fn add_assign(&mut self, other: Self) {
        self.same += other.same;
        self.zero += other.zero;
        self.copy += other.copy;
        self.known += other.known;
        self.delta += other.delta;
        self.literal += other.literal;
        self.raw += other.raw;
        self.batches += other.batches;
        self.frame_bytes += other.frame_bytes;
    }
}
