//! Content indexes over plain files, through a block source as small as can be.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const SECRET: [u8; 32] = [4; 32];

/// Every block of every image shared with the peer is found by its hash, under a number that reads
/// it; zero blocks and strangers are not; of equal blocks one is named.
#[test]
fn blocks_are_found_by_their_hash() {
    let here = Scratch::new("found");
    here.image("a", &[1, 0, 2, 2, 3]);
    here.image("b", &[4, 1]);
    let index = here.open("peer", &SECRET);
    assert_eq!(index.known_pages(), 3 + 2);
    let check = |byte, expected| assert_eq!(index.lookup(&prefix(byte)), expected, "{byte}");
    for (byte, expected) in [(1, Some(0)), (2, Some(2)), (3, Some(4)), (4, Some(5))] {
        check(byte, expected);
    }
    check(0, None);
    check(9, None);
    let mut page = [0; PAGE_SIZE];
    for (number, byte) in [(0, 1), (1, 0), (4, 3), (5, 4), (6, 1)] {
        index.read(number, &mut page).unwrap();
        assert_eq!(page, [byte; PAGE_SIZE], "{number}");
    }
    assert_eq!(
        index.read(7, &mut page).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
}

/// S13: a flipped byte, and yesterday's file under the same size and time, are not named.
#[test]
fn s13_changed_blocks_are_not_named() {
    let here = Scratch::new("s13");
    let path = here.image("a", &[1, 2, 3]);
    let index = here.open("peer", &SECRET);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[7], 100).unwrap();
    assert_eq!(index.lookup(&prefix(1)), None);
    assert_eq!(index.lookup(&prefix(2)), Some(1));

    for (block, byte) in [(0, 5), (1, 6), (2, 3)] {
        file.write_all_at(&[byte; PAGE_SIZE], block * 4096).unwrap();
    }
    file.set_modified(before).unwrap();
    let again = here.open("peer", &SECRET);
    assert_eq!(here.reads(), 0, "the kept index was taken");
    for (byte, expected) in [(1, None), (2, None), (3, Some(2)), (5, None)] {
        assert_eq!(again.lookup(&prefix(byte)), expected, "{byte}");
    }
}

