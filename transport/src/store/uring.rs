//! Writes in batches through io_uring.
//!
//! It pays where much is written at once past the page cache, as in a wipe: 1.7 times the speed of
//! `pwrite`. It does not pay on the hot path, whose pages belong into the page cache: there ext4 hands
//! each write to a kernel thread, at three times the cost. docs/store.md has the figures,
//! `cargo bench --bench store_write` makes them.
//!
//! Where io_uring is refused (seccomp, a sysctl, an old kernel) [`WriteRing::new`] says so and the
//! caller writes the plain way.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use crate::block::PAGE_SIZE;

/// Pages of the ring's buffer: 2 MiB in flight.
const BUFFER_PAGES: usize = 512;
/// Writes in flight.
const ENTRIES: u32 = 64;
/// Pages of one write of zeros: 256 KiB.
const ZERO_PAGES: usize = 64;

#[derive(Debug, Clone)]
#[repr(align(4096))]
struct Page([u8; PAGE_SIZE]);

/// A ring with a buffer of its own, so that the kernel never reads memory of anybody else.
pub struct WriteRing {
    ring: IoUring,
    pages: Vec<Page>,
}

impl std::fmt::Debug for WriteRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteRing").finish_non_exhaustive()
    }
}

/// One write out of the buffer.
#[derive(Debug, Clone, Copy)]
struct Operation {
    /// Where in the file.
    at: u64,
    /// First page in the buffer.
    page: usize,
    count: usize,
}

impl WriteRing {
    /// Sets a ring up.
    ///
    /// # Errors
    /// When the kernel has no io_uring or does not allow it.
    pub fn new() -> io::Result<WriteRing> {
        Ok(WriteRing {
            ring: IoUring::new(ENTRIES)?,
            pages: vec![Page([0; PAGE_SIZE]); BUFFER_PAGES],
        })
    }

    /// Writes whole pages to their offsets; returns when all are written.
    ///
    /// # Errors
    /// `InvalidInput` for a piece that is no whole number of pages or above 2 MiB; else the first
    /// error of the file system. Some may be written then.
    pub fn write_all(&mut self, file: &File, writes: &[(u64, &[u8])]) -> io::Result<()> {
        let mut operations = Vec::new();
        let mut used = 0;
        for (at, bytes) in writes {
            let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
            if !rest.is_empty() || pages.len() > BUFFER_PAGES {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            if used + pages.len() > BUFFER_PAGES || operations.len() == ENTRIES as usize {
                self.run(file, &operations)?;
                operations.clear();
                used = 0;
            }
            for (kept, page) in self.pages[used..].iter_mut().zip(pages) {
                kept.0 = *page;
            }
            operations.push(Operation {
                at: *at,
                page: used,
                count: pages.len(),
            });
            used += pages.len();
        }
        self.run(file, &operations)
    }

    /// Overwrites a part of a file, widened to whole pages, with zeros.
    ///
    /// # Errors
    /// The first error of the file system.
    pub fn zero(&mut self, file: &File, begin: u64, bytes: u64) -> io::Result<()> {
        let page_bytes = PAGE_SIZE as u64;
        let mut at = begin - begin % page_bytes;
        let end = begin.saturating_add(bytes);
        for page in &mut self.pages[..ZERO_PAGES] {
            page.0.fill(0);
        }
        let mut operations = Vec::new();
        while at < end {
            let left = usize::try_from((end - at).div_ceil(page_bytes)).unwrap_or(ZERO_PAGES);
            let count = left.min(ZERO_PAGES);
            operations.push(Operation { at, page: 0, count });
            at += count as u64 * page_bytes;
            if operations.len() == ENTRIES as usize || at >= end {
                self.run(file, &operations)?;
                operations.clear();
            }
        }
        Ok(())
    }

    /// Runs operations, at most [`ENTRIES`] of them, to their end.
    fn run(&mut self, file: &File, operations: &[Operation]) -> io::Result<()> {
        assert!(
            operations.len() <= ENTRIES as usize,
            "more than the ring holds"
        );
        for (nth, operation) in operations.iter().enumerate() {
            let pages = &self.pages[operation.page..operation.page + operation.count];
            let length = u32::try_from(size_of_val(pages)).map_err(io::Error::other)?;
            let entry =
                opcode::Write::new(types::Fd(file.as_raw_fd()), pages.as_ptr().cast(), length)
                    .offset(operation.at)
                    .build()
                    .user_data(nth as u64);
            // SAFETY: the kernel reads `pages` until the completion. They are the ring's own, and
            // `finish` either waits for every completion or leaks them; nothing changes them before
            // it returns, and `file` is borrowed until then.
            // JUSTIFICATION: io_uring has no safe interface; a wipe is 1.7 times as fast
            // (benches/store_write.rs, group wipe).
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.map_err(io::Error::other)?;
        }
        self.finish(file, operations)
    }

    /// Submits what was pushed and waits for all of it.
    fn finish(&mut self, file: &File, operations: &[Operation]) -> io::Result<()> {
        let mut done = Ok(());
        let mut left = operations.len();
        while left > 0 {
            match self.ring.submit_and_wait(left) {
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted
                            | io::ErrorKind::WouldBlock
                            | io::ErrorKind::ResourceBusy
                    ) => {}
                Err(error) => {
                    // Some may be under way for ever: their memory is never used for anything else.
                    mem::forget(mem::replace(
                        &mut self.pages,
                        vec![Page([0; PAGE_SIZE]); BUFFER_PAGES],
                    ));
                    return Err(error);
                }
            }
            for completion in self.ring.completion() {
                left = left.saturating_sub(1);
                let nth = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
                if let Some(operation) = operations.get(nth) {
                    let one = written(&self.pages, file, *operation, completion.result());
                    done = done.and(one);
                }
            }
        }
        done
    }
}

