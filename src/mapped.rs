//! Guest RAM that QEMU shares: read at send time at the source, written as pages come at the target.
//!
//! ```text
//! source: announced page -> dirty flag only      encode <- guest RAM, else the shadow
//! target: decoded page   -> guest RAM            the rest -> QEMU's stream
//! ```
//! Only blocks whose memory is certain are taken (S9); all others go the plain way. It is used
//! without being asked, and only with xbzrle off (S8): with it QEMU does not announce a page that
//! changes and changes back, and a late read has the middle value.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, bail};
use qemu_glue::memory::{ExpectedBlock, SharedRam};
use qemu_glue::qmp::Capability;
use transport::block::{BlockId, Contents, Layout, PAGE_SIZE, PageAddress};
use transport::store::Shadow;

use crate::vm::Vm;

/// Blocks below this size are not worth a line in the log.
const TOLD_PAGES: u32 = 4096;

/// `--mapped`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mapped {
    /// Wherever QEMU shares guest RAM.
    #[default]
    Auto,
    /// Never: all pages go through QEMU's stream.
    Off,
}

/// Looks for shared RAM. `None` means the plain path, with a line that says why.
pub(crate) async fn look(vm: &Vm, asked: Mapped) -> Option<SharedRam> {
    if asked == Mapped::Off {
        return None;
    }
    let found = async {
        if xbzrle_is_on(vm).await? {
            bail!("xbzrle is on, so pages must come from QEMU's stream");
        }
        let blocks = vm.qmp.ram_blocks().await?;
        Ok(SharedRam::open(vm.qmp.peer_process(), &blocks)?)
    };
    found
        .await
        .inspect_err(|error| tracing::warn!("guest RAM is not used directly: {error:#}"))
        .ok()
}

/// Is xbzrle on? Asked before the first byte, and again when the migration runs and QEMU lets nobody
/// change it any more (S8).
pub(crate) async fn xbzrle_is_on(vm: &Vm) -> anyhow::Result<bool> {
    let had = vm.qmp.query_migrate_capabilities().await?;
    Ok(had
        .iter()
        .any(|had| had.capability == Capability::Xbzrle && had.state))
}

/// The blocks that source and target agreed on, as QEMU must have them.
pub(crate) fn expected(layout: &Layout) -> Vec<ExpectedBlock> {
    let blocks = layout.blocks().iter();
    blocks
        .map(|block| ExpectedBlock {
            name: block.name.clone(),
            used_bytes: u64::from(block.pages) * PAGE_SIZE as u64,
        })
        .collect()
}

/// Main RAM: the largest blocks of the image, all of them.
fn has_main_ram(layout: &Layout, is_mapped: &[bool]) -> bool {
    let largest = layout.blocks().iter().map(|block| block.pages).max();
    let main = layout.blocks().iter().zip(is_mapped);
    main.filter(|(block, _)| Some(block.pages) == largest)
        .all(|(_, mapped)| *mapped)
}

fn tell(layout: &Layout, ram: &SharedRam, is_mapped: &[bool]) {
    for (place, (block, mapped)) in layout.blocks().iter().zip(is_mapped).enumerate() {
        if *mapped {
            tracing::info!(block = block.name, "guest RAM is used directly");
        } else if block.pages >= TOLD_PAGES {
            let reason = ram.reason(place).unwrap_or_default();
            tracing::info!(
                block = block.name,
                "goes through QEMU's stream alone: {reason}"
            );
        }
    }
}

/// The source's pages: from guest RAM where it is shared, else from the shadow.
#[derive(Debug)]
pub(crate) struct SourceMemory {
    ram: Option<SharedRam>,
    is_mapped: Vec<bool>,
    is_main: bool,
    shadow: Shadow,
}

impl SourceMemory {
    /// Reserves the shadow for the blocks that are not shared.
    pub(crate) fn create(
        folder: &std::path::Path,
        layout: &Layout,
        found: Option<SharedRam>,
    ) -> io::Result<SourceMemory> {
        let ram = found.map(|found| found.select(&expected(layout)));
        let is_mapped: Vec<bool> = (0..layout.blocks().len())
            .map(|block| ram.as_ref().is_some_and(|ram| ram.is_shared(block)))
            .collect();
        if let Some(ram) = &ram {
            tell(layout, ram, &is_mapped);
        }
        let shadow = Shadow::create(folder, layout, |block| is_mapped[block])?;
        Ok(SourceMemory {
            is_main: has_main_ram(layout, &is_mapped),
            ram,
            is_mapped,
            shadow,
        })
    }

    /// Keeps contiguous pages of a block that is not read directly.
    pub(crate) fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        self.shadow.write(first, contents)
    }

    /// Is main RAM read directly?
    pub(crate) fn is_main_shared(&self) -> bool {
        self.is_main
    }

    /// Is this block read directly?
    pub(crate) fn is_shared(&self, block: BlockId) -> bool {
        self.is_mapped
            .get(usize::from(block.0))
            .is_some_and(|mapped| *mapped)
    }
}

