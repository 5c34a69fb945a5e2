//! Proof of memory (S10): the ledger says what was sent or applied, this reads what RAM holds.

use anyhow::{Context, bail};
use qemu_glue::memory::{ExpectedBlock, GuestMemory, MemoryError};
use transport::block::{Layout, PAGE_SIZE, PageAddress, PageHash, PageHasher};
use transport::wire::{AttemptId, Verify};

use crate::vm::Vm;

/// Pages that a sample reads, about 4 MiB: below 5 ms of black-out.
const SAMPLE_PAGES: u64 = 1024;
/// Neighbours that one call reads.
const RUN_PAGES: usize = 64;
/// Addresses that an error names.
const NAMED_MAX: usize = 3;

/// Proves one side's memory as asked. Where a sample cannot be taken (QEMU 7.2 does not tell where
/// its memory is) the ledger's root is all there is, and the log says so.
pub(crate) async fn prove(
    vm: &Vm,
    layout: &Layout,
    key: &[u8; 32],
    verify: Verify,
    attempt: AttemptId,
    announced: impl FnOnce(&mut dyn FnMut(PageAddress, PageHash)) + Send + 'static,
) -> anyhow::Result<()> {
    if verify == Verify::Off {
        return Ok(());
    }
    let memory = match open_memory(vm, layout).await {
        Ok(memory) => memory,
        Err(error) if verify == Verify::Sample => {
            tracing::warn!("memory is not proved beyond the ledger: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let (key, pages_total) = (*key, layout.pages_total());
    let work = move || compare(&memory, &key, verify, attempt, pages_total, announced);
    tokio::task::spawn_blocking(work).await?
}

/// Opens the memory of the QEMU behind the monitor, by the block list of the stream.
async fn open_memory(vm: &Vm, layout: &Layout) -> anyhow::Result<GuestMemory> {
    let expected: Vec<ExpectedBlock> = layout
        .blocks()
        .iter()
        .map(|block| ExpectedBlock {
            name: block.name.clone(),
            used_bytes: u64::from(block.pages) * PAGE_SIZE as u64,
        })
        .collect();
    let blocks = vm.qmp.ram_blocks().await?;
    let memory = GuestMemory::open_known(vm.qmp.peer_process(), &blocks, &expected)
        .context("cannot read QEMU's memory to prove it (run as QEMU's user or as root, or use --verify off)")?;
    for (place, block) in expected.iter().enumerate() {
        if !memory.is_open(place) {
            // QEMU 7.2 tells where main memory is, and not where its small blocks are.
            tracing::warn!(
                block = block.name,
                "memory is not proved: QEMU does not tell its place"
            );
        }
    }
    Ok(memory)
}

/// Compares announced pages with their hashes in the ledger. Which pages a sample takes follows from
/// the attempt, so both sides take the same.
fn compare(
    memory: &GuestMemory,
    key: &[u8; 32],
    verify: Verify,
    attempt: AttemptId,
    pages_total: u64,
    announced: impl FnOnce(&mut dyn FnMut(PageAddress, PageHash)),
) -> anyhow::Result<()> {
    let chosen = Chosen::new(verify, attempt, pages_total);
    let mut check = Check {
        memory,
        hasher: PageHasher::new(key),
        first: None,
        hashes: Vec::with_capacity(RUN_PAGES),
        contents: vec![0; RUN_PAGES * PAGE_SIZE],
        differing: Vec::new(),
        differing_count: 0,
    };
    let mut failed = None;
    announced(&mut |at, hash| {
        if failed.is_none() && memory.is_open(usize::from(at.block.0)) && chosen.takes(at) {
            failed = check.page(at, hash).err();
        }
    });
    check.flush()?;
    if let Some(error) = failed {
        return Err(error).context("cannot read QEMU's memory");
    }
    if check.differing_count > 0 {
        bail!(
            "{} pages of real memory differ from the ledger, first {:?}",
            check.differing_count,
            check.differing
        );
    }
    Ok(())
}

/// Reads neighbours with one call.
struct Check<'a> {
    memory: &'a GuestMemory,
    hasher: PageHasher,
    first: Option<PageAddress>,
    hashes: Vec<PageHash>,
    contents: Vec<u8>,
    differing: Vec<PageAddress>,
    differing_count: u64,
}

impl Check<'_> {
    fn page(&mut self, at: PageAddress, hash: PageHash) -> Result<(), MemoryError> {
        let continues = self.first.is_some_and(|first| {
            let next = u64::from(first.page) + self.hashes.len() as u64;
            first.block == at.block && next == u64::from(at.page)
        });
        if !continues || self.hashes.len() == RUN_PAGES {
            self.flush()?;
            self.first = Some(at);
        }
        self.hashes.push(hash);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), MemoryError> {
        let Some(first) = self.first.take() else {
            return Ok(());
        };
        let contents = &mut self.contents[..self.hashes.len() * PAGE_SIZE];
        self.memory
            .read_pages(usize::from(first.block.0), first.page, contents)?;
        let pages = contents
            .as_chunks::<PAGE_SIZE>()
            .0
            .iter()
            .zip(self.hashes.drain(..));
        for (page, (content, hash)) in (first.page..).zip(pages) {
            if self.hasher.hash(content) != hash {
                self.differing_count += 1;
                if self.differing.len() < NAMED_MAX {
                    self.differing.push(PageAddress { page, ..first });
                }
            }
        }
        Ok(())
    }
}

/// Which pages are read.
struct Chosen {
    verify: Verify,
    seed: u64,
    /// A page is in the sample when its mixed address is below this.
    below: u64,
}

impl Chosen {
    fn new(verify: Verify, attempt: AttemptId, pages_total: u64) -> Chosen {
        let [a, b, c, d, e, f, g, h, ..] = attempt.0;
        let seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let below = (u64::MAX / pages_total.max(1)).saturating_mul(SAMPLE_PAGES);
        Chosen {
            verify,
            seed,
            below,
        }
    }

    fn takes(&self, at: PageAddress) -> bool {
        match self.verify {
            Verify::Off => false,
            Verify::Full => true,
            Verify::Sample => {
                let place = (u64::from(at.block.0) << 32) | u64::from(at.page);
                mix(place.wrapping_add(self.seed)) <= self.below
            }
        }
    }
}

/// Spreads neighbours over all 64 bits (the finaliser of `SplitMix64`).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use transport::block::BlockId;

    /// A sample takes about as many pages as it should, spread, and another attempt takes others.
    #[test]
    fn sample_is_spread() {
        let at = |page| PageAddress {
            block: BlockId(0),
            page,
        };
        let taken = |attempt: u8| -> Vec<u32> {
            let chosen = Chosen::new(Verify::Sample, AttemptId([attempt; 16]), 262_144);
            (0..262_144)
                .filter(|page| chosen.takes(at(*page)))
                .collect()
        };
        let (one, two) = (taken(1), taken(2));
        assert!((900..1150).contains(&one.len()), "{}", one.len());
        assert!(one.iter().any(|page| *page < 20_000) && one.iter().any(|page| *page > 240_000));
        assert_ne!(one, two);
    }
}
