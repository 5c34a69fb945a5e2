//! What pages will cost on a lane: the sample goes through the engine's own encoder, with all that
//! the target is known to hold.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use bytes::BytesMut;
use transport::block::{
    BatchStats, BlockId, BlockSpec, Contents, CopyIndex, Disable, FIRST_SEQ, KnownTable, LANES,
    LaneEncoder, Layout, Ledger, LevelObservation, PAGE_SIZE, PageAddress, PageHash, PageHasher,
    RANGE_PAGES, Replica, Sources, Taken, choose_level,
};
use transport::store::{BasisKey, ReplicaFile};

use super::index;
use super::link::{TargetSaid, Wanted};
use super::sample::Sample;
use crate::estimate::to_f64;

/// Ranges of the checkpoint that the target is asked for: 128 MiB.
const RANGES_MAX: usize = 64;
/// Memory for the index of copies: the whole sample fits.
const COPIES_BYTES: usize = 1 << 20;
/// Of the sample's lanes, so many are encoded again at the level that the link asks for.
const LANES_AGAIN: usize = 2;
const LEVEL_FIRST: i32 = 3;

/// What the sample says of all memory, per page of the guest where nothing else is said.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Costs {
    /// Pages that are all zero.
    pub(crate) zero_share: f64,
    /// Pages that the target holds as they are, from an earlier trip.
    pub(crate) same_share: f64,
    /// Pages that it can take from a disk image, or from elsewhere in the guest.
    pub(crate) referred_share: f64,
    /// Lane bytes per page, over all pages.
    pub(crate) bytes_per_page: f64,
    /// Pages that cost more than a zero record, of all pages.
    pub(crate) content_share: f64,
    /// Lane bytes per page that is sent again after it changed: one of the broad working set.
    pub(crate) again_bytes_per_page: f64,
    /// And one that changes all the time.
    pub(crate) hot_bytes_per_page: f64,
    /// Bytes of pages that one core encodes per second.
    pub(crate) core_bytes_per_s: f64,
    /// zstd level that the link asks for.
    pub(crate) level: i32,
}

impl Costs {
    /// Of memory that cannot be looked at: half in use, packing to a half.
    pub(crate) fn unseen() -> Costs {
        Costs {
            zero_share: 0.5,
            content_share: 0.5,
            bytes_per_page: 1024.0,
            again_bytes_per_page: 2048.0,
            hot_bytes_per_page: 2048.0,
            core_bytes_per_s: 300e6,
            level: LEVEL_FIRST,
            ..Costs::default()
        }
    }
}

/// What both hosts may hold of the sample: the checkpoint of this side, and what its ranges hash to.
#[derive(Debug)]
pub(crate) struct KeptSample {
    replica: ReplicaFile,
    /// Range of the image's layout of each sampled group, where the layouts fit.
    ranges: Vec<Option<u32>>,
    /// The ranges that are asked for, ascending; each stands for those up to the next.
    asked: Vec<u32>,
}

impl KeptSample {
    /// Finds the sample's ranges in a checkpoint.
    pub(crate) fn find(replica: ReplicaFile, sample: &Sample) -> KeptSample {
        let layout = replica.layout().clone();
        let ranges: Vec<Option<u32>> = sample
            .places
            .iter()
            .map(|place| range_of(&layout, &sample.blocks, place.block, place.first))
            .collect();
        let mut all: Vec<u32> = ranges.iter().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        // Both sides read all of a range to compare it.
        let step = all.len().div_ceil(RANGES_MAX).max(1);
        let asked = all.into_iter().step_by(step).collect();
        KeptSample {
            replica,
            ranges,
            asked,
        }
    }
}

/// Number of the range of a page, where the checkpoint has that block with that length.
fn range_of(layout: &Layout, blocks: &[BlockSpec], block: usize, page: u32) -> Option<u32> {
    let wanted = blocks.get(block)?;
    let mut first = 0;
    for spec in layout.blocks() {
        if spec == wanted {
            return Some(first + page / RANGE_PAGES);
        }
        first += spec.pages.div_ceil(RANGE_PAGES);
    }
    None
}

