//! Builds an index: reads all content of an image, hashes it, sorts the hashes on disk.
//!
//! Entries go to 64 parts by their first hash bits, each in a file without a name; each part is then
//! sorted in memory and appended. So memory stays at a few megabytes for an image of any size.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::BlockSource;
use super::index::{BUCKETS, ENTRY_BYTES, Entry, HEAD_BYTES, Stamp, bucket};
use crate::block::{PAGE_SIZE, PageHasher};
use crate::store::threads::on_threads;

const PARTS: usize = 64;
/// Blocks of one read: 1 MiB.
const CHUNK_BLOCKS: u32 = 256;
/// Most blocks of one image (256 GiB of content): bounds the index at 768 MiB and a part in memory
/// at some 16 MiB. What lies behind is not known content.
pub(super) const BLOCKS_MAX: u64 = 64 << 20;

/// Writes the index of `source` to `path`, whole or not at all.
pub(super) fn build(
    path: &Path,
    source: &dyn BlockSource,
    key: &[u8; 32],
    stamp: &Stamp,
    threads: usize,
) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let parts: Vec<Mutex<BufWriter<File>>> = (0..PARTS)
        .map(|_| Ok(Mutex::new(BufWriter::new(nameless(folder)?))))
        .collect::<io::Result<_>>()?;
    let chunks = Mutex::new(Chunks {
        source,
        run: 0..0,
        left: BLOCKS_MAX,
    });
    let hasher = PageHasher::new(key);
    let work = || hash_chunks(source, &hasher, &chunks, &parts);
    on_threads(threads, work)?;

    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = write_sorted(&draft, stamp, parts).and_then(|()| std::fs::rename(&draft, path));
    if written.is_err() {
        std::fs::remove_file(&draft).unwrap_or_default();
    }
    written?;
    File::open(folder)?.sync_all()
}

/// Hands out the image's content, piece by piece.
struct Chunks<'a> {
    source: &'a dyn BlockSource,
    /// What is left of the run at hand.
    run: Range<u32>,
    /// Blocks that may still be indexed.
    left: u64,
}

impl Chunks<'_> {
    fn next(&mut self) -> io::Result<Option<Range<u32>>> {
        if self.run.is_empty() {
            let Some(run) = self.source.next_content(self.run.end)? else {
                return Ok(None);
            };
            if run.is_empty() || run.start < self.run.end {
                return Err(io::Error::other("an image's content does not ascend"));
            }
            self.run = run;
        }
        let end = self
            .run
            .end
            .min(self.run.start.saturating_add(CHUNK_BLOCKS));
        let chunk = self.run.start..end;
        self.left = self.left.saturating_sub(u64::from(end - chunk.start));
        self.run.start = end;
        Ok((self.left > 0).then_some(chunk))
    }
}

fn hash_chunks(
    source: &dyn BlockSource,
    hasher: &PageHasher,
    chunks: &Mutex<Chunks<'_>>,
    parts: &[Mutex<BufWriter<File>>],
) -> io::Result<()> {
    let mut content = Vec::new();
    loop {
        let chunk = chunks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next()?;
        let Some(chunk) = chunk else {
            return Ok(());
        };
        content.resize(chunk.len() * PAGE_SIZE, 0);
        source.read(chunk.start, &mut content)?;
        let (pages, _) = content.as_chunks::<PAGE_SIZE>();
        for (block, page) in chunk.zip(pages) {
            if *page == [0; PAGE_SIZE] {
                continue;
            }
            let hash = hasher.hash(page).0;
            let (prefix, _) = hash.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
            let entry = Entry {
                prefix: *prefix,
                block,
            };
            let part = &parts[usize::from(prefix[0]) * PARTS / 256];
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            part.write_all(&entry.to_bytes())?;
        }
    }
}

/// Sorts part after part into the file; of equal hashes the lowest block stays.
fn write_sorted(path: &Path, stamp: &Stamp, parts: Vec<Mutex<BufWriter<File>>>) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    let mut counts = vec![0_u32; BUCKETS + 1];
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.seek(io::SeekFrom::Start(HEAD_BYTES as u64))?;
    for part in parts {
        let part = part.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut part = part.into_inner().map_err(io::IntoInnerError::into_error)?;
        part.rewind()?;
        let mut bytes = Vec::new();
        part.read_to_end(&mut bytes)?;
        let (raw, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let mut entries: Vec<Entry> = raw.iter().map(Entry::from_bytes).collect();
        entries.sort_unstable();
        entries.dedup_by_key(|entry| entry.prefix);
        for entry in entries {
            counts[bucket(&entry.prefix) + 1] += 1;
            out.write_all(&entry.to_bytes())?;
        }
    }
    let mut below = 0;
    for count in &mut counts {
        below += *count;
        *count = below;
    }
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    let counts: Vec<u8> = counts
        .iter()
        .flat_map(|count| count.to_le_bytes())
        .collect();
    file.write_all_at(&counts, stamp.len() as u64)?;
    // The stamp comes last: a file without it is no index.
    file.write_all_at(stamp, 0)?;
    file.sync_all()
}

fn nameless(folder: &Path) -> io::Result<File> {
    let flags = i32::try_from(rustix::fs::OFlags::TMPFILE.bits()).unwrap_or(0);
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .mode(0o600)
        .open(folder)
}
