//! Compares the RAM of two stopped guests page by page, out of the memory of their QEMUs.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::Guest;

const PAGE_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 1 << 20;

/// One RAM block of QEMU.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Block {
    used_bytes: u64,
    /// 0 where QEMU does not tell.
    host_address: u64,
}

/// Pages of one block that differ.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BlockDifference {
    /// QEMU's name of the block.
    pub block: String,
    /// Pages compared.
    pub pages: u64,
    /// Offsets of differing pages, the first hundred.
    pub offsets: Vec<u64>,
    /// How many differ.
    pub differing: u64,
}

/// Result of comparing all blocks.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Comparison {
    /// Every block, differing or not, in the order of names.
    pub blocks: Vec<BlockDifference>,
    /// Blocks whose place QEMU does not tell (up to 7.2, all but RAM and BIOS).
    pub left_out: Vec<String>,
}

impl Comparison {
    /// Pages that were compared.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.pages).sum()
    }

    /// Pages that differ.
    pub fn differing(&self) -> u64 {
        self.blocks.iter().map(|block| block.differing).sum()
    }
}

/// Compares all RAM blocks of two guests, neither of which may run.
///
/// # Errors
/// When one runs, when they do not have the same blocks, or when memory cannot be read (needs root).
pub fn compare(left: &Guest, right: &Guest) -> anyhow::Result<Comparison> {
    ensure!(
        !left.is_running()? && !right.is_running()?,
        "a running guest cannot be compared"
    );
    let (left_blocks, right_blocks) = (blocks(left)?, blocks(right)?);
    let names = |blocks: &BTreeMap<String, Block>| -> Vec<(String, u64)> {
        blocks
            .iter()
            .map(|(name, block)| (name.clone(), block.used_bytes))
            .collect()
    };
    ensure!(
        names(&left_blocks) == names(&right_blocks),
        "the blocks differ: {:?} and {:?}",
        names(&left_blocks),
        names(&right_blocks)
    );
    let (left_memory, right_memory) = (memory(left)?, memory(right)?);
    let mut comparison = Comparison::default();
    for (name, left_block) in &left_blocks {
        let right_block = &right_blocks[name];
        if left_block.host_address == 0 || right_block.host_address == 0 {
            comparison.left_out.push(name.clone());
            continue;
        }
        let difference = compare_block(&left_memory, left_block, &right_memory, right_block)
            .with_context(|| format!("cannot read block {name}"))?;
        comparison.blocks.push(BlockDifference {
            block: name.clone(),
            ..difference
        });
    }
    Ok(comparison)
}

/// Bytes of a guest's RAM, beside whatever QEMU knows: what is written here is in no dirty log.
#[derive(Debug)]
pub struct Bytes {
    memory: File,
    blocks: BTreeMap<String, Block>,
}

impl Bytes {
    /// Opens the memory of a guest's QEMU.
    ///
    /// # Errors
    /// When it cannot be opened (needs root).
    pub fn of(guest: &Guest) -> anyhow::Result<Self> {
        let path = format!("/proc/{}/mem", guest.pid());
        let memory = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {path}"))?;
        Ok(Self {
            memory,
            blocks: blocks(guest)?,
        })
    }

    /// Names of the blocks, and how many pages each has.
    pub fn blocks(&self) -> Vec<(&str, u64)> {
        let page = u64::try_from(PAGE_BYTES).unwrap_or(u64::MAX);
        self.blocks
            .iter()
            .map(|(name, block)| (name.as_str(), block.used_bytes / page))
            .collect()
    }

    /// One page.
    ///
    /// # Errors
    /// When there is no such page.
    pub fn page(&self, block: &str, page: u64) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE_BYTES];
        self.memory
            .read_exact_at(&mut bytes, self.address(block, page)?)?;
        Ok(bytes)
    }

    /// Puts other bytes at the start of a page.
    ///
    /// # Errors
    /// When there is no such page.
    pub fn spoil(&self, block: &str, page: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.memory
            .write_all_at(bytes, self.address(block, page)?)?;
        Ok(())
    }

    fn address(&self, block: &str, page: u64) -> anyhow::Result<u64> {
        let found = self
            .blocks
            .get(block)
            .with_context(|| format!("no block {block}"))?;
        let offset = page * u64::try_from(PAGE_BYTES)?;
        ensure!(
            offset < found.used_bytes,
            "block {block} has no page {page}"
        );
        Ok(found.host_address + offset)
    }
}