/// What to ask the target: ranges of the checkpoint, and pages.
pub(crate) fn wanted(
    sample: &Sample,
    kept: Option<&KeptSample>,
    nonce: &[u8; 16],
    key: &[u8; 32],
) -> io::Result<Wanted> {
    let mut ranges = Vec::new();
    if let Some(kept) = kept {
        let hashes = kept.replica.hash_some(key, &kept.asked)?;
        let basis = BasisKey::new(key);
        let digest = |range: &u32| (*range, hashes.digest(*range, nonce, &basis));
        ranges = kept.asked.iter().map(digest).collect();
    }
    let hasher = PageHasher::new(key);
    let (pages, _) = sample.first.as_chunks::<PAGE_SIZE>();
    let prefix = |page: &[u8; PAGE_SIZE]| {
        let PageHash(hash) = hasher.hash(page);
        *hash.first_chunk().expect("a hash has 16 bytes")
    };
    let content = pages.iter().filter(|page| **page != [0; PAGE_SIZE]);
    Ok(Wanted {
        ranges,
        prefixes: content.map(prefix).collect(),
    })
}

/// A buffer of pages that stands for one RAM block.
#[derive(Debug)]
struct Pages(Mutex<Vec<u8>>);

impl Pages {
    fn with<T>(
        &self,
        at: PageAddress,
        count: usize,
        work: impl FnOnce(&mut [u8]) -> T,
    ) -> io::Result<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = index(at.page) * PAGE_SIZE;
        let pages = all.get_mut(first..first + count * PAGE_SIZE);
        Ok(work(pages.ok_or(io::ErrorKind::InvalidInput)?))
    }
}

impl Contents for Pages {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.with(at, 1, |page| into.copy_from_slice(page))
    }
}

impl Replica for Pages {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        Contents::read(self, at, into)
    }

    fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        let count = contents.len() / PAGE_SIZE;
        self.with(first, count, |pages| pages.copy_from_slice(contents))
    }

    fn zero(&self, first: PageAddress, count: u32) -> io::Result<()> {
        self.with(first, index(count), |pages| pages.fill(0))
    }
}

/// How `send` will encode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Encoding {
    pub(crate) disable: Disable,
    /// A fixed zstd level; without, that which the link asks for.
    pub(crate) level: Option<i32>,
    pub(crate) link_bytes_per_s: f64,
}

/// The engine, set up for a sample in place of a guest.
struct Engine {
    layout: Arc<Layout>,
    parts: [transport::block::LedgerPart; LANES],
    replica: Pages,
    copies: CopyIndex,
    known: KnownTable,
    disable: Disable,
    key: [u8; 32],
}

/// What one walk over pages gave.
struct Walk {
    stats: BatchStats,
    seconds: f64,
}

impl Engine {
    fn new(
        sample: &Sample,
        kept: Option<&KeptSample>,
        wanted: &Wanted,
        said: &TargetSaid,
        disable: Disable,
        key: &[u8; 32],
    ) -> anyhow::Result<Engine> {
        let pages = u32::try_from(sample.pages())?;
        let name = "sample".to_owned();
        let layout = Arc::new(Layout::new(vec![BlockSpec { name, pages }])?);
        let mut engine = Engine {
            parts: Ledger::split(&layout, key),
            replica: Pages(Mutex::new(vec![0; sample.first.len()])),
            copies: CopyIndex::new(&layout, COPIES_BYTES),
            known: KnownTable::new(wanted.prefixes.len().max(1)),
            layout,
            disable,
            key: *key,
        };
        let named = wanted.prefixes.iter().zip(&said.known).zip(0..);
        for ((prefix, is_known), number) in named {
            if *is_known {
                engine.known.insert(*prefix, number);
            }
        }
        if let Some(kept) = kept {
            engine.seed(sample, kept, said)?;
        }
        Ok(engine)
    }

