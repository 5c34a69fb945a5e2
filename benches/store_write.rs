//! How pages are best written to and read from a replica: `pwrite`, io_uring, and their sizes.
//!
//! Groups: `replica` (the hot path: batches of 64 pages somewhere in an image that is there, through
//! the page cache), `wipe` (256 KiB after 256 KiB, past the page cache), `read` (as for hashing).
//! The folder is TMPDIR or /tmp: give one on the disk that matters.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use transport::store::WriteRing;

const PAGE: usize = 4096;
const IMAGE_BYTES: u64 = 256 << 20;
const BATCH_PAGES: usize = 64;

/// The hot path, with runs of 1, 8 and 64 neighbours.
fn replica(criterion: &mut Criterion) {
    let image = Image::new();
    let batch = vec![7; BATCH_PAGES * PAGE];
    let mut group = criterion.benchmark_group("store_write/replica");
    group.throughput(Throughput::Bytes(batch.len() as u64));
    for run in [1, 8, 64] {
        let mut places = Places(1);
        let name = format!("pwrite/runs-of-{run}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for part in batch.chunks(run * PAGE) {
                    image
                        .file
                        .write_all_at(part, places.next(run))
                        .expect("the disk works");
                }
            });
        });
        let Ok(mut ring) = WriteRing::new() else {
            eprintln!("Skipped: io_uring is refused here");
            continue;
        };
        let name = format!("io_uring/runs-of-{run}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let parts = batch.chunks(run * PAGE);
                let writes: Vec<_> = parts.map(|part| (places.next(run), part)).collect();
                ring.write_all(&image.file, &writes)
                    .expect("the disk writes");
            });
        });
    }
}

/// 16 MiB of zeros, in order.
fn wipe(criterion: &mut Criterion) {
    const BYTES: u64 = 16 << 20;
    let image = Image::new();
    let mut group = criterion.benchmark_group("store_write/wipe");
    group.sample_size(20).throughput(Throughput::Bytes(BYTES));
    let zeros = vec![0; 256 << 10];
    let mut begin = 0;
    group.bench_function("pwrite+fdatasync", |bencher| {
        bencher.iter(|| {
            begin = (begin + BYTES) % IMAGE_BYTES;
            for at in (begin..begin + BYTES).step_by(zeros.len()) {
                image.file.write_all_at(&zeros, at).expect("the disk works");
            }
            image.file.sync_data().expect("the disk works");
        });
    });
    let (Ok(mut ring), Ok(direct)) = (WriteRing::new(), image.direct()) else {
        eprintln!("Skipped: no io_uring or no direct I/O here");
        return;
    };
    group.bench_function("io_uring-direct+fdatasync", |bencher| {
        bencher.iter(|| {
            begin = (begin + BYTES) % IMAGE_BYTES;
            ring.zero(&direct, begin, BYTES).expect("the disk works");
            direct.sync_data().expect("the disk works");
        });
    });
}

/// Ranges of 2 MiB out of the page cache.
fn read(criterion: &mut Criterion) {
    let image = Image::new();
    let mut range = vec![0; 2 << 20];
    let mut group = criterion.benchmark_group("store_write/read");
    group.throughput(Throughput::Bytes(range.len() as u64));
    let mut places = Places(1);
    group.bench_function("pread-range", |bencher| {
        bencher.iter(|| {
            image
                .file
                .read_exact_at(&mut range, places.next(512))
                .expect("the disk works");
        });
    });
    group.throughput(Throughput::Bytes(PAGE as u64));
    let mut page = [0; PAGE];
    group.bench_function("pread-page", |bencher| {
        bencher.iter(|| {
            image
                .file
                .read_exact_at(&mut page, places.next(1))
                .expect("the disk works")
        });
    });
}

/// A file whose blocks all exist, removed at the end.
struct Image {
    path: PathBuf,
    file: File,
}

impl Image {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("store-write-{}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .expect("the disk works");
        let chunk = vec![1; 1 << 20];
        for at in (0..IMAGE_BYTES).step_by(chunk.len()) {
            file.write_all_at(&chunk, at).expect("the disk works");
        }
        file.sync_data().expect("the disk works");
        Self { path, file }
    }

    fn direct(&self) -> std::io::Result<File> {
        let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
        OpenOptions::new()
            .write(true)
            .custom_flags(flags)
            .open(&self.path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).expect("the disk works");
    }
}

/// Offsets of runs, the same in every run of the bench.
struct Places(u64);

impl Places {
    fn next(&mut self, run: usize) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x14057b7ef767814f);
        let bytes = (run * PAGE) as u64;
        (self.0 >> 20) % (IMAGE_BYTES / bytes) * bytes
    }
}

criterion_group!(benches, replica, wipe, read);
criterion_main!(benches);
