//! Guest RAM that QEMU shares (a memfd, or a file with `share=on`): read and written through the file.
//!
//! ```text
//! block -> address (info ramblock) -> /proc/PID/maps -> device, inode, offset (S9)
//!       -> QEMU's own descriptor of that very file, taken through a pidfd (S17)
//! ```
//! Nothing is mapped: `pread` gives no SIGBUS when a file is cut, and reads of holes allocate
//! nothing. Since the descriptor is QEMU's own, this never opens what QEMU itself could not. Huge
//! pages can be read so, not written (hugetlbfs has no `pwrite`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use super::maps::{FileId, SharedPart, shared_part};
use super::process::{ExpectedBlock, MemoryError, PAGE_BYTES};
use super::ramblock::RamBlock;
use crate::qmp::ProcessId;
use crate::qmp::descriptors::{Descriptors, NotHeld};

/// `statfs` type of hugetlbfs. //= linux include/uapi/linux/magic.h
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// Bytes that one step of [`SharedRam::clear`] looks at.
const CLEAR_BYTES: usize = 64 * PAGE_BYTES;

/// The blocks of a QEMU process, each shared beyond doubt or with the reason why not.
#[derive(Debug)]
pub struct SharedRam {
    blocks: Vec<(ExpectedBlock, Result<SharedBlock, String>)>,
}

/// A block's place in its file.
#[derive(Debug, Clone)]
struct SharedBlock {
    file: Arc<File>,
    offset: u64,
    bytes: u64,
    /// Why it cannot be written, if so.
    read_only: Option<&'static str>,
}

