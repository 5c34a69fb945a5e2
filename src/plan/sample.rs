//! A look at some of the guest's memory: groups of neighbours spread over all of it, read several
//! times within two seconds. Nothing is changed, and nothing of it leaves this process.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use qemu_glue::memory::{ExpectedBlock, GuestMemory, RamBlock, SharedRam};
use transport::block::{BlockSpec, PAGE_SIZE};

use crate::vm::Vm;

/// Neighbours that are read together.
pub(crate) const GROUP_PAGES: u32 = 32;
/// Groups of a sample: 64 MiB.
const GROUPS_MAX: u64 = 512;

/// A guest's RAM, wherever it can be read.
#[derive(Debug)]
enum Ram {
    Shared(SharedRam),
    Process(GuestMemory),
}

impl Ram {
    fn is_open(&self, block: usize) -> bool {
        match self {
            Ram::Shared(ram) => ram.is_shared(block),
            Ram::Process(memory) => memory.is_open(block),
        }
    }

    fn read(&self, place: Place, into: &mut [u8]) -> anyhow::Result<()> {
        match self {
            Ram::Shared(ram) => ram.read_pages(place.block, place.first, into)?,
            Ram::Process(memory) => memory.read_pages(place.block, place.first, into)?,
        }
        Ok(())
    }
}

/// Contiguous pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its place in the list of blocks.
    pub(crate) block: usize,
    pub(crate) first: u32,
    pub(crate) pages: u32,
}

/// What a later look found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Look {
    /// Since the first one.
    pub(crate) after: Duration,
    /// Sampled pages that differ from the first look.
    pub(crate) changed_pages: u64,
    /// Groups in which one does.
    pub(crate) changed_groups: u64,
}

/// The sample.
#[derive(Debug)]
pub(crate) struct Sample {
    ram: Ram,
    /// All RAM blocks, as QEMU's stream names them.
    pub(crate) blocks: Vec<BlockSpec>,
    pub(crate) pages_total: u64,
    pub(crate) places: Vec<Place>,
    /// Contents at the first look, place by place.
    pub(crate) first: Vec<u8>,
    /// At the last one.
    pub(crate) latest: Vec<u8>,
    pub(crate) looks: Vec<Look>,
    /// For each sampled page: the first later look found it changed.
    pub(crate) is_early: Vec<bool>,
    /// Main RAM is read where QEMU shares it.
    pub(crate) is_mapped: bool,
    began: Instant,
}

/// Opens the RAM of the QEMU behind the monitor: shared memory first, then the process's own.
async fn open(vm: &Vm, use_shared: bool) -> anyhow::Result<(Ram, Vec<RamBlock>)> {
    let blocks = vm.qmp.ram_blocks().await?;
    let largest = blocks.iter().map(|block| block.used_bytes).max();
    let main = |ram: &Ram| {
        let all = blocks.iter().enumerate();
        all.filter(|(_, block)| Some(block.used_bytes) == largest)
            .all(|(place, _)| ram.is_open(place))
    };
    if use_shared && let Ok(ram) = SharedRam::open(vm.qmp.peer_process(), &blocks) {
        let ram = Ram::Shared(ram);
        if main(&ram) {
            return Ok((ram, blocks));
        }
    }
    let expected: Vec<ExpectedBlock> = blocks
        .iter()
        .map(|block| ExpectedBlock {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
        })
        .collect();
    let memory = GuestMemory::open_known(vm.qmp.peer_process(), &blocks, &expected)?;
    let ram = Ram::Process(memory);
    if !main(&ram) {
        bail!("this QEMU does not tell where its main memory is");
    }
    Ok((ram, blocks))
}

impl Sample {
    /// Chooses the groups and reads them for the first time. `seed` moves them.
    pub(crate) async fn take(
        vm: &Vm,
        use_shared: bool,
        seed: u64,
        now: fn() -> Instant,
    ) -> anyhow::Result<Sample> {
        let (ram, blocks) = open(vm, use_shared)
            .await
            .context("cannot look at guest memory (run as QEMU's user or as root)")?;
        let read = move || {
            let specs: Vec<BlockSpec> = blocks.iter().map(spec).collect();
            let open: Vec<bool> = (0..specs.len()).map(|block| ram.is_open(block)).collect();
            let places = choose(&specs, &open, seed);
            let pages: u64 = places.iter().map(|place| u64::from(place.pages)).sum();
            let bytes = usize::try_from(pages)? * PAGE_SIZE;
            let mut sample = Sample {
                is_mapped: matches!(ram, Ram::Shared(_)),
                ram,
                pages_total: specs.iter().map(|spec| u64::from(spec.pages)).sum(),
                blocks: specs,
                places,
                first: vec![0; bytes],
                latest: Vec::new(),
                looks: Vec::new(),
                is_early: Vec::new(),
                began: now(),
            };
            read_all(&sample.ram, &sample.places, &mut sample.first)?;
            sample.latest = sample.first.clone();
            anyhow::Ok(sample)
        };
        tokio::task::spawn_blocking(read).await?
    }

