//! QEMU's `info ramblock` to a list of blocks: pure.
//!
//! ```text
//!               Block Name    PSize              Offset               Used              Total                HVA  RO
//!                   pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fb617e00000  rw
//! ```
//! Up to 7.2 the last two columns are missing: see [`flat_view`](super::flat_view). A name
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
    /// Its address in QEMU's memory. `None` where QEMU does not tell: up to 7.2 for blocks that the
    /// guest's address space does not show.
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Output of 10.0.2 for q35 with a VGA card, shortened.
    const QEMU_10: &str = concat!(
        "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n",
        "                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fb617e00000  rw\r\n",
        "   0000:00:01.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 0x0000000001000000 0x00007fb616c00000  rw\r\n",
        "    /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000 0x00007fb668a00000  ro\r\n",
    );

    /// Output of 7.2.
    const QEMU_7: &str = concat!(
        "              Block Name    PSize              Offset               Used              Total\r\n",
        "                  pc.ram    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n",
    );

    #[test]
    fn real_tables() {
        let block = |name: &str, offset, used_bytes, total_bytes, host_address| RamBlock {
            name: name.to_owned(),
            page_size_bytes: 4096,
            offset,
            used_bytes,
            total_bytes,
            host_address: Some(host_address),
        };
        let expected = vec![
            block("pc.ram", 0, 64 << 20, 64 << 20, 0x7fb6_17e0_0000),
            block(
                "0000:00:01.0/vga.vram",
                0x408_0000,
                16 << 20,
                16 << 20,
                0x7fb6_16c0_0000,
            ),
            block(
                "/rom@etc/acpi/tables",
                0x50c_0000,
                0x2_0000,
                0x20_0000,
                0x7fb6_68a0_0000,
            ),
        ];
        assert_eq!(parse(QEMU_10), Ok(expected));
        let expected = RamBlock {
            name: "pc.ram".to_owned(),
            page_size_bytes: 2 << 20,
            offset: 0,
            used_bytes: 64 << 20,
            total_bytes: 64 << 20,
            host_address: None,
        };
        assert_eq!(parse(QEMU_7), Ok(vec![expected]));
    }

    /// What is not exactly the table is an error.
    #[test]
    fn other_text() {
        let heading = QEMU_10.lines().next().unwrap();
        let with = |line: &str| parse(&format!("{heading}\r\n{line}\r\n"));
        let bad = Err(RamBlockError::BadLine { line: 2 });
        assert_eq!(parse(""), Err(RamBlockError::UnknownHeading));
        assert_eq!(
            parse("unknown command: 'info ramblock'"),
            Err(RamBlockError::UnknownHeading)
        );
        assert_eq!(with(""), bad);
        assert_eq!(with(QEMU_7.lines().nth(1).unwrap()), bad);
        let good = QEMU_10.lines().nth(1).unwrap();
        assert_eq!(with(&good.replace("pc.ram", "      ")), bad);
        assert_eq!(with(&good.replace("4 KiB", "4 XiB")), bad);
        assert_eq!(
            with(&good.replace("0x00007fb617e00000", "0x7fb617e00000")),
            bad
        );
        assert_eq!(
            with(&good.replace("0x00007fb617e00000", "0x+0007fb617e00000")),
            bad
        );
        let many = format!("{heading}\n{}", format!("{good}\n").repeat(BLOCKS_MAX + 1));
        assert_eq!(parse(&many), Err(RamBlockError::TooMany));
    }

    proptest! {
        /// Any text never panics.
        #[test]
        fn any_text(text in ".{0,200}", line in ".{0,120}") {
            drop(parse(&text));
            drop(parse(&format!("{}\n{line}", QEMU_10.lines().next().unwrap_or_default())));
        }

        /// Any name without leading spaces and line ends comes out as it was put in.
        #[test]
        fn odd_names(name in "[^ \r\n\u{0}][^\r\n\u{0}]{0,60}", size in 0_u32..31, used in any::<u64>()) {
            let amount = match size { 0..10 => format!("{} B", 1 << size),
                10..20 => format!("{} KiB", 1 << (size - 10)),
                20..30 => format!("{} MiB", 1 << (size - 20)),
                _ => format!("{} GiB", 1 << (size - 30)) };
            let line = format!(
                "{name:>24} {amount:>8}  0x{:016x} 0x{used:016x} 0x{:016x} 0x{:016x} {:>3}",
                1, 2, 3, "ro"
            );
            let text = format!("{}\r\n{line}\r\n", QEMU_10.lines().next().unwrap_or_default());
            let expected = RamBlock {
                name,
                page_size_bytes: 1 << size,
                offset: 1,
                used_bytes: used,
                total_bytes: 2,
                host_address: Some(3),
            };
            prop_assert_eq!(parse(&text), Ok(vec![expected]));
        }
    }
}
