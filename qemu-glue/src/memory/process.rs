//! Reads guest memory from `/proc/PID/mem` of a QEMU process, block by block.
//!
//! Needs the right to trace that process: root, or its own user. Nothing is mapped; a page is
//! copied by the kernel into the caller's private buffer, and may be torn while the guest runs.

use std::fs::{self, File};
use std::io;

use rustix::io::Errno;

use super::ramblock::RamBlock;
use crate::qmp::{ProcessError, ProcessId};

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;

/// A block that must be there: name and length as the migration stream has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedBlock {
    /// QEMU's name of the block.
    pub name: String,
    /// Bytes in use.
    pub used_bytes: u64,
}

/// Why guest memory cannot be read, or is not certain to be what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The process's blocks are not those expected (S9).
    #[error("RAM block {name:?}: {detail}")]
    BlockMismatch {
        /// The block.
        name: String,
        /// What differs.
        detail: String,
    },
    /// This QEMU does not tell where its blocks are.
    #[error("this QEMU does not tell where RAM block {name:?} is in its memory (8.0 and later do)")]
    NoHostAddress {
        /// The block.
        name: String,
    },
    /// A block that [`GuestMemory::open_known`] left out.
    #[error("the place of RAM block {block} is not known")]
    NotOpen {
        /// Place of the block in the list given at the opening.
        block: usize,
    },
    /// The process has ended, or its pid belongs to another one.
    #[error("QEMU process {pid} is gone")]
    ProcessGone {
        /// Its pid.
        pid: u32,
    },
    /// Our own call names a page that the block does not have.
    #[error("RAM block {block} has no pages {first_page} to {first_page} + {count}")]
    NoSuchPage {
        /// Place of the block in the list given to [`GuestMemory::open`].
        block: usize,
        /// First page asked for.
        first_page: u64,
        /// Pages asked for.
        count: u64,
    },
    /// The system refused to open or read the memory.
    #[error("cannot read the memory of QEMU process {pid}")]
    Read {
        /// Its pid.
        pid: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process could not be looked at.
    #[error("cannot look at the QEMU process")]
    Process(#[from] ProcessError),
}

/// Memory of a guest, read-only.
#[derive(Debug)]
pub struct GuestMemory {
    memory: File,
    pid: u32,
    /// `None` for a block whose place is not known.
    blocks: Vec<Option<Range>>,
}

/// Where a block lies in QEMU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u64,
    bytes: u64,
}

impl GuestMemory {
    /// Opens the memory of `process`, whose blocks are `blocks`. The blocks of `expected` get the
    /// numbers of their places in it.
    ///
    /// # Errors
    /// [`MemoryError::BlockMismatch`] unless each expected block is there once, with the same
    /// length, at an address of its own that the process has mapped.
    pub fn open(
        process: &ProcessId,
        blocks: &[RamBlock],
        expected: &[ExpectedBlock],
    ) -> Result<Self, MemoryError> {
        let memory = Self::open_known(process, blocks, expected)?;
        match expected
            .iter()
            .zip(&memory.blocks)
            .find(|(_, range)| range.is_none())
        {
            Some((block, _)) => Err(MemoryError::NoHostAddress {
                name: block.name.clone(),
            }),
            None => Ok(memory),
        }
    }