impl SharedRam {
    /// Looks for the shared memory of each of QEMU's blocks.
    ///
    /// # Errors
    /// When the process is gone or cannot be looked at; a block that is not shared is no error.
    pub fn open(process: &ProcessId, blocks: &[RamBlock]) -> Result<Self, MemoryError> {
        let pid = process.pid;
        let failed = |source: io::Error| MemoryError::Read { pid, source };
        let descriptors = Descriptors::of(process).map_err(|error| match error {
            NotHeld::Gone => MemoryError::ProcessGone { pid },
            NotHeld::Process(error) => error.into(),
            NotHeld::Io(error) => failed(error),
        })?;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed)?;
        let parts = parts(&maps, blocks);
        let wanted = parts.iter().filter_map(|part| part.as_ref().ok());
        let wanted: Vec<FileId> = wanted.map(|part| part.file).collect();
        let files = if wanted.is_empty() {
            BTreeMap::new()
        } else {
            open_files(&descriptors, &wanted).map_err(failed)?
        };
        let blocks = blocks.iter().zip(parts).map(|(block, part)| {
            let shared = part.and_then(|part| match files.get(&part.file) {
                Some(file) => SharedBlock::check(file, part, block.used_bytes),
                None => Err("QEMU holds no writable descriptor of its file".to_owned()),
            });
            let block = ExpectedBlock {
                name: block.name.clone(),
                used_bytes: block.used_bytes,
            };
            (block, shared)
        });
        Ok(Self {
            blocks: blocks.collect(),
        })
    }

    /// The blocks of the stream in their order: name and length must agree.
    #[must_use]
    pub fn select(&self, expected: &[ExpectedBlock]) -> Self {
        let find = |want: &ExpectedBlock| match self.blocks.iter().find(|(own, _)| own == want) {
            Some((_, shared)) => shared.clone(),
            None => Err("QEMU has no block of that name and length".to_owned()),
        };
        Self {
            blocks: expected
                .iter()
                .map(|want| (want.clone(), find(want)))
                .collect(),
        }
    }

    /// Can the block be read here?
    pub fn is_shared(&self, block: usize) -> bool {
        self.block(block).is_ok()
    }

    /// Can the block be written here too?
    pub fn is_writable(&self, block: usize) -> bool {
        self.block(block)
            .is_ok_and(|block| block.read_only.is_none())
    }

    /// Why a block is not shared, or not writable.
    pub fn reason(&self, block: usize) -> Option<&str> {
        match self.blocks.get(block) {
            Some((_, Ok(block))) => block.read_only,
            Some((_, Err(reason))) => Some(reason),
            None => Some("there is no such block"),
        }
    }

    /// Reads consecutive pages, as many as `into` holds. Holes are zero and stay holes.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` for a page that the block does not have, and
    /// `UnexpectedEof` when the file was cut.
    pub fn read_pages(&self, block: usize, first_page: u32, into: &mut [u8]) -> io::Result<()> {
        let block = self.block(block)?;
        let at = block.place(first_page, into.len() as u64)?;
        block.file.read_exact_at(into, at)
    }

    /// Writes consecutive pages.
    ///
    /// # Errors
    /// As [`SharedRam::read_pages`]; `Unsupported` for a block that is not writable.
    pub fn write_pages(&self, block: usize, first_page: u32, contents: &[u8]) -> io::Result<()> {
        let block = self.writable(block)?;
        let at = block.place(first_page, contents.len() as u64)?;
        block.file.write_all_at(contents, at)
    }

    /// Makes consecutive pages zero. What is a hole stays one, and memory that QEMU has
    /// preallocated stays allocated: only pages that are not zero are written.
    ///
    /// # Errors
    /// As [`SharedRam::write_pages`].
    pub fn zero_pages(&self, block: usize, first_page: u32, count: u32) -> io::Result<()> {
        let block = self.writable(block)?;
        let bytes = u64::from(count) * PAGE_BYTES as u64;
        let from = block.place(first_page, bytes)?;
        block.clear(from, from + bytes)
    }

    /// Makes the whole block zero: a file may hold old data.
    ///
    /// # Errors
    /// As [`SharedRam::write_pages`].
    pub fn clear(&self, block: usize) -> io::Result<()> {
        let block = self.writable(block)?;
        block.clear(block.offset, block.offset + block.bytes)
    }

    fn block(&self, block: usize) -> io::Result<&SharedBlock> {
        match self.blocks.get(block) {
            Some((_, Ok(block))) => Ok(block),
            Some(_) | None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn writable(&self, block: usize) -> io::Result<&SharedBlock> {
        let block = self.block(block)?;
        match block.read_only {
            None => Ok(block),
            Some(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl SharedBlock {
    /// The file is what it should be: regular, and long enough for the block.
    fn check(file: &Arc<File>, part: SharedPart, bytes: u64) -> Result<Self, String> {
        let metadata = file.metadata().map_err(|error| error.to_string())?;
        if !metadata.is_file() {
            return Err("its memory is of a device".to_owned());
        }
        let end = part.offset.checked_add(bytes);
        if end.is_none_or(|end| end > metadata.len()) {
            return Err("its file is shorter than the block".to_owned());
        }
        let file_system = rustix::fs::fstatfs(file).map_err(|error| error.to_string())?;
        // Files other than memfds have no seals.
        let seals = rustix::fs::fcntl_get_seals(file).unwrap_or(SealFlags::empty());
        let is_huge = u64::try_from(file_system.f_type) == Ok(HUGETLBFS_MAGIC);
        let read_only = if is_huge {
            Some("huge pages are not written through their file")
        } else if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            Some("its memfd is sealed against writing")
        } else {
            None
        };
        Ok(Self {
            file: Arc::clone(file),
            offset: part.offset,
            bytes,
            read_only,
        })
    }

    fn place(&self, first_page: u32, bytes: u64) -> io::Result<u64> {
        let first = u64::from(first_page) * PAGE_BYTES as u64;
        match first.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.offset + first),
            Some(_) | None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn clear(&self, from: u64, end: u64) -> io::Result<()> {
        let mut at = from;
        let mut old = vec![0; CLEAR_BYTES.min(usize::try_from(end - from).unwrap_or(CLEAR_BYTES))];
        while let Some(data) = self.next_data(at)?.filter(|data| *data < end) {
            at = data - data % PAGE_BYTES as u64;
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let here = &mut old[..left.min(CLEAR_BYTES)];
            self.file.read_exact_at(here, at)?;
            for page in here.chunks(PAGE_BYTES) {
                if page.iter().any(|byte| *byte != 0) {
                    self.file.write_all_at(&[0; PAGE_BYTES][..page.len()], at)?;
                }
                at += page.len() as u64;
            }
        }
        Ok(())
    }

    /// Where data begins at or after `at`. It moves the descriptor's position, which nobody uses.
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => Ok(Some(data.max(at))),
            Err(Errno::NXIO) => Ok(None),
            // Not every file system knows its holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
            Err(error) => Err(error.into()),
        }
    }
}

/// The place of each block, if there is no doubt (S9): blocks that share bytes are none.
fn parts(maps: &str, blocks: &[RamBlock]) -> Vec<Result<SharedPart, String>> {
    let place = |block: &RamBlock| {
        if blocks.iter().filter(|own| own.name == block.name).count() > 1 {
            return Err("QEMU has two blocks of that name".to_owned());
        }
        let address = block
            .host_address
            .filter(|address| *address != 0)
            .ok_or("this QEMU does not tell its place")?;
        if block.used_bytes == 0 {
            return Err("it is empty".to_owned());
        }
        Ok(shared_part(maps, address, block.used_bytes)?)
    };
    let mut parts: Vec<Result<SharedPart, String>> = blocks.iter().map(place).collect();
    let mut placed: Vec<(FileId, u64, u64, usize)> = parts
        .iter()
        .zip(blocks)
        .enumerate()
        .filter_map(|(index, (part, block))| {
            let part = part.as_ref().ok()?;
            Some((
                part.file,
                part.offset,
                part.offset + block.used_bytes,
                index,
            ))
        })
        .collect();
    placed.sort_unstable();
    let mut last: Option<(FileId, u64, usize)> = None;
    for (file, from, end, index) in placed {
        let meets = last.filter(|(before, covered, _)| *before == file && *covered > from);
        if let Some((_, _, other)) = meets {
            for doubtful in [index, other] {
                parts[doubtful] = Err("another block has the same memory".to_owned());
            }
        }
        let goes_on = meets.is_some_and(|(_, covered, _)| covered > end);
        if !goes_on {
            last = Some((file, end, index));
        }
    }
    parts
}

/// QEMU's own descriptors of these files, those that may read and write.
fn open_files(
    descriptors: &Descriptors,
    wanted: &[FileId],
) -> io::Result<BTreeMap<FileId, Arc<File>>> {
    let mut files = BTreeMap::new();
    for entry in descriptors.entries()? {
        let entry = entry?;
        // Most are sockets; one that closes meanwhile is none of ours.
        let Some(id) = std::fs::metadata(entry.path()).ok().map(|of| identity(&of)) else {
            continue;
        };
        if !wanted.contains(&id) || files.contains_key(&id) {
            continue;
        }
        let Some(file) = descriptors.take(&entry)?.map(File::from) else {
            continue;
        };
        let access = rustix::fs::fcntl_getfl(&file)?.intersection(OFlags::RWMODE);
        if identity(&file.metadata()?) == id && access == OFlags::RDWR {
            files.insert(id, Arc::new(file));
        }
    }
    Ok(files)
}

fn identity(metadata: &std::fs::Metadata) -> FileId {
    let device = metadata.dev();
    FileId {
        device: (rustix::fs::major(device), rustix::fs::minor(device)),
        inode: metadata.ino(),
    }
}

#[cfg(test)]
mod tests;
