//! Guest addresses of RAM blocks from `info mtree -f`: pure. Up to 7.2 it is the first step to a
//! block's place in QEMU's memory; the second is `gpa2hva`, which tells name and place of one guest
//! address.
//!
//! ```text
//! FlatView #0
//!  AS "memory", root: system
//!  Root memory region: system
//!   0000000000000000-000000000009ffff (prio 0, ram): pc.ram
//!   0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000 KVM
//! ```
//! Lines that are no RAM are passed over; a range that is misread is found by the second step,
//! which must agree for each range of a block.
//! //= qemu softmmu/memory.c mtree_print_flatview

use super::ramblock::RamBlock;

/// Ranges beyond this number are left out; a PC has about 10.
pub const RANGES_MAX: usize = 256;

/// A range of guest addresses that shows part of a RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatRange {
    /// First guest address.
    pub guest_address: u64,
    /// Name of the memory region, most often that of the block.
    pub name: String,
    /// Place of the first byte in the region.
    pub offset: u64,
}

/// The ranges of RAM and ROM in the address space of the guest's memory.
pub fn parse(text: &str) -> Vec<FlatRange> {
    let view = text.split("FlatView #").find(|view| {
        view.lines()
            .any(|line| line.trim_start().starts_with("AS \"memory\", root: "))
    });
    view.into_iter()
        .flat_map(str::lines)
        .filter_map(parse_line)
        .take(RANGES_MAX)
        .collect()
}

fn parse_line(line: &str) -> Option<FlatRange> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (first, _last) = range.split_once('-')?;
    let (kind, name) = rest.split_once("): ")?;
    if !(kind.ends_with(", ram") || kind.ends_with(", rom") || kind.ends_with(", romd")) {
        return None;
    }
    // After the name there may be the offset, and then the accelerator's name.
    let (name, offset) = match name.rsplit_once(" @") {
        Some((name, offset)) => (name, number(offset.split(' ').next()?)?),
        None => (name.strip_suffix(" KVM").unwrap_or(name), 0),
    };
    Some(FlatRange {
        guest_address: number(first)?,
        name: name.to_owned(),
        offset,
    })
}

fn number(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

/// Reads the answer to `gpa2hva`: the region's name and the address in QEMU's memory.
///
/// ```text
/// Host virtual address for 0x0 (pc.ram) is 0x7f2c1be00000
/// ```
pub fn parse_gpa2hva(answer: &str) -> Option<(&str, u64)> {
    let rest = answer
        .trim_end()
        .strip_prefix("Host virtual address for 0x")?;
    let (_guest_address, rest) = rest.split_once(" (")?;
    let (name, address) = rest.rsplit_once(") is 0x")?;
    Some((name, number(address)?))
}

/// Notes where blocks begin, as far as the answers leave no doubt: the name belongs to one block,
/// and every range of it that has an answer gives the same beginning.
pub fn place(blocks: &mut [RamBlock], answers: &[(FlatRange, String)]) {
    for at in 0..blocks.len() {
        let name = blocks[at].name.clone();
        let is_unique = blocks.iter().filter(|other| other.name == name).count() == 1;
        let mut beginnings: Vec<Option<u64>> = answers
            .iter()
            .filter(|(range, _)| range.name == name)
            .map(|(range, answer)| match parse_gpa2hva(answer) {
                Some((named, address)) if named == name => address.checked_sub(range.offset),
                Some(_) | None => None,
            })
            .collect();
        beginnings.dedup();
        if let (true, [Some(beginning)]) = (is_unique, beginnings.as_slice()) {
            blocks[at].host_address = Some(*beginning);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ramblock;

    /// Output of 7.2, shortened, one line with the suffix that KVM adds.
    const VIEWS: &str = concat!(
        "FlatView #0\r\n AS \"I/O\", root: io\r\n Root memory region: io\r\n",
        "  0000000000000000-0000000000000007 (prio 0, ram): elsewhere\r\n\r\n",
        "FlatView #1\r\n AS \"memory\", root: system\r\n AS \"cpu-memory-0\", root: system\r\n",
        " Root memory region: system\r\n",
        "  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\r\n",
        "  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\r\n",
        "  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000\r\n",
        "  0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000 KVM\r\n",
        "  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios\r\n\r\n",
    );

    #[test]
    fn ranges_of_memory() {
        let range = |guest_address, name: &str, offset| FlatRange {
            guest_address,
            name: name.to_owned(),
            offset,
        };
        let expected = [
            range(0, "pc.ram", 0),
            range(0xe_0000, "pc.bios", 0x2_0000),
            range(0x10_0000, "pc.ram", 0x10_0000),
            range(0xfffc_0000, "pc.bios", 0),
        ];
        assert_eq!(parse(VIEWS), expected);
        assert_eq!(parse("unknown command: 'info mtree'"), []);
        let many = VIEWS.replace(
            "  0000",
            &"  0000000000000000-0 (prio 0, ram): a\n".repeat(300),
        );
        assert_eq!(parse(&many).len(), RANGES_MAX);
    }

    #[test]
    fn answers_of_gpa2hva() {
        let answer = "Host virtual address for 0x0 (pc.ram) is 0x7f2c1be00000\r\n";
        assert_eq!(parse_gpa2hva(answer), Some(("pc.ram", 0x7f2c_1be0_0000)));
        assert_eq!(
            parse_gpa2hva("Memory at address 0xa0000 is not RAM\r\n"),
            None
        );
    }

    /// Only a block whose ranges agree, and whose name is its own, gets a place.
    #[test]
    fn places_without_doubt() {
        let answer = |guest_address, name: &str, offset, hva: &str| {
            let range = FlatRange {
                guest_address,
                name: name.to_owned(),
                offset,
            };
            (
                range,
                format!("Host virtual address for 0x1 ({name}) is {hva}\r\n"),
            )
        };
        let agree = [
            answer(0, "a", 0, "0x10000"),
            answer(9, "a", 0x2000, "0x12000"),
        ];
        assert_eq!(placed(&["a", "b"], &agree), [Some(0x1_0000), None]);
        assert_eq!(placed(&["a", "a"], &agree), [None, None]);
        let differ = [
            answer(0, "a", 0, "0x10000"),
            answer(9, "a", 0x2000, "0x13000"),
        ];
        assert_eq!(placed(&["a"], &differ), [None]);
        let mut moved = agree;
        moved[1].1 = moved[1].1.replace("(a)", "(b)");
        assert_eq!(placed(&["a", "b"], &moved), [None, None]);
    }

    fn placed(names: &[&str], answers: &[(FlatRange, String)]) -> Vec<Option<u64>> {
        let number = "0x0000000000001000";
        let line = |name: &&str| format!("{name:>24}    4 KiB  {number} {number} {number}\n");
        let table: String = names.iter().map(line).collect();
        let text = format!("Block Name PSize Offset Used Total\n{table}");
        let mut blocks = ramblock::parse(&text).unwrap();
        place(&mut blocks, answers);
        blocks.iter().map(|block| block.host_address).collect()
    }
}