    /// As [`GuestMemory::open`], but leaves out blocks whose place QEMU does not tell (up to 7.2
    /// those that the guest's address space does not show): [`GuestMemory::is_open`] says which.
    ///
    /// # Errors
    /// As [`GuestMemory::open`].
    pub fn open_known(
        process: &ProcessId,
        blocks: &[RamBlock],
        expected: &[ExpectedBlock],
    ) -> Result<Self, MemoryError> {
        let ranges = locate(blocks, expected)?;
        let pid = process.pid;
        let failed = |source: io::Error| {
            // A zombie has a folder in /proc, but no memory.
            let no_memory = source.raw_os_error() == Some(Errno::SRCH.raw_os_error());
            if no_memory || source.kind() == io::ErrorKind::NotFound {
                MemoryError::ProcessGone { pid }
            } else {
                MemoryError::Read { pid, source }
            }
        };
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed)?;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed)?;
        // Looked at after the opening: the open file belongs to that memory for ever.
        if !process.is_alive()? {
            return Err(MemoryError::ProcessGone { pid });
        }
        for (block, range) in expected.iter().zip(&ranges) {
            if range.is_some_and(|range| !is_mapped(&maps, range)) {
                let detail = format!("process {pid} has no memory at its address");
                return Err(mismatch(&block.name, detail));
            }
        }
        Ok(Self {
            memory,
            pid,
            blocks: ranges,
        })
    }

    /// Can the pages of this block be read?
    pub fn is_open(&self, block: usize) -> bool {
        self.blocks.get(block).is_some_and(Option::is_some)
    }

    /// Reads one page. `block` is its place in the list given to [`GuestMemory::open`].
    ///
    /// # Errors
    /// When the page is not there, the process is gone, or the system refuses.
    pub fn read_page(
        &self,
        block: usize,
        page: u32,
        into: &mut [u8; PAGE_BYTES],
    ) -> Result<(), MemoryError> {
        self.read_pages(block, page, into)
    }

    /// Reads consecutive pages, as many as `into` holds.
    ///
    /// # Errors
    /// As [`GuestMemory::read_page`]; the content of `into` is then unspecified.
    ///
    /// # Panics
    /// When `into` is no whole number of pages.
    pub fn read_pages(
        &self,
        block: usize,
        first_page: u32,
        into: &mut [u8],
    ) -> Result<(), MemoryError> {
        assert!(into.len().is_multiple_of(PAGE_BYTES), "whole pages only");
        let first_page = u64::from(first_page);
        let bytes = into.len() as u64;
        let page_bytes = PAGE_BYTES as u64;
        let no_such_page = || MemoryError::NoSuchPage {
            block,
            first_page,
            count: bytes / page_bytes,
        };
        let range = self.blocks.get(block).ok_or_else(no_such_page)?;
        let range = range.ok_or(MemoryError::NotOpen { block })?;
        let offset = first_page * page_bytes;
        if offset
            .checked_add(bytes)
            .is_none_or(|end| end > range.bytes)
        {
            return Err(no_such_page());
        }
        self.read_exact(range.start + offset, into)
    }

    fn read_exact(&self, mut address: u64, mut into: &mut [u8]) -> Result<(), MemoryError> {
        while !into.is_empty() {
            match rustix::io::pread(&self.memory, &mut *into, address) {
                // A process that has ended has no memory left: end of file.
                Ok(0) => return Err(MemoryError::ProcessGone { pid: self.pid }),
                Ok(count) => {
                    address += count as u64;
                    into = &mut into[count..];
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(MemoryError::Read {
                        pid: self.pid,
                        source: error.into(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The place of each expected block, certain or an error.
fn locate(
    blocks: &[RamBlock],
    expected: &[ExpectedBlock],
) -> Result<Vec<Option<Range>>, MemoryError> {
    let mut ranges = Vec::with_capacity(expected.len());
    for want in expected {
        let mut named = blocks.iter().filter(|block| block.name == want.name);
        let block = match (named.next(), named.next()) {
            (Some(block), None) => block,
            (None, _) => {
                return Err(mismatch(
                    &want.name,
                    "QEMU has none of that name".to_owned(),
                ));
            }
            (Some(_), Some(_)) => {
                return Err(mismatch(&want.name, "QEMU has two of that name".to_owned()));
            }
        };
        if block.used_bytes != want.used_bytes {
            let detail = format!(
                "{} bytes were expected, QEMU has {}",
                want.used_bytes, block.used_bytes
            );
            return Err(mismatch(&want.name, detail));
        }
        let Some(start) = block.host_address else {
            ranges.push(None);
            continue;
        };
        let page_bytes = PAGE_BYTES as u64;
        let sound = start != 0
            && start.is_multiple_of(page_bytes)
            && start.checked_add(block.used_bytes).is_some();
        if !sound {
            return Err(mismatch(
                &want.name,
                format!("{start:#x} cannot be its address"),
            ));
        }
        ranges.push(Some(Range {
            start,
            bytes: block.used_bytes,
        }));
    }
    reject_overlaps(expected, &ranges)?;
    Ok(ranges)
}

/// Two blocks at one place (or a block that is named twice): at least one is not what it seems.
fn reject_overlaps(
    expected: &[ExpectedBlock],
    ranges: &[Option<Range>],
) -> Result<(), MemoryError> {
    let known = ranges
        .iter()
        .zip(expected)
        .filter_map(|(range, block)| Some(((*range)?, block)));
    let mut by_start: Vec<_> = known.collect();
    by_start.sort_by_key(|(range, _)| range.start);
    for pair in by_start.windows(2) {
        let [(lower, lower_block), (upper, upper_block)] = pair else {
            continue;
        };
        if lower.start + lower.bytes > upper.start {
            let detail = format!("it overlaps {:?}", upper_block.name);
            return Err(mismatch(&lower_block.name, detail));
        }
    }
    Ok(())
}

/// Is all of the range covered by readable mappings? Lines of /proc/PID/maps are in order.
fn is_mapped(maps: &str, range: Range) -> bool {
    let end = range.start + range.bytes;
    let mut covered = range.start;
    for (from, to) in maps.lines().filter_map(readable_range) {
        if from <= covered && covered < to {
            covered = to;
        }
    }
    covered >= end
}

fn readable_range(line: &str) -> Option<(u64, u64)> {
    let (range, rest) = line.split_once(' ')?;
    let (from, to) = range.split_once('-')?;
    rest.starts_with('r').then_some(())?;
    Some((
        u64::from_str_radix(from, 16).ok()?,
        u64::from_str_radix(to, 16).ok()?,
    ))
}

fn mismatch(name: &str, detail: String) -> MemoryError {
    MemoryError::BlockMismatch {
        name: name.to_owned(),
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S9 as far as it concerns reading: each way in which a block's place is not certain.
    #[test]
    fn s9_uncertain_places_are_refused() {
        let detail =
            |blocks: &[RamBlock], expected: &[ExpectedBlock]| match locate(blocks, expected) {
                Err(MemoryError::BlockMismatch { name, detail }) => format!("{name}: {detail}"),
                other => panic!("{other:?}"),
            };
        let a = block("a", 0x10_0000, 0x2000);
        assert_eq!(
            detail(std::slice::from_ref(&a), &[want("b", 0x2000)]),
            "b: QEMU has none of that name"
        );
        let twice = [a.clone(), a.clone()];
        assert_eq!(
            detail(&twice, &[want("a", 0x2000)]),
            "a: QEMU has two of that name"
        );
        let other_size = "a: 4096 bytes were expected, QEMU has 8192";
        assert_eq!(
            detail(std::slice::from_ref(&a), &[want("a", 0x1000)]),
            other_size
        );
        let zero = [block("a", 0, 0x2000)];
        assert_eq!(
            detail(&zero, &[want("a", 0x2000)]),
            "a: 0x0 cannot be its address"
        );
        let odd = [block("a", 0x1001, 0x2000)];
        assert_eq!(
            detail(&odd, &[want("a", 0x2000)]),
            "a: 0x1001 cannot be its address"
        );
        let last = [block("a", 0xffff_ffff_ffff_f000, 0x2000)];
        assert!(detail(&last, &[want("a", 0x2000)]).ends_with("cannot be its address"));
        let near = [a.clone(), block("b", 0x10_1000, 0x1000)];
        let both = [want("b", 0x1000), want("a", 0x2000)];
        assert_eq!(detail(&near, &both), "a: it overlaps \"b\"");
        assert_eq!(
            detail(
                std::slice::from_ref(&a),
                &[want("a", 0x2000), want("a", 0x2000)]
            )
            .len(),
            18
        );
    }

    /// A block whose place QEMU does not tell is refused, or left out where that was asked for.
    #[test]
    fn unknown_places() {
        let us = ProcessId::of(std::process::id()).unwrap();
        let unknown = RamBlock {
            host_address: None,
            ..block("a", 1, 0x2000)
        };
        let (blocks, expected) = ([unknown], [want("a", 0x2000)]);
        let result = GuestMemory::open(&us, &blocks, &expected);
        assert!(matches!(result, Err(MemoryError::NoHostAddress { name }) if name == "a"));
        let memory = GuestMemory::open_known(&us, &blocks, &expected).unwrap();
        assert!(!memory.is_open(0) && !memory.is_open(1));
        let result = memory.read_page(0, 0, &mut [0; PAGE_BYTES]);
        assert!(
            matches!(result, Err(MemoryError::NotOpen { block: 0 })),
            "{result:?}"
        );
    }

    /// A range is mapped only when readable mappings cover it without a hole.
    #[test]
    fn holes_in_maps() {
        let maps = "1000-3000 rw-p 0 00:00 0 \n3000-4000 r--s 0 00:01 5 /memfd:a b\n5000-6000 rw-p 0\n\
                    6000-7000 ---p 0 00:00 0\n";
        let check = |start, bytes| is_mapped(maps, Range { start, bytes });
        assert!(check(0x1000, 0x3000) && check(0x2000, 0x1000) && check(0x5000, 0x1000));
        assert!(!check(0x1000, 0x5000) && !check(0x5000, 0x2000) && !check(0, 0x2000));
        assert!(!check(0x8000, 0x1000));
    }

    /// Reads our own memory through /proc, within the block only.
    #[test]
    fn reads_within_the_block() {
        let pages: Vec<u8> = (0..5 * PAGE_BYTES)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        let start = pages.as_ptr().addr().next_multiple_of(PAGE_BYTES);
        let first = start - pages.as_ptr().addr();
        let us = ProcessId::of(std::process::id()).unwrap();
        let size = 3 * PAGE_BYTES as u64;
        let blocks = [block("a", start as u64, size)];
        let memory = GuestMemory::open(&us, &blocks, &[want("a", size)]).unwrap();
        let mut page = [0; PAGE_BYTES];
        memory.read_page(0, 2, &mut page).unwrap();
        assert_eq!(page, pages[first + 2 * PAGE_BYTES..][..PAGE_BYTES]);
        let mut all = vec![0; 3 * PAGE_BYTES];
        memory.read_pages(0, 0, &mut all).unwrap();
        assert_eq!(all, pages[first..][..3 * PAGE_BYTES]);
        let refused = |result| matches!(result, Err(MemoryError::NoSuchPage { .. }));
        assert!(refused(memory.read_page(0, 3, &mut page)));
        assert!(refused(memory.read_page(0, u32::MAX, &mut page)));
        assert!(refused(memory.read_pages(0, 1, &mut all)));
        assert!(refused(memory.read_page(1, 0, &mut page)));
    }

    /// A process that has no such memory is not the one that the blocks came from.
    #[test]
    fn another_process_is_refused() {
        let us = ProcessId::of(std::process::id()).unwrap();
        let blocks = [block("a", 0x1000, 0x2000)];
        let result = GuestMemory::open(&us, &blocks, &[want("a", 0x2000)]);
        assert!(matches!(result, Err(MemoryError::BlockMismatch { name, .. }) if name == "a"));
        let before = ProcessId {
            start_time_ticks: 1,
            ..us
        };
        let result = GuestMemory::open(&before, &[], &[]);
        assert!(matches!(result, Err(MemoryError::ProcessGone { .. })));
    }

    fn block(name: &str, address: u64, used_bytes: u64) -> RamBlock {
        RamBlock {
            name: name.to_owned(),
            page_size_bytes: 4096,
            offset: 0,
            used_bytes,
            total_bytes: used_bytes,
            host_address: Some(address),
        }
    }

    fn want(name: &str, used_bytes: u64) -> ExpectedBlock {
        ExpectedBlock {
            name: name.to_owned(),
            used_bytes,
        }
    }
}
