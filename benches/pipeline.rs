//! The whole pipeline of one core beside the bare libraries in series on the same pages, in turns in
//! the same run: what our own code costs beyond what it cannot avoid.
//!
//! `cargo bench --bench pipeline` prints one row per page class; `-- --check` also fails when a
//! ratio is below its bound. Memory to memory: no socket, no thread.

mod pages;

use std::hint::black_box;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use pages::CLASSES;
use transport::block::*;
use transport::wire::limits::BATCH_MAX_PAGES;

const KEY: [u8; 32] = [1; 32];
/// 32 MiB: more than the caches hold.
const PAGES: u32 = 8192;
const TURNS: usize = 21;

/// Pages of one lane that stay as they are, in a dense row.
struct Still(Vec<[u8; PAGE_SIZE]>);

impl Contents for Still {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let page = at.page / (512 * 8) * 512 + at.page % 512;
        into.copy_from_slice(&self.0[page as usize]);
        Ok(())
    }
}

/// One measured row.
struct Row {
    name: &'static str,
    /// Class of the pages.
    class: usize,
    /// What the encoder may leave out.
    disable: Disable,
    /// The bare libraries on a batch of pages.
    bare: fn(&[[u8; PAGE_SIZE]], &mut Bare),
    /// Least ratio to the bare libraries, or 0.
    ratio_min: f64,
    /// Least speed in GB/s, or 0.
    speed_min: f64,
}

/// What the bare libraries work with.
struct Bare {
    compressor: zstd::bulk::Compressor<'static>,
    frame: Vec<u8>,
}

fn rows() -> [Row; 3] {
    let send_all = Disable {
        same: true,
        ..Disable::default()
    };
    [
        Row {
            name: "zero",
            class: 0,
            disable: send_all,
            bare: |pages, _| pages.iter().for_each(|page| assert!(is_zero(page))),
            ratio_min: 0.0,
            speed_min: 5.0,
        },
        Row {
            name: "unchanged",
            class: 2,
            disable: Disable::default(),
            bare: |pages, _| pages.iter().for_each(hash),
            ratio_min: 0.85,
            speed_min: 0.0,
        },
        Row {
            name: "literal",
            class: 2,
            disable: send_all,
            bare: compress,
            ratio_min: 0.9,
            speed_min: 0.0,
        },
    ]
}

fn is_zero(page: &[u8; PAGE_SIZE]) -> bool {
    black_box(page)
        .chunks_exact(64)
        .all(|group| group.iter().fold(0, |any, byte| any | byte) == 0)
}

fn hash(page: &[u8; PAGE_SIZE]) {
    assert!(!is_zero(page));
    black_box(blake3::keyed_hash(&KEY, page));
}

/// Zero scan and hash of each page, then one frame over all of them.
fn compress(pages: &[[u8; PAGE_SIZE]], bare: &mut Bare) {
    pages.iter().for_each(hash);
    let written = bare
        .compressor
        .compress_to_buffer(pages.as_flattened(), bare.frame.as_mut_slice());
    black_box(written.expect("the frame has room"));
}

/// Median of the bare libraries and of the pipeline, taken in turns.
fn measure(row: &Row) -> (Duration, Duration) {
    let contents = Still((0..u64::from(PAGES)).map(CLASSES[row.class].make).collect());
    let block = BlockSpec {
        name: "ram".into(),
        pages: PAGES * 8,
    };
    let layout = Arc::new(Layout::new(vec![block]).expect("one block"));
    let [part, ..] = Ledger::split(&layout, &KEY);
    let mut encoder =
        LaneEncoder::new(part, &KEY, FIRST_SEQ, row.disable).expect("memory for zstd");
    encoder.set_level(1).expect("a known level");
    let mut bare = Bare {
        compressor: zstd::bulk::Compressor::new(1).expect("memory for zstd"),
        frame: vec![0; zstd::zstd_safe::compress_bound(BATCH_MAX_PAGES * PAGE_SIZE)],
    };
    // Whole ranges of lane 0.
    let taken: Vec<Taken> = (0..PAGES)
        .map(|page| Taken {
            at: PageAddress {
                block: BlockId(0),
                page: page / 512 * 512 * 8 + page % 512,
            },
            zero: false,
        })
        .collect();
    let mut out = BytesMut::with_capacity(1 << 20);
    let mut times = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        let begin = now();
        for pages in contents.0.chunks(BATCH_MAX_PAGES) {
            (row.bare)(pages, &mut bare);
        }
        times.0.push(begin.elapsed());
        let begin = now();
        for taken in taken.chunks(BATCH_MAX_PAGES) {
            out.clear();
            let stats = encoder.encode(taken, &Sources::of(&contents), &mut out);
            black_box(stats.expect("memory for zstd"));
        }
        times.1.push(begin.elapsed());
    }
    (median(times.0), median(times.1))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}

fn main() -> ExitCode {
    let must_hold = std::env::args().any(|word| word == "--check");
    let mut is_good = true;
    let mut table = String::from("pages      of         bare GB/s  pipeline GB/s  ratio\n");
    for row in rows() {
        let (bare, pipeline) = measure(&row);
        let speed = |time: Duration| f64::from(PAGES) * 4096.0 / time.as_secs_f64() / 1e9;
        let ratio = bare.as_secs_f64() / pipeline.as_secs_f64();
        let is_met = ratio >= row.ratio_min && speed(pipeline) >= row.speed_min;
        is_good &= is_met;
        table += &format!(
            "{:<10} {:<10} {:>9.2}  {:>13.2}  {ratio:>5.2}{}\n",
            row.name,
            CLASSES[row.class].name,
            speed(bare),
            speed(pipeline),
            if is_met { "" } else { "  below its bound" },
        );
    }
    let written = io::stdout().write_all(table.as_bytes());
    if written.is_err() || (must_hold && !is_good) {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