fn compare_block(
    left: &File,
    left_block: &Block,
    right: &File,
    right_block: &Block,
) -> anyhow::Result<BlockDifference> {
    let mut difference = BlockDifference {
        block: String::new(),
        pages: 0,
        offsets: Vec::new(),
        differing: 0,
    };
    let (mut left_bytes, mut right_bytes) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut offset = 0;
    while offset < left_block.used_bytes {
        let left_over = usize::try_from(left_block.used_bytes - offset)?;
        let length = left_over.min(CHUNK_BYTES);
        left.read_exact_at(&mut left_bytes[..length], left_block.host_address + offset)?;
        right.read_exact_at(
            &mut right_bytes[..length],
            right_block.host_address + offset,
        )?;
        let pages = left_bytes[..length]
            .chunks(PAGE_BYTES)
            .zip(right_bytes[..length].chunks(PAGE_BYTES));
        for (left_page, right_page) in pages {
            difference.pages += 1;
            if left_page != right_page {
                difference.differing += 1;
                if difference.offsets.len() < 100 {
                    difference.offsets.push(offset);
                }
            }
            offset += u64::try_from(left_page.len())?;
        }
    }
    Ok(difference)
}

fn memory(guest: &Guest) -> anyhow::Result<File> {
    let path = format!("/proc/{}/mem", guest.pid());
    File::open(&path).with_context(|| format!("cannot open {path}"))
}

fn blocks(guest: &Guest) -> anyhow::Result<BTreeMap<String, Block>> {
    let arguments = json!({ "command-line": "info ramblock" });
    let answer = guest
        .monitor()
        .execute("human-monitor-command", &arguments)?;
    let mut blocks = parse_blocks(answer.as_str().unwrap_or_default())?;
    if blocks.values().all(|block| block.host_address == 0) {
        // RAM starts at guest address 0, the BIOS ends at 4 GiB: QEMU tells these two's places.
        for (name, end) in [("pc.ram", None), ("pc.bios", Some(1_u64 << 32))] {
            let Some(block) = blocks.get_mut(name) else {
                continue;
            };
            let address = end.map_or(0, |end| end.saturating_sub(block.used_bytes));
            block.host_address = host_address(guest, name, address)?;
        }
    }
    Ok(blocks)
}

/// Where QEMU has a guest address: `Host virtual address for 0x0 (pc.ram) is 0x7f2c1be00000`.
fn host_address(guest: &Guest, block: &str, address: u64) -> anyhow::Result<u64> {
    let arguments = json!({ "command-line": format!("gpa2hva {address:#x}") });
    let monitor = guest.monitor();
    let answer = monitor.execute("human-monitor-command", &arguments)?;
    let answer = answer.as_str().unwrap_or_default().trim();
    let (_, place) = answer
        .split_once(&format!("({block}) is 0x"))
        .with_context(|| format!("gpa2hva {address:#x}: {answer}"))?;
    Ok(u64::from_str_radix(place.trim(), 16)?)
}

/// Columns: name, page size (two words), offset, used, total, host address, and more in newer
/// versions.
fn parse_blocks(text: &str) -> anyhow::Result<BTreeMap<String, Block>> {
    let mut blocks = BTreeMap::new();
    for line in text.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Up to 7.2 the last columns are missing.
        let (name, used, address) = match words[..] {
            [name, _, _, _, used, _, address, ..] => (name, used, address),
            [name, _, _, _, used, _] => (name, used, "0"),
            _ => bail!("`info ramblock` has a line that is not understood: {line}"),
        };
        let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16);
        let block = Block {
            used_bytes: hex(used)?,
            host_address: hex(address)?,
        };
        blocks.insert(name.to_owned(), block);
    }
    ensure!(!blocks.is_empty(), "`info ramblock` names no block");
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of QEMU 10.0 is understood.
    #[test]
    fn ramblock_table() {
        let text = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
            \x20                 pc.ram    4 KiB  0x0000000000000000 0x000000000a000000 0x000000000a000000 0x00007f1e2be00000  rw\n\
            \x20  /rom@etc/acpi/tables    4 KiB  0x000000000a080000 0x0000000000020000 0x0000000000200000 0x00007f1e43a00000  ro\n";
        let blocks = parse_blocks(text).expect("the table is whole");
        let expected = Block {
            used_bytes: 0x20000,
            host_address: 0x7f1e_43a0_0000,
        };
        assert_eq!(blocks["/rom@etc/acpi/tables"], expected);
        assert_eq!(blocks.len(), 2);
    }
}