    /// Groups of ranges that both hold begin with the checkpoint's content.
    fn seed(
        &mut self,
        sample: &Sample,
        kept: &KeptSample,
        said: &TargetSaid,
    ) -> anyhow::Result<()> {
        let hasher = PageHasher::new(&self.key);
        let mut at = 0;
        let blocks = kept.replica.layout().blocks().to_vec();
        for (place, range) in sample.places.iter().zip(&kept.ranges) {
            let first = at;
            at += place.pages;
            let asked = range.and_then(|range| {
                let behind = kept.asked.partition_point(|asked| *asked <= range);
                behind.checked_sub(1)
            });
            if !asked.is_some_and(|asked| said.held.get(asked).copied().unwrap_or(false)) {
                continue;
            }
            let wanted = &sample.blocks[place.block];
            let block = blocks.iter().position(|block| block == wanted);
            let block = BlockId(u16::try_from(block.context("the range was found")?)?);
            for nth in 0..place.pages {
                let mut page = [0; PAGE_SIZE];
                let there = PageAddress {
                    block,
                    page: place.first + nth,
                };
                Replica::read(&kept.replica, there, &mut page)?;
                let here = address(first + nth);
                Replica::write(&self.replica, here, &page)?;
                let hash = if page == [0; PAGE_SIZE] {
                    hasher.zero()
                } else {
                    hasher.hash(&page)
                };
                self.parts[self.layout.lane_of(here)].seed(here, hash);
            }
        }
        Ok(())
    }

    /// Encodes pages of the sample as a transfer would, lane by lane.
    fn walk(
        &self,
        contents: &Pages,
        chosen: &dyn Fn(u32) -> bool,
        lanes: usize,
        level: i32,
        encoders: &mut Vec<LaneEncoder>,
        now: fn() -> Instant,
    ) -> anyhow::Result<Walk> {
        let sources = Sources {
            contents,
            replica: Some(&self.replica),
            copies: Some(&self.copies),
            known: Some(&self.known),
        };
        if encoders.is_empty() {
            for part in &self.parts {
                let encoder = LaneEncoder::new(part.clone(), &self.key, FIRST_SEQ, self.disable)?;
                encoders.push(encoder);
            }
        }
        let mut out = BytesMut::new();
        let mut stats = BatchStats::default();
        let began = now();
        for encoder in encoders.iter_mut().take(lanes) {
            encoder.set_level(level)?;
            let lane = encoder.lane();
            let pages = self
                .layout
                .pages()
                .filter(|at| self.layout.lane_of(*at) == lane && chosen(at.page));
            let taken: Vec<Taken> = pages.map(|at| Taken { at, zero: false }).collect();
            for part in taken.chunks(64) {
                out.clear();
                stats += encoder.encode(part, &sources, &mut out)?;
            }
            self.copies.acknowledge(lane, encoder.last_seq());
        }
        Ok(Walk {
            stats,
            seconds: now().duration_since(began).as_secs_f64(),
        })
    }
}

fn address(page: u32) -> PageAddress {
    PageAddress {
        block: BlockId(0),
        page,
    }
}

