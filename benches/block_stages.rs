//! CPU cost of what happens to a page: bytes of guest memory per second and core, by stage and
//! class of page.

mod pages;

use std::hint::black_box;
use std::io;
use std::sync::{Arc, RwLock};

use bytes::BytesMut;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pages::{CLASSES, Class};
use transport::block::*;
use transport::wire::{LaneFramer, LaneItem};

const KEY: [u8; 32] = [1; 32];
/// One batch at its largest.
const PAGES: u32 = 64;
const BATCH_BYTES: u64 = PAGES as u64 * PAGE_SIZE as u64;

/// Pages that stay as they are.
struct Still(Vec<[u8; PAGE_SIZE]>);

impl Still {
    fn new(class: &Class) -> Self {
        Self((0..u64::from(PAGES)).map(class.make).collect())
    }
}

impl Contents for Still {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        into.copy_from_slice(&self.0[at.page as usize % self.0.len()]);
        Ok(())
    }
}

/// Memory that is written and not kept.
struct Memory(Box<[u8; PAGE_SIZE]>);

impl Sink for Memory {
    fn zero(&mut self, _: PageAddress, count: u32) -> io::Result<()> {
        for _ in 0..count {
            black_box(&mut self.0).fill(0);
        }
        Ok(())
    }

    fn page(&mut self, _: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        black_box(&mut self.0).copy_from_slice(content);
        Ok(())
    }
}

fn layout(pages: u32) -> Arc<Layout> {
    let block = BlockSpec {
        name: "ram".into(),
        pages,
    };
    Arc::new(Layout::new(vec![block]).expect("one block"))
}

fn part() -> LedgerPart {
    let [first, ..] = Ledger::split(&layout(512), &KEY);
    first
}

fn taken() -> Vec<Taken> {
    let at = |page| PageAddress {
        block: BlockId(0),
        page,
    };
    (0..PAGES)
        .map(|page| Taken {
            at: at(page),
            zero: false,
        })
        .collect()
}

fn encoder(disable: Disable) -> LaneEncoder {
    LaneEncoder::new(part(), &KEY, FIRST_SEQ, disable).expect("memory for zstd")
}

/// Batches of one class, as a decoder gets them.
fn batches(class: &Class, count: usize) -> Vec<bytes::Bytes> {
    let mut stream = BytesMut::new();
    let mut encoder = encoder(Disable {
        same: true,
        ..Disable::default()
    });
    encoder.header(1).put(&mut stream);
    for _ in 0..count {
        encoder
            .encode(&taken(), &Sources::of(&Still::new(class)), &mut stream)
            .expect("memory for zstd");
    }
    let mut framer = LaneFramer::new();
    framer.push(&stream);
    std::iter::from_fn(|| framer.next_item().expect("own bytes"))
        .filter_map(|item| match item {
            LaneItem::Batch(body) => Some(body),
            LaneItem::Header(_) | LaneItem::Mark { .. } => None,
        })
        .collect()
}

fn hash(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hash");
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    let hasher = PageHasher::new(&KEY);
    let page = (CLASSES[3].make)(1);
    group.bench_function("page", |bencher| {
        bencher.iter(|| hasher.hash(black_box(&page)))
    });
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Bytes(BATCH_BYTES));
    let stages = [
        (
            "all",
            Disable {
                same: true,
                ..Disable::default()
            },
        ),
        (
            "without-literal",
            Disable {
                same: true,
                literal: true,
                ..Disable::default()
            },
        ),
        ("same", Disable::default()),
    ];
    for (stage, disable) in stages {
        for class in &CLASSES {
            let contents = Still::new(class);
            let taken = taken();
            let mut encoder = encoder(disable);
            let mut out = BytesMut::with_capacity(1 << 20);
            group.bench_function(format!("{stage}/{}", class.name), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    encoder
                        .encode(&taken, &Sources::of(&contents), &mut out)
                        .expect("memory for zstd")
                });
            });
        }
    }
    for level in [-5, 1, 3, 6] {
        for class in &CLASSES[1..3] {
            let contents = Still::new(class);
            let taken = taken();
            let mut encoder = encoder(Disable {
                same: true,
                ..Disable::default()
            });
            encoder.set_level(level).expect("a known level");
            let mut out = BytesMut::with_capacity(1 << 20);
            group.bench_function(format!("level{level}/{}", class.name), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    encoder
                        .encode(&taken, &Sources::of(&contents), &mut out)
                        .expect("memory for zstd")
                });
            });
        }
    }
}

fn decode(criterion: &mut Criterion) {
    const BATCHES: usize = 16;
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Bytes(BATCH_BYTES * BATCHES as u64));
    for class in &CLASSES {
        let batches = batches(class, BATCHES);
        let header = encoder(Disable::default()).header(1);
        let mut sink = Memory(Box::new([0; PAGE_SIZE]));
        let set_up = || {
            let mut decoder = LaneDecoder::new(part(), &KEY, 1).expect("memory for zstd");
            decoder.open(&header).expect("own header");
            decoder
        };
        group.bench_function(class.name, |bencher| {
            bencher.iter_batched_ref(
                set_up,
                |decoder| {
                    for body in &batches {
                        decoder.apply(body, &mut sink).expect("own bytes");
                    }
                },
                BatchSize::LargeInput,
            );
        });
    }
}

/// Pages that change in 200 bytes each time they are looked at anew, and what was last sent of them.
#[derive(Debug)]
struct Changing {
    pages: RwLock<Vec<[u8; PAGE_SIZE]>>,
    sent: RwLock<Vec<[u8; PAGE_SIZE]>>,
}

