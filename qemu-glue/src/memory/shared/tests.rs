//! Our own process stands for QEMU: its maps are text of ours, its descriptors are real.

use super::*;
use rustix::fs::MemfdFlags;

/// A memfd with `pages` pages, and its identity.
fn memfd(pages: usize) -> (Arc<File>, FileId) {
    let file = File::from(rustix::fs::memfd_create("ram", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len((pages * PAGE_BYTES) as u64).unwrap();
    let id = identity(&file.metadata().unwrap());
    (Arc::new(file), id)
}

fn block(name: &str, address: u64, pages: usize) -> RamBlock {
    let used_bytes = (pages * PAGE_BYTES) as u64;
    RamBlock {
        name: name.to_owned(),
        page_size_bytes: 4096,
        offset: 0,
        used_bytes,
        total_bytes: used_bytes,
        host_address: Some(address),
    }
}

fn line(from: u64, pages: usize, rights: &str, offset: u64, id: FileId) -> String {
    let (to, inode) = (from + (pages * PAGE_BYTES) as u64, id.inode);
    let (major, minor) = id.device;
    format!("{from:x}-{to:x} {rights} {offset:08x} {major:02x}:{minor:02x} {inode} /memfd:ram\n")
}

fn shared(file: &Arc<File>, id: FileId, offset: u64, pages: usize) -> SharedRam {
    let bytes = (pages * PAGE_BYTES) as u64;
    let block = SharedBlock::check(file, SharedPart { file: id, offset }, bytes);
    let name = "a".to_owned();
    let used_bytes = bytes;
    SharedRam {
        blocks: vec![(ExpectedBlock { name, used_bytes }, block)],
    }
}

/// Two memfds of equal name and size are told apart; the same bytes twice are nobody's.
#[test]
fn equal_names_are_told_apart() {
    let ((_one, first), (_two, second)) = (memfd(4), memfd(4));
    let maps = line(0x1000, 4, "rw-s", 0, first) + &line(0x1_0000, 4, "rw-s", 0, second);
    let blocks = [block("ram0", 0x1000, 4), block("ram1", 0x1_0000, 4)];
    let found: Vec<_> = parts(&maps, &blocks)
        .into_iter()
        .map(|part| part.unwrap().file)
        .collect();
    assert_eq!(found, [first, second]);
    let same =
        maps + &line(0x2_0000, 4, "rw-s", 0, first) + &line(0x3_0000, 1, "rw-s", 0x3000, first);
    let three = [
        block("ram0", 0x1000, 4),
        block("ram1", 0x1_0000, 4),
        block("ram2", 0x2_0000, 4),
        block("ram3", 0x3_0000, 1),
    ];
    let found = parts(&same, &three);
    let doubt = Err("another block has the same memory".to_owned());
    assert_eq!((&found[0], &found[2], &found[3]), (&doubt, &doubt, &doubt));
    assert!(found[1].is_ok());
}

/// Several blocks may share one file at places of their own; a name that is there twice is none.
#[test]
fn one_file_for_two_blocks() {
    let (_file, id) = memfd(4);
    let maps = line(0x1000, 2, "rw-s", 0, id) + &line(0x1_0000, 2, "rw-s", 0x2000, id);
    let found = parts(&maps, &[block("a", 0x1000, 2), block("b", 0x1_0000, 2)]);
    let offsets: Vec<_> = found
        .iter()
        .map(|part| part.as_ref().unwrap().offset)
        .collect();
    assert_eq!(offsets, [0, 0x2000]);
    let found = parts(&maps, &[block("a", 0x1000, 2), block("a", 0x1_0000, 2)]);
    let twice = Err("QEMU has two blocks of that name".to_owned());
    assert_eq!(found, [twice.clone(), twice]);
}

/// The descriptor of the file is found among those of the process, by what it is.
#[test]
fn the_process_own_descriptor() {
    let ((_one, first), (_two, second)) = (memfd(1), memfd(1));
    let own = Descriptors::of(&ProcessId::of(std::process::id()).unwrap()).unwrap();
    let files = open_files(&own, &[second]).unwrap();
    assert_eq!(files.keys().collect::<Vec<_>>(), [&second]);
    assert_ne!(first, second);
}

/// Pages go to their places, behind the block's offset, and never outside.
#[test]
fn pages_stay_in_their_block() {
    let (file, id) = memfd(4);
    let ram = shared(&file, id, 0x1000, 2);
    assert!(ram.is_shared(0) && ram.is_writable(0) && !ram.is_shared(1));
    ram.write_pages(0, 1, &[7; PAGE_BYTES]).unwrap();
    let mut all = vec![1; 4 * PAGE_BYTES];
    file.read_exact_at(&mut all, 0).unwrap();
    let firsts: Vec<u8> = all.chunks(PAGE_BYTES).map(|page| page[0]).collect();
    assert_eq!(firsts, [0, 0, 7, 0]);
    let kind = |result: io::Result<()>| result.unwrap_err().kind();
    let mut page = [0; PAGE_BYTES];
    assert_eq!(
        kind(ram.read_pages(0, 2, &mut page)),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(
        kind(ram.write_pages(0, 1, &[1; 2 * PAGE_BYTES])),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(
        kind(ram.zero_pages(0, u32::MAX, u32::MAX)),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(
        kind(ram.read_pages(1, 0, &mut page)),
        io::ErrorKind::Unsupported
    );
    file.set_len(0x2000).unwrap();
    assert_eq!(
        kind(ram.read_pages(0, 1, &mut page)),
        io::ErrorKind::UnexpectedEof
    );
}

/// Reading and zeroing holes allocates nothing; old data goes away.
#[test]
fn holes_stay_holes() {
    let (file, id) = memfd(1024);
    let ram = shared(&file, id, 0, 1024);
    let blocks = || file.metadata().unwrap().blocks();
    let mut page = [1; PAGE_BYTES];
    ram.read_pages(0, 5, &mut page).unwrap();
    ram.zero_pages(0, 0, 1024).unwrap();
    ram.clear(0).unwrap();
    assert_eq!((page, blocks()), ([0; PAGE_BYTES], 0));
    for at in [0, 63, 64, 700, 1023] {
        ram.write_pages(0, at, &[9; PAGE_BYTES]).unwrap();
    }
    ram.zero_pages(0, 63, 2).unwrap();
    let mut seen = Vec::new();
    let mut look = |ram: &SharedRam| {
        seen.push([0, 63, 64, 700, 1023].map(|at| {
            ram.read_pages(0, at, &mut page).unwrap();
            page[0]
        }));
    };
    look(&ram);
    ram.clear(0).unwrap();
    look(&ram);
    assert_eq!(seen, [[9, 0, 0, 9, 9], [0; 5]]);
}

/// A short file, and a memfd that nobody may write.
#[test]
fn files_that_do_not_fit() {
    let (file, id) = memfd(1);
    let short = SharedBlock::check(
        &file,
        SharedPart {
            file: id,
            offset: 0x1000,
        },
        0x1000,
    );
    assert_eq!(short.unwrap_err(), "its file is shorter than the block");
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let ram = shared(&file, id, 0, 1);
    assert!(ram.is_shared(0) && !ram.is_writable(0));
    assert_eq!(ram.reason(0), Some("its memfd is sealed against writing"));
}

/// Only a block of the same name and length is the one of the stream.
#[test]
fn blocks_of_the_stream() {
    let (file, id) = memfd(2);
    let ram = shared(&file, id, 0, 2);
    let want = |name: &str, used_bytes| ExpectedBlock {
        name: name.to_owned(),
        used_bytes,
    };
    let chosen = ram.select(&[want("b", 0x2000), want("a", 0x2000), want("a", 0x1000)]);
    let is_shared: Vec<_> = (0..4).map(|at| chosen.is_shared(at)).collect();
    assert_eq!(is_shared, [false, true, false, false]);
    assert!(chosen.reason(0).is_some() && chosen.reason(1).is_none());
}
