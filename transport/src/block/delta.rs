//! Changed pages as what differs from their last version.
//!
//! All delta pages of a batch are one zstd frame whose prefix is their last versions in the same
//! order: a page that changed little finds itself at one and the same distance throughout. The
//! source takes the last version from its replica, once its hash is what the ledger says; the target
//! takes it from the image as applied.

use std::fmt;
use std::io;

use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

use super::literal::BadFrame;
use super::{LedgerPart, PAGE_SIZE, PageAddress, PageHash, PageHasher, Replica};

/// Pieces of 64 bytes that a page must share with its last version to be worth a delta.
const EQUAL_PIECES_MIN: usize = 8;
const PIECE: usize = 64;
/// A frame must be at most this part of its pages, or they go literal.
const SHRINK_MIN_PART: usize = 2;

/// Puts the last version of a page into `base` and says whether the page shall be a delta.
///
/// # Errors
/// When the replica cannot be read.
pub(super) fn is_near(
    at: PageAddress,
    content: &[u8; PAGE_SIZE],
    ledger: &LedgerPart,
    hasher: &PageHasher,
    replica: &dyn Replica,
    base: &mut [u8; PAGE_SIZE],
) -> io::Result<bool> {
    let Some((sent, _)) = ledger.get(at) else {
        return Ok(false);
    };
    if sent == hasher.zero() {
        return Ok(false);
    }
    replica.read(at, base)?;
    Ok(is_similar(content, base) && is_what_was_sent(base, sent, hasher))
}

fn is_what_was_sent(base: &[u8; PAGE_SIZE], sent: PageHash, hasher: &PageHasher) -> bool {
    hasher.hash(base) == sent
}

fn is_similar(content: &[u8; PAGE_SIZE], base: &[u8; PAGE_SIZE]) -> bool {
    let pieces = content.chunks_exact(PIECE).zip(base.chunks_exact(PIECE));
    let equal = pieces.filter(|(new, old)| new == old && new.iter().any(|byte| *byte != 0));
    equal.take(EQUAL_PIECES_MIN).count() == EQUAL_PIECES_MIN
}

/// Faster levels note too few places of the prefix to find the base of a page without order.
const LEVEL_MIN: i32 = 3;

/// Packs pages against their last versions. The context is made for each batch: it borrows the
/// prefix, and a round's deltas are few.
pub(super) struct DeltaPacker {
    level: i32,
    frame: Vec<u8>,
}

impl fmt::Debug for DeltaPacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeltaPacker").finish_non_exhaustive()
    }
}

impl DeltaPacker {
    pub(super) fn new(level: i32) -> Self {
        Self {
            level,
            frame: Vec::new(),
        }
    }

    pub(super) fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Packs pages against as many bases, `None` when that is not worth it.
    ///
    /// # Errors
    /// When zstd fails.
    pub(super) fn pack(&mut self, bases: &[u8], pages: &[u8]) -> io::Result<Option<&[u8]>> {
        assert_eq!(bases.len(), pages.len(), "one base per page");
        let mut context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        // Both fit the window, so that the last page still reaches its base.
        let window = (bases.len() + pages.len())
            .next_power_of_two()
            .ilog2()
            .max(10);
        for parameter in [
            CParameter::CompressionLevel(self.level.max(LEVEL_MIN)),
            CParameter::WindowLog(window),
        ] {
            context.set_parameter(parameter).map_err(zstd_error)?;
        }
        context.ref_prefix(bases).map_err(zstd_error)?;
        self.frame.resize(zstd_safe::compress_bound(pages.len()), 0);
        let bytes = context
            .compress2(self.frame.as_mut_slice(), pages)
            .map_err(zstd_error)?;
        Ok((bytes <= pages.len() / SHRINK_MIN_PART).then(|| &self.frame[..bytes]))
    }
}

/// Decompresses a frame of deltas to exactly `pages`; no byte more is written.
pub(super) fn unpack(frame: &[u8], bases: &[u8], pages: &mut [u8]) -> Result<(), BadFrame> {
    let mut context = DCtx::try_create().ok_or(BadFrame)?;
    context.ref_prefix(bases).map_err(|_| BadFrame)?;
    match context.decompress(pages, frame) {
        Ok(bytes) if bytes == pages.len() => Ok(()),
        Ok(_) | Err(_) => Err(BadFrame),
    }
}

fn zstd_error(code: usize) -> io::Error {
    io::Error::other(zstd_safe::get_error_name(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that keeps a part of itself is near; noise and a page of zeros with a word are not.
    #[test]
    fn likeness_is_told() {
        let page = |seed: u32| {
            let mut page = [0; PAGE_SIZE];
            blake3::Hasher::new()
                .update(&seed.to_be_bytes())
                .finalize_xof()
                .fill(&mut page);
            page
        };
        let mut changed = page(1);
        changed[..3000].copy_from_slice(&page(2)[..3000]);
        assert!(is_similar(&changed, &page(1)));
        assert!(!is_similar(&page(1), &page(2)));
        let mut sparse = [0; PAGE_SIZE];
        sparse[9] = 1;
        assert!(!is_similar(&sparse, &[0; PAGE_SIZE]));
    }

    /// Pages of noise with a few changed bytes cost next to nothing, and come back.
    #[test]
    fn small_changes_are_small() {
        let mut bases = vec![0; 64 * PAGE_SIZE];
        blake3::Hasher::new().finalize_xof().fill(&mut bases);
        let mut pages = bases.clone();
        for page in 0..64 {
            pages[page * (PAGE_SIZE + 50)] ^= 1;
        }
        for level in [-5, 1, 3, 6, 9, 12] {
            let mut packer = DeltaPacker::new(level);
            let frame = packer.pack(&bases, &pages).unwrap().unwrap();
            assert!(frame.len() < 64 * 40, "level {level}: {}", frame.len());
            let mut back = vec![1; pages.len()];
            assert!(unpack(frame, &bases, &mut back).is_ok());
            assert!(back == pages);
            assert!(unpack(frame, &bases, &mut back[..PAGE_SIZE]).is_err());
        }
    }
}