    /// Reads all of it again.
    pub(crate) fn look(&mut self, now: fn() -> Instant) -> anyhow::Result<()> {
        let after = now().duration_since(self.began);
        read_all(&self.ram, &self.places, &mut self.latest)?;
        let (mut changed_pages, mut changed_groups) = (0, 0);
        let mut at = 0;
        for place in &self.places {
            let bytes = super::index(place.pages) * PAGE_SIZE;
            let pages = self.first[at..at + bytes]
                .chunks(PAGE_SIZE)
                .zip(self.latest[at..at + bytes].chunks(PAGE_SIZE));
            let changed = pages.filter(|(before, after)| before != after).count() as u64;
            changed_pages += changed;
            changed_groups += u64::from(changed > 0);
            at += bytes;
        }
        if self.looks.is_empty() {
            let pages = self
                .first
                .chunks(PAGE_SIZE)
                .zip(self.latest.chunks(PAGE_SIZE));
            self.is_early = pages.map(|(before, after)| before != after).collect();
        }
        self.looks.push(Look {
            after,
            changed_pages,
            changed_groups,
        });
        Ok(())
    }

    /// Sampled pages.
    pub(crate) fn pages(&self) -> u64 {
        (self.first.len() / PAGE_SIZE) as u64
    }
}

fn spec(block: &RamBlock) -> BlockSpec {
    BlockSpec {
        name: block.name.clone(),
        pages: u32::try_from(block.used_bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX),
    }
}

fn read_all(ram: &Ram, places: &[Place], into: &mut [u8]) -> anyhow::Result<()> {
    let mut rest = into;
    for place in places {
        let (here, behind) = rest.split_at_mut(super::index(place.pages) * PAGE_SIZE);
        ram.read(*place, here)?;
        rest = behind;
    }
    Ok(())
}

/// One group out of each of equal strata, in order.
fn choose(blocks: &[BlockSpec], open: &[bool], seed: u64) -> Vec<Place> {
    let groups: Vec<u64> = blocks
        .iter()
        .zip(open)
        .map(|(block, open)| u64::from(block.pages.div_ceil(GROUP_PAGES)) * u64::from(*open))
        .collect();
    let total: u64 = groups.iter().sum();
    let count = total.min(GROUPS_MAX);
    let mut state = seed;
    let mut places = Vec::new();
    for nth in 0..count {
        // A stratum's bounds; its groups are equally likely.
        let (from, end) = (nth * total / count, (nth + 1) * total / count);
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let mut group = from + (state >> 33) % (end - from).max(1);
        for (block, count) in groups.iter().enumerate() {
            if group < *count {
                let first = u32::try_from(group).unwrap_or(0) * GROUP_PAGES;
                let pages = (blocks[block].pages - first).min(GROUP_PAGES);
                places.push(Place {
                    block,
                    first,
                    pages,
                });
                break;
            }
            group -= count;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pages: u32) -> BlockSpec {
        BlockSpec {
            name: "ram".into(),
            pages,
        }
    }

    /// Groups lie in order and inside their blocks, all parts of memory have their share, and blocks that
    /// cannot be read have none.
    #[test]
    fn groups_are_spread() {
        let blocks = [block(100_000), block(70), block(50_000)];
        let places = choose(&blocks, &[true, false, true], 7);
        assert_eq!(places.len(), 512);
        for two in places.windows(2) {
            assert!((two[0].block, two[0].first) < (two[1].block, two[1].first));
        }
        for place in &places {
            assert!(place.first + place.pages <= blocks[place.block].pages);
        }
        let of = |block| places.iter().filter(|place| place.block == block).count();
        assert_eq!(of(1), 0);
        assert!((330..350).contains(&of(0)), "{}", of(0));
    }

    /// A small guest is read whole.
    #[test]
    fn small_memory_is_read_whole() {
        let places = choose(&[block(70), block(3)], &[true, true], 1);
        let pages: Vec<u32> = places.iter().map(|place| place.pages).collect();
        assert_eq!(pages, [32, 32, 6, 3]);
        assert_eq!(choose(&[], &[], 1), []);
    }
}
