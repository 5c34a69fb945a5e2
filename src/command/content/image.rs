//! Disk images as known content: our reader of them behind the store's trait.

use std::io;
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use qemu_glue::disk::{DiskImage, Format, Kind};
use transport::quic::Fingerprint;
use transport::store::{BlockSource, ContentIndex, Share};

use crate::state_dir::StateDir;
use crate::trust::PairSecret;

const BLOCK_BYTES: u64 = 4096;

/// Everything that `peer` may name, ready to be asked. Reads images that have changed since the
/// last time whole, so it belongs on a thread that may block.
pub(crate) fn open_index(
    state: &StateDir,
    peer: Fingerprint,
    secret: &PairSecret,
) -> Result<ContentIndex> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let open = |share: &Share| -> io::Result<Box<dyn BlockSource>> {
        let image = open_image(&share.path, &share.format).map_err(io::Error::other)?;
        Ok(Box::new(image))
    };
    Ok(ContentIndex::open_all(
        state.path(),
        peer,
        secret,
        threads,
        &open,
    )?)
}

/// Opens an image of a stated format.
pub(super) fn open_image(path: &Path, format: &str) -> Result<SharedImage> {
    let format =
        Format::from_name(format).ok_or_else(|| anyhow::anyhow!("no such format: {format}"))?;
    let disk = DiskImage::open(path, format)?;
    let identity = disk.identity();
    Ok(SharedImage { disk, identity })
}

/// An open image.
#[derive(Debug)]
pub(super) struct SharedImage {
    disk: DiskImage,
    identity: String,
}

impl BlockSource for SharedImage {
    /// What is behind 16 TiB cannot be numbered and is left out.
    fn blocks(&self) -> u32 {
        u32::try_from(self.disk.bytes() / BLOCK_BYTES).unwrap_or(u32::MAX)
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn next_content(&self, from: u32) -> io::Result<Option<Range<u32>>> {
        let end = u64::from(self.blocks()) * BLOCK_BYTES;
        let mut at = u64::from(from) * BLOCK_BYTES;
        while at < end {
            let Some(extent) = self.disk.extent(at)? else {
                break;
            };
            let extent_end = (at + extent.bytes).min(end);
            let run = blocks_within(at, extent_end);
            if extent.kind == Kind::Data && !run.is_empty() {
                return Ok(Some(run));
            }
            at = extent_end;
        }
        Ok(None)
    }

    fn read(&self, first: u32, into: &mut [u8]) -> io::Result<()> {
        self.disk.read(u64::from(first) * BLOCK_BYTES, into)
    }
}

/// The whole blocks between two offsets.
fn blocks_within(begin: u64, end: u64) -> Range<u32> {
    let block = |number| u32::try_from(number).unwrap_or(u32::MAX);
    block(begin.div_ceil(BLOCK_BYTES))..block(end / BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_count() {
        assert_eq!(blocks_within(0, 8192), 0..2);
        assert_eq!(blocks_within(1, 8191), 1..1);
        assert!(blocks_within(4097, 8191).is_empty());
    }
}
