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
