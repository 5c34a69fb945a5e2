//! The source's shadow: an unlinked, preallocated file that holds the latest announced content of
//! every page until the link takes it.
//!
//! QEMU's socket is drained at full speed whatever the link does, so QEMU never blocks on it, a
//! stop at any moment finds room for every page (S5), and a page that is dirtied many times before
//! its turn costs one transfer. The file is as large as guest RAM and reserved before the first page
//! is taken: if the disk cannot hold it the attempt ends, and the guest has not noticed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::block::{Contents, Layout, PAGE_SIZE, PageAddress};

/// See the module's doc.
#[derive(Debug)]
pub struct Shadow {
    file: File,
    /// Byte offset of each block in the file; `None` for one that is held elsewhere.
    offsets: Vec<Option<u64>>,
}

impl Shadow {
    /// Makes the file in `folder` (mode 0600, no name) and reserves its space: as much as all blocks
    /// but those that are `held` elsewhere, by their places in the layout.
    ///
    /// # Errors
    /// What the file system says; `StorageFull` when guest RAM does not fit.
    pub fn create(
        folder: &Path,
        layout: &Layout,
        held: impl Fn(usize) -> bool,
    ) -> io::Result<Shadow> {
        let tmpfile = i32::try_from(rustix::fs::OFlags::TMPFILE.bits()).unwrap_or(0);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(tmpfile)
            .mode(0o600)
            .open(folder)?;
        let mut offsets = Vec::with_capacity(layout.blocks().len());
        let mut end = 0_u64;
        for (place, block) in layout.blocks().iter().enumerate() {
            if held(place) {
                offsets.push(None);
                continue;
            }
            offsets.push(Some(end));
            end += u64::from(block.pages) * PAGE_SIZE as u64;
        }
        if end > 0 {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, end)?;
        }
        Ok(Shadow { file, offsets })
    }

    /// Stores contiguous pages from `first` on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        self.file.write_all_at(contents, self.offset(first)?)
    }

    fn offset(&self, at: PageAddress) -> io::Result<u64> {
        let base = self
            .offsets
            .get(usize::from(at.block.0))
            .copied()
            .flatten()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(base + u64::from(at.page) * PAGE_SIZE as u64)
    }
}

impl Contents for Shadow {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.file.read_exact_at(into, self.offset(at)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockSpec};

    /// Pages come back from their own place, and unwritten ones are zero.
    #[test]
    fn pages_keep_their_place() {
        let block = |name: &str| BlockSpec {
            name: name.into(),
            pages: 4,
        };
        let layout = Layout::new(vec![block("a"), block("b")]).unwrap();
        let shadow = Shadow::create(&std::env::temp_dir(), &layout, |_| false).unwrap();
        let at = |block, page| PageAddress {
            block: BlockId(block),
            page,
        };
        shadow.write(at(1, 1), &[7; 2 * PAGE_SIZE]).unwrap();
        let mut page = [1; PAGE_SIZE];
        for (address, expected) in [(at(1, 0), 0), (at(1, 1), 7), (at(1, 2), 7), (at(0, 1), 0)] {
            shadow.read(address, &mut page).unwrap();
            assert_eq!(page, [expected; PAGE_SIZE], "{address:?}");
        }
    }
}