/// An index is kept between attempts, and built anew after a change, under another secret, or when
/// it is damaged.
#[test]
fn indexes_are_kept_and_invalidated() {
    let here = Scratch::new("kept");
    let path = here.image("a", &[1, 2]);
    let check = |secret: &[u8; 32], built: bool, why: &str| {
        here.open("peer", secret);
        assert_eq!(here.reads() > 0, built, "{why}");
    };
    check(&SECRET, true, "first");
    check(&SECRET, false, "kept");
    here.image("a", &[1, 2, 3]);
    check(&SECRET, true, "another size");
    fs::rename(&path, here.path.join("old")).unwrap();
    here.image("a", &[1, 2, 3]);
    check(&SECRET, true, "another inode");
    check(&[8; 32], true, "another secret");
    let share = Shares::load(&here.path).unwrap().all()[0].clone();
    let index = index_path(&here.path, &share, key("peer"));
    assert_eq!(
        fs::metadata(&index).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let whole = fs::read(&index).unwrap();
    fs::write(&index, &whole[..whole.len() - 1]).unwrap();
    check(&[8; 32], true, "cut");
    fs::write(&index, &whole[..40]).unwrap();
    check(&[8; 32], true, "cut in its head");
    assert_eq!(fs::read(&index).unwrap(), whole);
}

/// Random bytes where entries belong find nothing that is not there.
#[test]
fn a_damaged_index_finds_no_wrong_block() {
    let here = Scratch::new("damaged");
    here.image("a", &[1, 2, 3, 4]);
    here.open("peer", &SECRET);
    let share = Shares::load(&here.path).unwrap().all()[0].clone();
    let index = index_path(&here.path, &share, key("peer"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(index)
        .unwrap();
    let mut bytes = vec![0; 4 * index::ENTRY_BYTES];
    file.read_exact_at(&mut bytes, index::HEAD_BYTES as u64)
        .unwrap();
    for entry in bytes.chunks_mut(index::ENTRY_BYTES) {
        entry[8] ^= 1;
        entry[11] ^= entry[0] & 0x80;
    }
    file.write_all_at(&bytes, index::HEAD_BYTES as u64).unwrap();
    let index = here.open("peer", &SECRET);
    for byte in 1..5 {
        assert_eq!(index.lookup(&prefix(byte)), None, "{byte}");
    }
}

/// S14: an image is known content for the peers that it is shared with, until it is not.
#[test]
fn s14_images_are_shared_by_name() {
    let here = Scratch::new("s14");
    let path = here.image("a", &[1]);
    assert_eq!(here.open("stranger", &SECRET).known_pages(), 0);
    assert_eq!(here.open("peer", &SECRET).lookup(&prefix(1)), Some(0));
    let id = Shares::load(&here.path).unwrap().all()[0].id();
    let remove = |peers: &[Fingerprint]| {
        Shares::edit(&here.path, |shares| shares.remove(&here.path, &path, peers)).unwrap()
    };
    assert!(remove(&[key("peer")]));
    assert!(!remove(&[]));
    assert!(!shares::folder(&here.path).join(id).exists());
    assert_eq!(here.open("peer", &SECRET).lookup(&prefix(1)), None);
}

/// A list that says more than it should shares nothing.
#[test]
fn a_list_that_makes_no_sense_is_refused() {
    let here = Scratch::new("list");
    here.image("a", &[1]);
    let list = shares::folder(&here.path).join("shares.json");
    for text in ["{\"schema\": 2, \"images\": []}", "{\"schema\": 1", "{}"] {
        fs::write(&list, text).unwrap();
        let error = Shares::load(&here.path).unwrap_err();
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ),
            "{error:?}"
        );
    }
}

/// A larger image, hashed on several threads, is found whole.
#[test]
fn many_blocks_on_many_threads() {
    let here = Scratch::new("many");
    let path = here.path.join("large");
    let file = File::create(&path).unwrap();
    for block in 0..3000_u32 {
        let mut page = [0; PAGE_SIZE];
        page[..4].copy_from_slice(&(block + 1).to_be_bytes());
        file.write_all_at(&page, u64::from(block) * 4096).unwrap();
    }
    here.share(&path);
    let index = here.open("peer", &SECRET);
    assert_eq!(index.known_pages(), 3000);
    for block in 0..3000_u32 {
        let mut page = [0; PAGE_SIZE];
        page[..4].copy_from_slice(&(block + 1).to_be_bytes());
        let hash = PageHasher::new(&SECRET).hash(&page);
        assert_eq!(index.lookup(hash.0.first_chunk().unwrap()), Some(block));
    }
}

/// A file as it is, block by block.
#[derive(Debug)]
struct Plain {
    file: File,
    path: PathBuf,
    reads: std::sync::Arc<AtomicUsize>,
}

impl BlockSource for Plain {
    fn blocks(&self) -> u32 {
        u32::try_from(self.file.metadata().unwrap().len() / 4096).unwrap()
    }

    fn identity(&self) -> String {
        let found = self.file.metadata().unwrap();
        let modified = (found.mtime(), found.mtime_nsec());
        format!(
            "{:?} {} {} {modified:?}",
            self.path,
            found.ino(),
            found.len()
        )
    }

    fn next_content(&self, from: u32) -> io::Result<Option<Range<u32>>> {
        Ok((from < self.blocks()).then(|| from..self.blocks()))
    }

    fn read(&self, first: u32, into: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.file.read_exact_at(into, u64::from(first) * 4096)
    }
}

/// A state dir of its own for each test, removed at the end.
struct Scratch {
    path: PathBuf,
    reads: std::sync::Arc<AtomicUsize>,
}

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("content-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self {
            path,
            reads: std::sync::Arc::default(),
        }
    }

    /// An image whose blocks hold one byte each, shared with `peer`.
    fn image(&self, name: &str, blocks: &[u8]) -> PathBuf {
        let path = self.path.join(name);
        let bytes: Vec<u8> = blocks.iter().flat_map(|byte| [*byte; PAGE_SIZE]).collect();
        fs::write(&path, bytes).unwrap();
        self.share(&path);
        path
    }

    fn share(&self, path: &Path) {
        let share = Share {
            path: path.into(),
            format: "raw".into(),
            peers: [key("peer").to_string()].into(),
        };
        Shares::edit(&self.path, |shares| shares.add(share)).unwrap();
    }

    fn open(&self, peer: &str, secret: &[u8; 32]) -> ContentIndex {
        let open = |share: &Share| -> io::Result<Box<dyn BlockSource>> {
            Ok(Box::new(Plain {
                file: File::open(&share.path)?,
                path: share.path.clone(),
                reads: std::sync::Arc::clone(&self.reads),
            }))
        };
        self.reads.store(0, Ordering::Relaxed);
        ContentIndex::open_all(&self.path, key(peer), secret, 3, &open).unwrap()
    }

    /// Reads of images while the last index was opened.
    fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).unwrap();
    }
}

fn key(name: &str) -> Fingerprint {
    Fingerprint::of_spki(name.as_bytes())
}

fn prefix(byte: u8) -> [u8; 8] {
    let hash = PageHasher::new(&SECRET).hash(&[byte; PAGE_SIZE]);
    *hash.0.first_chunk().unwrap()
}