/// Judges a completion; what a short write left out is written the plain way.
fn written(pages: &[Page], file: &File, operation: Operation, result: i32) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let Ok(bytes) = usize::try_from(result) else {
        return Err(io::Error::from_raw_os_error(-result));
    };
    // Direct I/O is short by whole pages only.
    let whole = bytes / PAGE_SIZE;
    let from = operation.at + (whole * PAGE_SIZE) as u64;
    for (page, nth) in pages[operation.page..operation.page + operation.count]
        .iter()
        .zip(0_u64..)
        .skip(whole)
    {
        let nth = nth - whole as u64;
        file.write_all_at(&page.0, from + nth * PAGE_SIZE as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// Pieces of all sizes reach their places; more than one ring and one buffer hold.
    #[test]
    fn batches_are_written_whole() {
        let mut ring = match WriteRing::new() {
            Ok(ring) => ring,
            Err(error) => {
                assert!(
                    std::env::var_os("REQUIRE_ALL").is_none(),
                    "io_uring: {error}"
                );
                eprintln!("Skipped: io_uring is refused here: {error}");
                return;
            }
        };
        let path = std::env::temp_dir().join(format!("uring-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        let content: Vec<u8> = (0..300 * PAGE_SIZE)
            .map(|at| u8::try_from(at / PAGE_SIZE % 255 + 1).unwrap())
            .collect();
        let mut writes = Vec::new();
        let mut at = 0;
        for pages in [1, 3, 64, 1].into_iter().cycle().take(140) {
            let bytes = pages * PAGE_SIZE;
            let from = at % (200 * PAGE_SIZE);
            writes.push((at as u64, &content[from - from % PAGE_SIZE..][..bytes]));
            at += bytes;
        }
        ring.write_all(&file, &writes).unwrap();
        for (at, expected) in &writes {
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, *at).unwrap();
            assert!(found == *expected, "at {at}");
        }
        ring.zero(&file, 5000, 70 * PAGE_SIZE as u64).unwrap();
        let mut found = vec![1; 73 * PAGE_SIZE];
        file.read_exact_at(&mut found, 0).unwrap();
        let pages: Vec<bool> = found
            .chunks(PAGE_SIZE)
            .map(|page| page.iter().all(|byte| *byte == 0))
            .collect();
        let expected: Vec<bool> = (0..73).map(|page| (1..72).contains(&page)).collect();
        assert_eq!(pages, expected);

        let odd = ring.write_all(&file, &[(0, &[1; 17])]).unwrap_err();
        assert_eq!(odd.kind(), io::ErrorKind::InvalidInput);
        let read_only = File::open(&path).unwrap();
        let refused = ring.write_all(&read_only, &writes[..3]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(9), "EBADF of every write");
        ring.write_all(&file, &writes[..3]).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
