use super::*;

/// S9 as far as it concerns reading: each way in which a block's place is not certain.
#[test]
fn s9_uncertain_places_are_refused() {
    let detail = |blocks: &[RamBlock], expected: &[ExpectedBlock]| match locate(blocks, expected) {
        Err(MemoryError::BlockMismatch { name, detail }) => format!("{name}: {detail}"),
        other => panic!("{other:?}"),
    };
    let a = block("a", 0x10_0000, 0x2000);
    assert_eq!(
        detail(std::slice::from_ref(&a), &[want("b", 0x2000)]),
        "b: QEMU has none of that name"
    );
    let twice = [a.clone(), a.clone()];
    assert_eq!(
        detail(&twice, &[want("a", 0x2000)]),
        "a: QEMU has two of that name"
    );
    let other_size = "a: 4096 bytes were expected, QEMU has 8192";
    assert_eq!(
        detail(std::slice::from_ref(&a), &[want("a", 0x1000)]),
        other_size
    );
    let zero = [block("a", 0, 0x2000)];
    assert_eq!(
        detail(&zero, &[want("a", 0x2000)]),
        "a: 0x0 cannot be its address"
    );
    let odd = [block("a", 0x1001, 0x2000)];
    assert_eq!(
        detail(&odd, &[want("a", 0x2000)]),
        "a: 0x1001 cannot be its address"
    );
    let last = [block("a", 0xffff_ffff_ffff_f000, 0x2000)];
    assert!(detail(&last, &[want("a", 0x2000)]).ends_with("cannot be its address"));
    let near = [a.clone(), block("b", 0x10_1000, 0x1000)];
    let both = [want("b", 0x1000), want("a", 0x2000)];
    assert_eq!(detail(&near, &both), "a: it overlaps \"b\"");
    assert_eq!(
        detail(
            std::slice::from_ref(&a),
            &[want("a", 0x2000), want("a", 0x2000)]
        )
        .len(),
        18
    );
    let unknown = RamBlock {
        host_address: None,
        ..a
    };
    let result = locate(&[unknown], &[want("a", 0x2000)]);
    assert!(matches!(result, Err(MemoryError::NoHostAddress { name }) if name == "a"));
}

/// A range is mapped only when readable mappings cover it without a hole.
#[test]
fn holes_in_maps() {
    let maps = "1000-3000 rw-p 0 00:00 0 \n3000-4000 r--s 0 00:01 5 /memfd:a b\n5000-6000 rw-p 0\n\
                6000-7000 ---p 0 00:00 0\n";
    let check = |start, bytes| is_mapped(maps, Range { start, bytes });
    assert!(check(0x1000, 0x3000) && check(0x2000, 0x1000) && check(0x5000, 0x1000));
    assert!(!check(0x1000, 0x5000) && !check(0x5000, 0x2000) && !check(0, 0x2000));
    assert!(!check(0x8000, 0x1000));
}

/// Reads our own memory through /proc, within the block only.
#[test]
fn reads_within_the_block() {
    let pages: Vec<u8> = (0..5 * PAGE_BYTES)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    let start = pages.as_ptr().addr().next_multiple_of(PAGE_BYTES);
    let first = start - pages.as_ptr().addr();
    let us = ProcessId::of(std::process::id()).unwrap();
    let size = 3 * PAGE_BYTES as u64;
    let blocks = [block("a", start as u64, size)];
    let memory = GuestMemory::open(&us, &blocks, &[want("a", size)]).unwrap();
    let mut page = [0; PAGE_BYTES];
    memory.read_page(0, 2, &mut page).unwrap();
    assert_eq!(page, pages[first + 2 * PAGE_BYTES..][..PAGE_BYTES]);
    let mut all = vec![0; 3 * PAGE_BYTES];
    memory.read_pages(0, 0, &mut all).unwrap();
    assert_eq!(all, pages[first..][..3 * PAGE_BYTES]);
    let refused = |result| matches!(result, Err(MemoryError::NoSuchPage { .. }));
    assert!(refused(memory.read_page(0, 3, &mut page)));
    assert!(refused(memory.read_page(0, u32::MAX, &mut page)));
    assert!(refused(memory.read_pages(0, 1, &mut all)));
    assert!(refused(memory.read_page(1, 0, &mut page)));
}

/// A process that has no such memory is not the one that the blocks came from.
#[test]
fn another_process_is_refused() {
    let us = ProcessId::of(std::process::id()).unwrap();
    let blocks = [block("a", 0x1000, 0x2000)];
    let result = GuestMemory::open(&us, &blocks, &[want("a", 0x2000)]);
    assert!(matches!(result, Err(MemoryError::BlockMismatch { name, .. }) if name == "a"));
    let before = ProcessId {
        start_time_ticks: 1,
        ..us
    };
    let result = GuestMemory::open(&before, &[], &[]);
    assert!(matches!(result, Err(MemoryError::ProcessGone { .. })));
}

fn block(name: &str, address: u64, used_bytes: u64) -> RamBlock {
    RamBlock {
        name: name.to_owned(),
        page_size_bytes: 4096,
        offset: 0,
        used_bytes,
        total_bytes: used_bytes,
        host_address: Some(address),
    }
}

fn want(name: &str, used_bytes: u64) -> ExpectedBlock {
    ExpectedBlock {
        name: name.to_owned(),
        used_bytes,
    }
}
