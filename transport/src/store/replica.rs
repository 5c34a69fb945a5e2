//! The replica: the image as the peer last had it, page for page, in one sparse file.
//!
//! ```text
//! image    block 0 | block 1 | ...      a hole is a run of zero pages
//! ```
//!
//! It is written in place while pages flow and stays when the attempt ends, however it ends. Nothing
//! in it is trusted but its bytes: the next attempt hashes all of it ([`ReplicaFile::hash_ranges`]),
//! so a torn, stale or damaged file cannot lie, it only agrees with the peer in fewer ranges. For
//! the same reason nothing is synced on the way.
//!
//! Pages are read with `pread`, not through a mapping: whoever can truncate the file (a tool that
//! cleans the state dir, another process of this user) would end the agent with SIGBUS, and with
//! it an attempt. docs/store.md has the figures.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};

use super::checkpoint::{Place, Settled};
use super::ranges::RangeHashes;
use crate::block::{Layout, PAGE_SIZE, PageAddress, Replica};

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Bytes that are written between two looks at the budget.
pub(super) const BUDGET_LOOK_BYTES: u64 = 64 << 20;

/// One VM's replica for one peer, held by this process alone.
#[derive(Debug)]
pub struct ReplicaFile {
    image: File,
    /// Byte offset of each block in the file.
    offsets: Vec<u64>,
    layout: Arc<Layout>,
    /// Folder, lock and what is noted about the replica.
    place: Place,
    broken: AtomicBool,
    /// Bytes written since the last look at the budget.
    unchecked_bytes: AtomicU64,
}

impl ReplicaFile {
    /// Takes a checkpoint's locked place and makes its image as long as the layout.
    pub(super) fn new(image: File, layout: &Arc<Layout>, place: Place) -> io::Result<ReplicaFile> {
        let mut offsets = Vec::with_capacity(layout.blocks().len());
        let mut end = 0_u64;
        for block in layout.blocks() {
            offsets.push(end);
            end += u64::from(block.pages) * PAGE_BYTES;
        }
        image.set_len(end)?;
        Ok(ReplicaFile {
            image,
            offsets,
            layout: Arc::clone(layout),
            place,
            broken: AtomicBool::new(false),
            unchecked_bytes: AtomicU64::new(0),
        })
    }

    /// The block list of the image.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Whether a write failed (disk full, budget used up). Nothing more is kept then and nothing is
    /// read: the attempt goes on without it. What was written stays for the next attempt.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Notes how the attempt ended. A replica that is dropped without is taken up just the same.
    ///
    /// # Errors
    /// What the file system says.
    pub fn settle(&self, settled: &Settled) -> io::Result<()> {
        self.place.settle(settled)
    }

    /// Hashes every page with the pair's secret on `threads` threads. Takes 16 bytes of memory for
    /// each page of a range that holds data.
    ///
    /// # Errors
    /// What the file system says.
    pub fn hash_ranges(&self, key: &[u8; 32], threads: usize) -> io::Result<RangeHashes> {
        let with_data = self.ranges_with_data()?;
        RangeHashes::of_image(&self.layout, key, threads, &with_data, &|first, into| {
            self.image.read_exact_at(into, self.offset(first)?)
        })
    }

    /// The same for some ranges alone, to look at a few; all others count as zero pages.
    ///
    /// # Errors
    /// What the file system says; `InvalidInput` for a range that the image does not have.
    pub fn hash_some(&self, key: &[u8; 32], ranges: &[u32]) -> io::Result<RangeHashes> {
        let total = self.layout.ranges_total();
        if ranges.iter().any(|range| *range >= total) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        RangeHashes::of_image(&self.layout, key, 1, ranges, &|first, into| {
            self.image.read_exact_at(into, self.offset(first)?)
        })
    }

    /// The running numbers of all ranges that are not wholly a hole.
    fn ranges_with_data(&self) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        let mut hole_until = 0;
        for number in 0..self.layout.ranges_total() {
            let span = super::ranges::span(&self.layout, number);
            let begin = self.offset(span.first)?;
            let end = begin + u64::from(span.pages) * PAGE_BYTES;
            if end <= hole_until {
                continue;
            }
            match self.next_data(begin)? {
                Some(data) if data < end => found.push(number),
                Some(data) => hole_until = data,
                None => break,
            }
        }
        Ok(found)
    }

    /// Offset of the next byte that is no hole.
    fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.image, SeekFrom::Data(from)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn punch(&self, begin: u64, bytes: u64) -> io::Result<()> {
        // Most zero pages of a guest were never anything else: a look costs less than a change.
        if self
            .next_data(begin)?
            .is_none_or(|data| data >= begin + bytes)
        {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.image, mode, begin, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(&self.image, begin, bytes),
            done => Ok(done?),
        }
    }

    /// Runs a change unless the replica is broken; one that fails breaks it.
    fn change(&self, bytes: u64, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check()?;
        let unchecked = self.unchecked_bytes.fetch_add(bytes, Ordering::Relaxed);
        let done = if unchecked + bytes >= BUDGET_LOOK_BYTES {
            self.unchecked_bytes.store(0, Ordering::Relaxed);
            self.place.make_room().and_then(|()| change())
        } else {
            change()
        };
        if done.is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
        done
    }

    fn check(&self) -> io::Result<()> {
        if self.is_broken() {
            return Err(io::Error::other("the replica is broken"));
        }
        Ok(())
    }

    /// Where a run of pages is in the file; the run must lie in its block.
    fn run(&self, first: PageAddress, pages: u64) -> io::Result<u64> {
        let specs = self.layout.blocks();
        let spec = specs
            .get(usize::from(first.block.0))
            .ok_or(io::ErrorKind::InvalidInput)?;
        if u64::from(first.page) + pages > u64::from(spec.pages) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.offset(first)
    }

    fn offset(&self, at: PageAddress) -> io::Result<u64> {
        let base = self
            .offsets
            .get(usize::from(at.block.0))
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(base + u64::from(at.page) * PAGE_BYTES)
    }
}

impl Replica for ReplicaFile {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.check()?;
        self.image.read_exact_at(into, self.run(at, 1)?)
    }

    fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        let bytes = contents.len() as u64;
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let begin = self.run(first, bytes / PAGE_BYTES)?;
        self.change(bytes, || self.image.write_all_at(contents, begin))
    }

    fn zero(&self, first: PageAddress, count: u32) -> io::Result<()> {
        let begin = self.run(first, u64::from(count))?;
        self.change(0, || match u64::from(count) * PAGE_BYTES {
            0 => Ok(()),
            bytes => self.punch(begin, bytes),
        })
    }
}

/// Overwrites a part of a file with zeros.
pub(super) fn write_zeros(file: &File, begin: u64, bytes: u64) -> io::Result<()> {
    const CHUNK: usize = 1 << 20;
    let zeros = vec![0; CHUNK];
    let mut done = 0;
    while done < bytes {
        let length = usize::try_from(bytes - done).map_or(CHUNK, |left| left.min(CHUNK));
        file.write_all_at(&zeros[..length], begin + done)?;
        done += length as u64;
    }
    Ok(())
}