impl Contents for SourceMemory {
    fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        match &self.ram {
            Some(ram) if self.is_shared(at.block) => {
                ram.read_pages(usize::from(at.block.0), at.page, into)
            }
            Some(_) | None => self.shadow.read(at, into),
        }
    }
}

/// The target's RAM as far as it can be written directly.
#[derive(Debug)]
pub(crate) struct TargetMemory {
    /// `None` once it is closed.
    ram: RwLock<Option<SharedRam>>,
    is_mapped: Vec<bool>,
    is_main: bool,
}

impl TargetMemory {
    /// Takes the blocks that can be written, and makes them zero: a file may hold old data, and
    /// pages that are never announced must not show it. `None` where there is no such block.
    pub(crate) async fn open(
        layout: &Arc<Layout>,
        found: Option<SharedRam>,
    ) -> anyhow::Result<Option<Arc<TargetMemory>>> {
        let Some(found) = found else { return Ok(None) };
        let layout = layout.clone();
        let open = move || {
            let ram = found.select(&expected(&layout));
            let is_mapped: Vec<bool> = (0..layout.blocks().len())
                .map(|block| ram.is_writable(block))
                .collect();
            tell(&layout, &ram, &is_mapped);
            for (block, spec) in layout.blocks().iter().enumerate() {
                if is_mapped[block] {
                    let cleared = ram.clear(block);
                    cleared.with_context(|| format!("cannot make block {:?} zero", spec.name))?;
                }
            }
            let is_any = is_mapped.contains(&true);
            anyhow::Ok(is_any.then(|| {
                Arc::new(TargetMemory {
                    is_main: has_main_ram(&layout, &is_mapped),
                    is_mapped,
                    ram: RwLock::new(Some(ram)),
                })
            }))
        };
        tokio::task::spawn_blocking(open).await?
    }

    /// Is main RAM written directly?
    pub(crate) fn is_main_shared(&self) -> bool {
        self.is_main
    }

    /// Is this block written here? Its pages are then not for QEMU's stream.
    pub(crate) fn is_shared(&self, block: BlockId) -> bool {
        self.is_mapped
            .get(usize::from(block.0))
            .is_some_and(|mapped| *mapped)
    }

    /// Writes contiguous whole pages.
    pub(crate) fn write(&self, first: PageAddress, contents: &[u8]) -> io::Result<()> {
        self.with(|ram| ram.write_pages(usize::from(first.block.0), first.page, contents))
    }

    /// `count` pages from `first` on are zero.
    pub(crate) fn zero(&self, first: PageAddress, count: u32) -> io::Result<()> {
        self.with(|ram| ram.zero_pages(usize::from(first.block.0), first.page, count))
    }

    /// A page as applied.
    pub(crate) fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.with(|ram| ram.read_pages(usize::from(at.block.0), at.page, into))
    }

    /// Waits for writes that are under way and ends all later ones: from here on RAM is QEMU's (S6).
    pub(crate) fn close(&self) {
        self.ram
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    fn with<T>(&self, work: impl FnOnce(&SharedRam) -> io::Result<T>) -> io::Result<T> {
        let ram = self.ram.read().unwrap_or_else(PoisonError::into_inner);
        match &*ram {
            Some(ram) => work(ram),
            None => Err(io::Error::other(
                "guest RAM is QEMU's: a page came too late",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transport::block::BlockSpec;

    /// Main RAM is mapped only when all of the largest blocks are: NUMA nodes count together.
    #[test]
    fn main_ram() {
        let block = |name: &str, pages| BlockSpec {
            name: name.into(),
            pages,
        };
        let layout = Layout::new(vec![
            block("ram0", 512),
            block("rom", 2),
            block("ram1", 512),
        ])
        .unwrap();
        let check = |mapped, expected| assert_eq!(has_main_ram(&layout, mapped), expected);
        check(&[true, false, true], true);
        check(&[true, true, false], false);
        check(&[false, true, false], false);
    }

    /// After the close no late page reaches RAM (S6).
    #[test]
    fn nothing_after_the_close() {
        let memory = TargetMemory {
            ram: RwLock::new(None),
            is_mapped: vec![true],
            is_main: true,
        };
        memory.close();
        let first = PageAddress {
            block: BlockId(0),
            page: 0,
        };
        let kind = |result: io::Result<()>| result.unwrap_err().kind();
        assert_eq!(
            kind(memory.write(first, &[1; PAGE_SIZE])),
            io::ErrorKind::Other
        );
        assert_eq!(kind(memory.zero(first, 1)), io::ErrorKind::Other);
    }
}
