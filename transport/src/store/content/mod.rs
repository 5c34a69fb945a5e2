//! Known content: disk images on this host whose blocks a peer may name instead of sending them.
//!
//! ```text
//! STATE_DIR/content/shares.json            which image may be named by which peer
//! STATE_DIR/content/IMAGE/KEY_OF_PEER      index: prefix of keyed hash -> block (see `index`)
//! ```
//!
//! An index is built once for each peer that may see the image, since its hashes are keyed with that
//! pair's secret (S12), and built anew when a file of the image's chain has changed. It proves
//! nothing: a block is read and hashed again before it is named (S13), so a disk that a VM writes
//! meanwhile, or a file that was changed under its old time, costs a miss and no more.
//!
//! What an image is made of (raw, qcow2, a chain of them) is the [`BlockSource`]'s affair.

mod build;
mod index;
mod shares;

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use index::IndexFile;
pub use shares::{Share, Shares};

use crate::block::{PAGE_SIZE, PageHasher};
use crate::quic::Fingerprint;

/// A disk image as its guest sees it, in blocks of 4 KiB.
pub trait BlockSource: Send + Sync + std::fmt::Debug {
    /// Number of whole blocks.
    fn blocks(&self) -> u32;
    /// Text that changes when any file of the image does.
    fn identity(&self) -> String;
    /// The next run of blocks at or after `from` that hold content: no holes, no zero clusters,
    /// nothing that cannot be read block by block.
    ///
    /// # Errors
    /// What the file system says; metadata that makes no sense.
    fn next_content(&self, from: u32) -> io::Result<Option<Range<u32>>>;
    /// Reads contiguous blocks.
    ///
    /// # Errors
    /// What the file system says; a block that is no content.
    fn read(&self, first: u32, into: &mut [u8]) -> io::Result<()>;
}

/// Opens the image of a share.
pub type OpenImage<'a> = dyn Fn(&Share) -> io::Result<Box<dyn BlockSource>> + 'a;

/// Every block that one peer may name, numbered through all images shared with it.
#[derive(Debug)]
pub struct ContentIndex {
    images: Vec<Indexed>,
    hasher: PageHasher,
}

#[derive(Debug)]
struct Indexed {
    /// Number of the image's block 0.
    first: u32,
    source: Box<dyn BlockSource>,
    index: IndexFile,
}

impl ContentIndex {
    /// Opens the images shared with `peer`, building what is missing or out of date on `threads`
    /// threads: reads such an image whole. An image that cannot be opened is left out, with a
    /// warning.
    ///
    /// # Errors
    /// When the list of shares cannot be read.
    pub fn open_all(
        state_dir: &Path,
        peer: Fingerprint,
        key: &[u8; 32],
        threads: usize,
        open: &OpenImage<'_>,
    ) -> io::Result<ContentIndex> {
        let mut all = ContentIndex {
            images: Vec::new(),
            hasher: PageHasher::new(key),
        };
        let mut first = 0_u32;
        for share in Shares::load(state_dir)?.shared_with(peer) {
            let opened = open(share).and_then(|source| {
                let path = index_path(state_dir, share, peer);
                let index = open_or_build(&path, &*source, key, threads)?;
                Ok((source, index))
            });
            match opened {
                Ok((source, index)) => {
                    let Some(next) = first.checked_add(source.blocks()) else {
                        tracing::warn!(image = %share.path.display(), "beyond 16 TiB of shared content");
                        break;
                    };
                    all.images.push(Indexed {
                        first,
                        source,
                        index,
                    });
                    first = next;
                }
                Err(error) => {
                    tracing::warn!(image = %share.path.display(), %error, "shared image is left out");
                }
            }
        }
        Ok(all)
    }

    /// Number of distinct blocks that can be named.
    pub fn known_pages(&self) -> u64 {
        self.images.iter().map(|image| image.index.entries()).sum()
    }

    /// The number of a block whose hash begins with `prefix`. The block is read and hashed in this
    /// call (S13); one that cannot be read or is another content by now is not found.
    pub fn lookup(&self, prefix: &[u8; 8]) -> Option<u32> {
        let mut content = [0; PAGE_SIZE];
        self.images.iter().find_map(|image| {
            let block = image.index.find(prefix)?;
            if block >= image.source.blocks() {
                return None;
            }
            image.source.read(block, &mut content).ok()?;
            let hash = self.hasher.hash(&content);
            // Lies below the last image's end, which fits.
            (hash.0.starts_with(prefix)).then(|| image.first.saturating_add(block))
        })
    }

    /// Reads a block by its number, as it is at this moment: whoever uses it checks its hash.
    ///
    /// # Errors
    /// When there is no such block or it cannot be read.
    pub fn read(&self, number: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let after = self.images.partition_point(|image| image.first <= number);
        let image = after.checked_sub(1).and_then(|nth| self.images.get(nth));
        let image = image.ok_or(io::ErrorKind::NotFound)?;
        let block = number - image.first;
        if block >= image.source.blocks() {
            return Err(io::ErrorKind::NotFound.into());
        }
        image.source.read(block, into)
    }
}

fn index_path(state_dir: &Path, share: &Share, peer: Fingerprint) -> PathBuf {
    shares::folder(state_dir)
        .join(share.id())
        .join(peer.to_hex())
}

/// The index of an image for one pair: the kept one when it is of this state of the image.
fn open_or_build(
    path: &Path,
    source: &dyn BlockSource,
    key: &[u8; 32],
    threads: usize,
) -> io::Result<IndexFile> {
    let stamp = index::stamp(source, key);
    if let Some(kept) = IndexFile::open(path, &stamp) {
        return Ok(kept);
    }
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
    }
    build::build(path, source, key, &stamp, threads)?;
    IndexFile::open(path, &stamp)
        .ok_or_else(|| io::Error::other("an index that was just built cannot be read"))
}

#[cfg(test)]
mod tests;
