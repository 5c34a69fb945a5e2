//! QEMU's `info ramblock` to a list of blocks: pure.
//!
//! ```text
//!               Block Name    PSize              Offset               Used              Total                HVA  RO
//!                   pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fb617e00000  rw
//! ```
//! Up to 7.2 the last two columns are missing: the place in QEMU's memory is then not known. A name
//! may hold anything, spaces included, so a line is read from its end.
//! //= qemu softmmu/physmem.c ram_block_format

/// More lines are refused; a guest with 256 DIMMs has about 300 blocks.
pub const BLOCKS_MAX: usize = 4096;

/// One RAM block of a QEMU process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of the block, as the migration stream has it.
    pub name: String,
    /// Host page size of its memory.
    pub page_size_bytes: u64,
    /// Its place in QEMU's own space of RAM addresses (not the guest's physical one).
    pub offset: u64,
    /// Bytes in use: the length that the migration stream has.
    pub used_bytes: u64,
    /// Bytes that it may grow to.
    pub total_bytes: u64,
    /// Its address in QEMU's memory; `None` up to 7.2, which does not tell.
    pub host_address: Option<u64>,
}

/// Why the table cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RamBlockError {
    /// The first line is not the known heading.
    #[error("the table of RAM blocks has an unknown heading")]
    UnknownHeading,
    /// A line does not fit the heading.
    #[error("line {line} of the table of RAM blocks cannot be read")]
    BadLine {
        /// Its number, 1 for the heading.
        line: usize,
    },
    /// There are more than [`BLOCKS_MAX`] blocks.
    #[error("QEMU names more than {BLOCKS_MAX} RAM blocks")]
    TooMany,
}

/// Reads the table.
///
/// # Errors
/// Anything that is not the table of a known QEMU: a part of it would be a wrong answer.
pub fn parse(text: &str) -> Result<Vec<RamBlock>, RamBlockError> {
    let mut lines = text.lines();
    let heading: Vec<&str> = lines
        .next()
        .ok_or(RamBlockError::UnknownHeading)?
        .split_whitespace()
        .collect();
    let has_host_address = match heading.as_slice() {
        ["Block", "Name", "PSize", "Offset", "Used", "Total"] => false,
        [
            "Block",
            "Name",
            "PSize",
            "Offset",
            "Used",
            "Total",
            "HVA",
            "RO",
        ] => true,
        _ => return Err(RamBlockError::UnknownHeading),
    };
    let mut blocks = Vec::new();
    for (index, line) in lines.enumerate() {
        if blocks.len() == BLOCKS_MAX {
            return Err(RamBlockError::TooMany);
        }
        let block = parse_line(line, has_host_address);
        blocks.push(block.ok_or(RamBlockError::BadLine { line: index + 2 })?);
    }
    Ok(blocks)
}

fn parse_line(line: &str, has_host_address: bool) -> Option<RamBlock> {
    let (rest, host_address) = if has_host_address {
        let rest = line
            .strip_suffix("rw")
            .or_else(|| line.strip_suffix("ro"))?;
        let (rest, address) = split_number(rest)?;
        (rest, Some(address))
    } else {
        (line, None)
    };
    let (rest, total_bytes) = split_number(rest)?;
    let (rest, used_bytes) = split_number(rest)?;
    let (rest, offset) = split_number(rest)?;
    let rest = rest.trim_end_matches(' ');
    let (rest, unit) = rest.rsplit_once(' ')?;
    let (rest, amount) = rest.rsplit_once(' ')?;
    let page_size_bytes = page_size(amount, unit)?;
    // The size is padded to 8 columns, and one more separates it from the name.
    let padding = 8_usize.saturating_sub(amount.len() + 1 + unit.len());
    let name = rest
        .strip_suffix(" ".repeat(padding).as_str())?
        .trim_start_matches(' ');
    if name.is_empty() {
        return None;
    }
    Some(RamBlock {
        name: name.to_owned(),
        page_size_bytes,
        offset,
        used_bytes,
        total_bytes,
        host_address,
    })
}

/// Cuts the last column, `0x` and 16 digits, off a line.
fn split_number(line: &str) -> Option<(&str, u64)> {
    let (rest, column) = line.trim_end_matches(' ').rsplit_once(' ')?;
    let digits = column
        .strip_prefix("0x")
        .filter(|digits| digits.len() == 16)?;
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some((rest, u64::from_str_radix(digits, 16).ok()?))
}

/// `4 KiB`, `2 MiB`, `1 GiB`: page sizes are powers of two, so there is no fraction.
fn page_size(amount: &str, unit: &str) -> Option<u64> {
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    amount
        .parse::<u64>()
        .ok()?
        .checked_mul(1 << shift)
        .filter(|size| size.is_power_of_two())
}

#[cfg(test)]
mod tests;
