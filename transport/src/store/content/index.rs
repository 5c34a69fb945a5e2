//! The index of one image for one peer, on disk.
//!
//! ```text
//! stamp      32   hash over the pair's secret, the image's identity, and this form's version
//! counts     4 x 65537, little endian: entries whose first two hash bytes are below n
//! entries    12 each, sorted: 8 bytes of hash, u32 block (little endian)
//! ```
//!
//! Only the counts are held in memory (256 KiB); a lookup reads one bucket. Hashes are keyed, so
//! that nobody can fill a bucket (S12); one that is too long is not read all the same. A damaged
//! file finds blocks that fail their check, or nothing.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::BlockSource;

pub(super) const BUCKETS: usize = 1 << 16;
pub(super) const ENTRY_BYTES: usize = 8 + 4;
pub(super) const HEAD_BYTES: usize = 32 + (BUCKETS + 1) * 4;
/// Most entries of one bucket that are looked at: 64 Mi blocks make 1024 on average.
const BUCKET_MAX_ENTRIES: usize = 4096;

/// What the index was built from.
pub(super) type Stamp = [u8; 32];

/// Stamp of an image as it is.
pub(super) fn stamp(source: &dyn BlockSource, key: &[u8; 32]) -> Stamp {
    let key = blake3::derive_key("scaleaway/1 content index", key);
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(&source.blocks().to_le_bytes());
    hasher.update(source.identity().as_bytes());
    *hasher.finalize().as_bytes()
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) prefix: [u8; 8],
    pub(super) block: u32,
}

impl Entry {
    pub(super) fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.prefix);
        bytes[8..].copy_from_slice(&self.block.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let [prefix @ .., b0, b1, b2, b3] = *bytes;
        Self {
            prefix,
            block: u32::from_le_bytes([b0, b1, b2, b3]),
        }
    }
}

/// Which bucket a hash is in: its first two bytes.
pub(super) fn bucket(prefix: &[u8; 8]) -> usize {
    usize::from(u16::from_be_bytes([prefix[0], prefix[1]]))
}

/// An open index.
#[derive(Debug)]
pub(super) struct IndexFile {
    file: File,
    /// Entries below each bucket, ascending.
    counts: Box<[u32]>,
}

impl IndexFile {
    /// Opens it; `None` when it is not there, of another state of the image or another secret, or
    /// not whole.
    pub(super) fn open(path: &Path, stamp: &Stamp) -> Option<Self> {
        let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).ok()?;
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(no_follow)
            .open(path)
            .ok()?;
        let mut found = Stamp::default();
        file.read_exact(&mut found).ok()?;
        if found != *stamp {
            return None;
        }
        let mut bytes = vec![0; HEAD_BYTES - found.len()];
        file.read_exact(&mut bytes).ok()?;
        let (counts, _) = bytes.as_chunks::<4>();
        let counts: Box<[u32]> = counts
            .iter()
            .map(|count| u32::from_le_bytes(*count))
            .collect();
        let whole = HEAD_BYTES as u64 + u64::from(*counts.last()?) * ENTRY_BYTES as u64;
        let fits = counts.is_sorted() && file.metadata().ok()?.len() == whole;
        fits.then_some(Self { file, counts })
    }

    /// Number of entries.
    pub(super) fn entries(&self) -> u64 {
        self.counts.last().map_or(0, |count| u64::from(*count))
    }

    /// The block that had this hash when the index was built.
    pub(super) fn find(&self, prefix: &[u8; 8]) -> Option<u32> {
        let entries = self.bucket_entries(bucket(prefix)).ok()?;
        let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
        let nth = entries
            .binary_search_by(|entry| entry[..8].cmp(prefix))
            .ok()?;
        Some(Entry::from_bytes(&entries[nth]).block)
    }

    fn bucket_entries(&self, bucket: usize) -> io::Result<Vec<u8>> {
        let (begin, end) = (self.counts[bucket], self.counts[bucket + 1]);
        let count = usize::try_from(end - begin).unwrap_or(usize::MAX);
        let mut bytes = vec![0; count.min(BUCKET_MAX_ENTRIES) * ENTRY_BYTES];
        let at = HEAD_BYTES as u64 + u64::from(begin) * ENTRY_BYTES as u64;
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }
}