/// Sends the sample in mind: once as it was, then again what changed.
pub(crate) fn costs(
    sample: &Sample,
    kept: Option<&KeptSample>,
    asked: (&Wanted, &TargetSaid),
    key: &[u8; 32],
    how: &Encoding,
    now: fn() -> Instant,
) -> anyhow::Result<Costs> {
    let pages = to_f64(sample.pages());
    if pages < 1.0 {
        return Ok(Costs::default());
    }
    let engine = Engine::new(sample, kept, asked.0, asked.1, how.disable, key)?;
    let contents = Pages(Mutex::new(sample.first.clone()));
    let mut encoders = Vec::new();
    let all = engine.walk(&contents, &|_| true, LANES, LEVEL_FIRST, &mut encoders, now)?;
    let stats = &all.stats;
    let packed = stats.literal.pages + stats.delta.pages;
    let content = packed + stats.raw.pages + stats.known.pages + stats.copy.pages;
    let content_bytes = to_f64(packed + stats.raw.pages) * PAGE_SIZE as f64;
    let core_bytes_per_s = content_bytes / all.seconds.max(1e-3);
    let chosen = choose_level(&LevelObservation {
        level: LEVEL_FIRST,
        link_bytes_per_s: how.link_bytes_per_s,
        core_bytes_per_s,
        ratio: content_bytes / to_f64(stats.frame_bytes).max(1.0),
        cores: std::thread::available_parallelism().map_or(2.0, |cores| to_f64(cores.get() as u64)),
        busy_cores: 0.0,
    });
    let level = how.level.unwrap_or(chosen);
    let gain = gain(sample, kept, asked, key, (how.disable, level), now)?;
    let again = engine.again(sample, &mut encoders, now)?;
    let fresh = to_f64(stats.frame_bytes) / to_f64(content).max(1.0);
    Ok(Costs {
        zero_share: to_f64(stats.zero.pages) / pages,
        same_share: to_f64(stats.same.pages) / pages,
        referred_share: to_f64(stats.known.pages + stats.copy.pages) / pages,
        bytes_per_page: to_f64(stats.frame_bytes) * gain.bytes / pages,
        content_share: to_f64(content) / pages,
        again_bytes_per_page: again.late.unwrap_or(again.early.unwrap_or(fresh)) * gain.bytes,
        hot_bytes_per_page: again.early.unwrap_or(fresh) * gain.bytes,
        // A level that the link asks for is one that the cores can do.
        core_bytes_per_s: core_bytes_per_s / how.level.map_or(1.0, |_| gain.seconds.max(0.01)),
        level,
    })
}

/// Bytes per page that is sent again.
struct Again {
    /// Of those that had changed at the first look.
    early: Option<f64>,
    /// Of those that changed later.
    late: Option<f64>,
}

impl Engine {
    /// Sends what changed between the looks, against what was sent before: first pages that changed late,
    /// which are of the broad working set.
    fn again(
        &self,
        sample: &Sample,
        encoders: &mut Vec<LaneEncoder>,
        now: fn() -> Instant,
    ) -> anyhow::Result<Again> {
        let latest = Pages(Mutex::new(sample.latest.clone()));
        let is_early = |page: u32| sample.is_early.get(index(page)).copied().unwrap_or(false);
        let is_changed = |page: u32| {
            let at = index(page) * PAGE_SIZE..(index(page) + 1) * PAGE_SIZE;
            sample.first[at.clone()] != sample.latest[at]
        };
        let mut walk = |chosen: &dyn Fn(u32) -> bool| -> anyhow::Result<Option<f64>> {
            let walk = self.walk(&latest, chosen, LANES, LEVEL_FIRST, encoders, now)?;
            let pages = walk.stats.pages();
            Ok((pages > 0).then(|| to_f64(walk.stats.frame_bytes) / to_f64(pages)))
        };
        let late = walk(&|page| is_changed(page) && !is_early(page))?;
        let early = walk(&|page| is_changed(page) && is_early(page))?;
        Ok(Again { early, late })
    }
}

/// A level by the first one.
struct Gain {
    bytes: f64,
    seconds: f64,
}

/// What a level brings and takes, from some lanes of a new engine.
fn gain(
    sample: &Sample,
    kept: Option<&KeptSample>,
    asked: (&Wanted, &TargetSaid),
    key: &[u8; 32],
    (disable, level): (Disable, i32),
    now: fn() -> Instant,
) -> anyhow::Result<Gain> {
    let same = Gain {
        bytes: 1.0,
        seconds: 1.0,
    };
    if level == LEVEL_FIRST {
        return Ok(same);
    }
    let walk = |level| {
        let engine = Engine::new(sample, kept, asked.0, asked.1, disable, key)?;
        let contents = Pages(Mutex::new(sample.first.clone()));
        engine.walk(
            &contents,
            &|_| true,
            LANES_AGAIN,
            level,
            &mut Vec::new(),
            now,
        )
    };
    let (first, other) = (walk(LEVEL_FIRST)?, walk(level)?);
    if first.stats.frame_bytes == 0 || first.seconds <= 0.0 {
        return Ok(same);
    }
    Ok(Gain {
        bytes: to_f64(other.stats.frame_bytes) / to_f64(first.stats.frame_bytes),
        seconds: other.seconds / first.seconds,
    })
}