impl Changing {
    fn new(class: &Class) -> Self {
        let Still(pages) = Still::new(class);
        Self {
            sent: RwLock::new(pages.clone()),
            pages: RwLock::new(pages),
        }
    }

    fn change(&self, turn: u8) {
        let mut pages = self.pages.write().expect("no panic while it is held");
        pages
            .iter_mut()
            .for_each(|page| page[1000..1200].fill(turn));
    }
}

impl Contents for Changing {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let pages = self.pages.read().map_err(|_| io::ErrorKind::Other)?;
        into.copy_from_slice(&pages[at.page as usize]);
        Ok(())
    }
}

impl Replica for Changing {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let sent = self.sent.read().map_err(|_| io::ErrorKind::Other)?;
        into.copy_from_slice(&sent[at.page as usize]);
        Ok(())
    }

    fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        let mut sent = self.sent.write().map_err(|_| io::ErrorKind::Other)?;
        let places = &mut sent[first.page as usize..];
        for (place, page) in places.iter_mut().zip(contents.as_chunks().0) {
            *place = *page;
        }
        Ok(())
    }

    fn zero(&self, _: PageAddress, _: u32) -> io::Result<()> {
        Ok(())
    }
}

/// What refers to content that the target has: changed pages as deltas, pages of a shared disk image
/// as known ones, equal pages as copies.
fn references(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("references");
    group.throughput(Throughput::Bytes(BATCH_BYTES));
    let (taken, mut out) = (taken(), BytesMut::with_capacity(1 << 20));
    for class in &CLASSES[1..] {
        let pages = Changing::new(class);
        let sources = Sources {
            replica: Some(&pages),
            ..Sources::of(&pages)
        };
        let mut encoder = encoder(Disable::default());
        let mut turn = 0_u8;
        group.bench_function(format!("delta/{}", class.name), |bencher| {
            bencher.iter(|| {
                turn = turn.wrapping_add(1);
                pages.change(turn);
                out.clear();
                encoder
                    .encode(&taken, &sources, &mut out)
                    .expect("memory for zstd")
            });
        });

        let contents = Still::new(class);
        let known = KnownTable::new(PAGES as usize);
        let hasher = PageHasher::new(&KEY);
        for (number, page) in (0..).zip(&contents.0) {
            let PageHash(hash) = hasher.hash(page);
            known.insert(*hash.first_chunk().expect("16 bytes"), number);
        }
        let all = Disable {
            same: true,
            copy: true,
            ..Disable::default()
        };
        let sources = Sources {
            known: Some(&known),
            ..Sources::of(&contents)
        };
        let mut encoder = self::encoder(all);
        group.bench_function(format!("known/{}", class.name), |bencher| {
            bencher.iter(|| {
                out.clear();
                encoder
                    .encode(&taken, &sources, &mut out)
                    .expect("memory for zstd")
            });
        });
        let contents = Still(vec![(class.make)(1)]);
        let mut encoder = self::encoder(Disable {
            same: true,
            ..Disable::default()
        });
        group.bench_function(format!("copy/{}", class.name), |bencher| {
            bencher.iter(|| {
                out.clear();
                encoder
                    .encode(&taken, &Sources::of(&contents), &mut out)
                    .expect("memory for zstd")
            });
        });
    }
}

/// Root of 1 GiB: from nothing, after a round that touched 1 % of the ranges, and unchanged.
fn root(criterion: &mut Criterion) {
    let layout = layout(1 << 18);
    let mut parts = Ledger::split(&layout, &KEY);
    for at in layout.pages() {
        parts[layout.lane_of(at)].set(at, PageHash([3; 16]), 1);
    }
    let mut group = criterion.benchmark_group("root-1GiB");
    group.bench_function("whole", |bencher| {
        bencher.iter(|| Ledger::root(&layout, &parts.each_ref(), &KEY));
    });
    parts.iter_mut().for_each(LedgerPart::refresh);
    let mut version = 1;
    group.bench_function("round-of-1-percent", |bencher| {
        bencher.iter(|| {
            version += 1;
            let mut hash = [0; 16];
            hash[..4].copy_from_slice(&u32::to_be_bytes(version));
            for page in (0..1 << 18).step_by(512 * 100) {
                let at = PageAddress {
                    block: BlockId(0),
                    page,
                };
                parts[layout.lane_of(at)].set(at, PageHash(hash), version);
            }
            parts.iter_mut().for_each(LedgerPart::refresh);
            Ledger::root(&layout, &parts.each_ref(), &KEY)
        });
    });
    group.bench_function("unchanged", |bencher| {
        bencher.iter(|| Ledger::root(&layout, &parts.each_ref(), &KEY));
    });
}

/// Marking and taking every page of 64 MiB.
fn dirty(criterion: &mut Criterion) {
    let layout = layout(1 << 14);
    let set = DirtySet::new(Arc::clone(&layout));
    let mut group = criterion.benchmark_group("dirty");
    group.throughput(Throughput::Elements(layout.pages_total()));
    let mut taken = Vec::new();
    group.bench_function("mark-and-take", |bencher| {
        bencher.iter(|| {
            for at in layout.pages() {
                set.mark_data(at);
            }
            for lane in 0..LANES {
                let mut cursor = LaneCursor::new(lane);
                while set.lane_dirty(lane) > 0 {
                    set.take_into(&mut cursor, 64, &mut taken);
                }
            }
        });
    });
}

criterion_group!(benches, hash, encode, references, decode, root, dirty);
criterion_main!(benches);
