//! Checkpoints on a real file system: what is kept, what is refused, what is wiped.

use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::block::{BlockId, BlockSpec, PAGE_SIZE, PageAddress, Replica};
use crate::store::BasisKey;

const SECRET: [u8; 32] = [9; 32];
const NONCE: [u8; 16] = [5; 16];

/// Pages come back from their place in a later attempt, holes are zero, and both sides' digests
/// agree exactly where the pages do.
#[test]
fn a_replica_is_found_again() {
    let here = Scratch::new("again");
    let layout = layout(2000);
    let replica = here.open("vm", "peer", &layout).unwrap();
    replica.write(at(0, 3), &[7; 2 * PAGE_SIZE]).unwrap();
    replica.write(at(1, 0), &[8; PAGE_SIZE]).unwrap();
    replica.zero(at(0, 4), 1).unwrap();
    replica.zero(at(0, 1000), 900).unwrap();
    let before = digests(&replica);
    replica
        .settle(&Settled {
            root: Some(Root([0xab; 32])),
            now_s: 200,
        })
        .unwrap();
    drop(replica);

    let listed = here.all.list().unwrap();
    let meta = listed[0].meta.as_ref().unwrap();
    assert_eq!((listed.len(), meta.vm.as_str()), (1, "vm"));
    assert_eq!((meta.state, meta.used_s), (State::Settled, 200));
    assert_eq!(meta.root.as_deref(), Some("ab".repeat(32).as_str()));
    assert_eq!(meta.image_bytes(), 2040 * PAGE_SIZE as u64);

    let again = here.open("vm", "peer", &layout).unwrap();
    let mut page = [1; PAGE_SIZE];
    for (address, byte) in [(at(0, 3), 7), (at(0, 4), 0), (at(1, 0), 8), (at(1, 39), 0)] {
        again.read(address, &mut page).unwrap();
        assert_eq!(page, [byte; PAGE_SIZE], "{address:?}");
    }
    assert_eq!(digests(&again), before);
    let hashes = again.hash_ranges(&SECRET, 3).unwrap();
    let zero: Vec<_> = (0..hashes.len()).map(|n| hashes.is_zero(n)).collect();
    assert_eq!(zero, [false, true, true, true, false]);
    let hasher = crate::block::PageHasher::new(&SECRET);
    let pages: Vec<_> = hashes.pages(0).collect();
    assert_eq!(pages.len(), 512);
    assert_eq!(pages[3], (at(0, 3), hasher.hash(&[7; PAGE_SIZE])));
    assert_eq!(pages[4], (at(0, 4), hasher.zero()));
    assert_eq!(hashes.pages(4).count(), 40);
}

/// The digest is the one that docs/protocol.md words, and a fresh nonce makes another.
#[test]
fn digests_are_what_the_protocol_says() {
    let here = Scratch::new("digest");
    let replica = here.open("vm", "peer", &layout(600)).unwrap();
    replica.write(at(0, 512), &[3; PAGE_SIZE]).unwrap();
    let key = blake3::derive_key("scaleaway/1 basis", &SECRET);
    let page = |byte: u8| blake3::keyed_hash(&SECRET, &[byte; PAGE_SIZE]);
    let mut expected = blake3::Hasher::new_keyed(&key);
    expected.update(&NONCE).update(&[0, 0, 0, 1]);
    expected.update(&page(3).as_bytes()[..16]);
    for _ in 1..88 {
        expected.update(&page(0).as_bytes()[..16]);
    }
    let hashes = replica.hash_ranges(&SECRET, 1).unwrap();
    let key = BasisKey::new(&SECRET);
    let digest = hashes.digest(1, &NONCE, &key);
    assert_eq!(digest, expected.finalize().as_bytes()[..16]);
    assert_ne!(digest, hashes.digest(1, &[6; 16], &key));
}

/// Runs outside their block, and bytes that are no pages, are refused and break nothing.
#[test]
fn runs_outside_are_refused() {
    let here = Scratch::new("outside");
    let replica = here.open("vm", "peer", &layout(8)).unwrap();
    let mut page = [0; PAGE_SIZE];
    let refused = [
        replica.write(at(0, 7), &[1; 2 * PAGE_SIZE]),
        replica.write(at(2, 0), &[1; PAGE_SIZE]),
        replica.write(at(0, 0), &[1; 17]),
        replica.zero(at(0, 0), 9),
        replica.read(at(0, 8), &mut page),
    ];
    for refused in refused {
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert!(!replica.is_broken());
}

/// Whatever became of the file (torn, cut off, random bytes), the next attempt takes it up; damaged
/// ranges differ, all others still agree.
#[test]
fn a_damaged_image_only_agrees_less() {
    let here = Scratch::new("damaged");
    let layout = layout(4 * 512);
    let full = |vm: &str| {
        let replica = here.open(vm, "peer", &layout).unwrap();
        for range in 0..4_u8 {
            replica
                .write(at(0, u32::from(range) * 512), &[range + 1; 3 * PAGE_SIZE])
                .unwrap();
        }
        let digests = digests(&replica);
        drop(replica);
        digests
    };
    let check = |vm: &str, damage: &dyn Fn(&File), differs: &[usize]| {
        let before = full(vm);
        let image = here.all.folder_of(vm, key("peer")).join(IMAGE);
        damage(&OpenOptions::new().write(true).open(image).unwrap());
        let after = digests(&here.open(vm, "peer", &layout).unwrap());
        let found: Vec<_> = (0..5).filter(|n| before[*n] != after[*n]).collect();
        assert_eq!(found, differs, "{vm}");
    };
    check("whole", &|_| {}, &[]);
    check(
        "flipped",
        &|file| {
            file.write_all_at(&[99], (512 * PAGE_SIZE + 77) as u64)
                .unwrap();
        },
        &[1],
    );
    check("cut", &|file| file.set_len(3 << 20).unwrap(), &[2, 3]);
    check("gone", &|file| file.set_len(0).unwrap(), &[0, 1, 2, 3]);
    check(
        "longer",
        &|file| file.write_all_at(&[1; 99], 1 << 30).unwrap(),
        &[],
    );
}

/// A block list that differs, or a note that cannot be read, begins the image anew.
#[test]
fn another_block_list_begins_anew() {
    let here = Scratch::new("anew");
    let replica = here.open("vm", "peer", &layout(600)).unwrap();
    replica.write(at(0, 0), &[1; PAGE_SIZE]).unwrap();
    drop(replica);
    let replica = here.open("vm", "peer", &layout(601)).unwrap();
    assert!(replica.hash_ranges(&SECRET, 1).unwrap().is_empty());
    replica.write(at(0, 0), &[1; PAGE_SIZE]).unwrap();
    drop(replica);
    let meta = here.all.folder_of("vm", key("peer")).join(META);
    fs::write(&meta, b"{\"schema\": 1, \"vm\": \"v").unwrap();
    let replica = here.open("vm", "peer", &layout(601)).unwrap();
    assert!(replica.hash_ranges(&SECRET, 1).unwrap().is_empty());
}

/// S14: a VM's checkpoint is found under the key that it travelled with, under no other.
#[test]
fn a_checkpoint_belongs_to_its_peer() {
    let here = Scratch::new("peers");
    let replica = here.open("vm", "peer", &layout(8)).unwrap();
    replica.write(at(0, 0), &[1; PAGE_SIZE]).unwrap();
    let empty = |replica: &ReplicaFile| replica.hash_ranges(&SECRET, 1).unwrap().is_empty();
    assert!(!empty(&replica));
    assert!(empty(&here.open("vm", "other", &layout(8)).unwrap()));
    assert!(empty(&here.open("other", "peer", &layout(8)).unwrap()));
}

/// One attempt at a time, and nobody else may read guest memory.
#[test]
fn locked_and_private() {
    let here = Scratch::new("locked");
    let replica = here.open("vm", "peer", &layout(8)).unwrap();
    assert!(matches!(
        here.open("vm", "peer", &layout(8)),
        Err(CheckpointError::LocalInUse(_))
    ));
    let listed = here.all.list().unwrap();
    assert!(matches!(
        here.all.remove(&listed[0]),
        Err(CheckpointError::LocalInUse(_))
    ));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let folder = &listed[0].folder;
    assert_eq!(
        (mode(folder), mode(folder.parent().unwrap())),
        (0o700, 0o700)
    );
    assert_eq!(
        (mode(&folder.join(IMAGE)), mode(&folder.join(META))),
        (0o600, 0o600)
    );
    drop(replica);
    here.all.remove(&listed[0]).unwrap();
    assert!(!folder.exists() && !folder.parent().unwrap().exists());
    here.open("vm", "peer", &layout(8)).unwrap();
}

/// The least recently used goes first, wiped: a second name of the file shows zeros only.
#[test]
fn eviction_wipes_the_least_recently_used() {
    let here = Scratch::new("evict");
    let usage = here.all.usage().unwrap();
    assert!(usage.held == 0 && usage.budget > 0, "{usage:?}");
    let data = vec![0x5a; 256 * PAGE_SIZE];
    for (vm, now_s) in [("old", 10), ("middle", 20), ("young", 30)] {
        let replica = here.open_at(vm, now_s).unwrap();
        replica.write(at(0, 0), &data).unwrap();
    }
    let image = here.all.folder_of("old", key("peer")).join(IMAGE);
    let witness = here.path.join("witness");
    fs::hard_link(&image, &witness).unwrap();
    here.limit(Some(5 << 19), u64::MAX);
    let evicted = here.all.prune(40).unwrap();
    assert_eq!(names(&evicted), ["old"]);
    assert!(!image.exists());
    assert!(fs::read(&witness).unwrap().iter().all(|byte| *byte == 0));

    here.limit(None, 15);
    let held = here.open_at("middle", 20).unwrap();
    assert_eq!(names(&here.all.prune(46).unwrap()), ["young"]);
    drop(held);
    assert_eq!(names(&here.all.prune(46).unwrap()), ["middle"]);
}

/// A replica that grows beyond the budget first evicts others, then breaks; what it had stays.
#[test]
fn growth_is_bounded_by_the_budget() {
    let here = Scratch::new("budget");
    here.limit(Some(80 << 20), u64::MAX);
    let large = layout(50_000);
    let other = here.open_at("other", 10).unwrap();
    other.write(at(0, 0), &vec![3; 512 * PAGE_SIZE]).unwrap();
    drop(other);
    let replica = here.open("vm", "peer", &large).unwrap();
    let chunk = vec![1; 512 * PAGE_SIZE];
    let mut written = 0;
    let error = loop {
        match replica.write(at(0, written), &chunk) {
            Ok(()) => written += 512,
            Err(error) => break error,
        }
        assert!(written < 48_000, "the budget was never met");
    };
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
    assert!(replica.is_broken());
    assert_eq!(names(&here.all.list().unwrap()), ["vm"]);
    assert!(u64::from(written) * 4096 <= (80 << 20) + super::super::replica::BUDGET_LOOK_BYTES);
    assert!(replica.read(at(0, 0), &mut [0; PAGE_SIZE]).is_err());
    drop(replica);
    here.limit(None, u64::MAX);
    let again = here.open("vm", "peer", &large).unwrap();
    assert!(!again.hash_ranges(&SECRET, 2).unwrap().is_zero(0));
}

/// A full disk breaks the replica and nothing else: what was written is there again when there is
/// room, and an attempt that cannot even begin one is told so.
#[test]
fn a_full_disk_breaks_the_replica_alone() {
    let here = Scratch::new("full");
    let Some(_disk) = SmallDisk::mount(&here.path, "2m") else {
        return;
    };
    here.limit(Some(u64::MAX), u64::MAX);
    let layout = layout(2000);
    let replica = here.open("vm", "peer", &layout).unwrap();
    let written = (0..2000)
        .find(|page| replica.write(at(0, *page), &[1; PAGE_SIZE]).is_err())
        .expect("2000 pages do not fit");
    assert!((400..512).contains(&written), "{written}");
    assert!(replica.is_broken());
    let broken = replica.write(at(0, 0), &[2; PAGE_SIZE]).unwrap_err();
    assert_eq!(broken.to_string(), "the replica is broken");
    drop(replica);

    let error = here.open("vm", "peer", &layout).unwrap_err();
    let CheckpointError::LocalFile { cause, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(cause.kind(), io::ErrorKind::StorageFull);
    let image = here.all.folder_of("vm", key("peer")).join(IMAGE);
    let image = OpenOptions::new().write(true).open(image).unwrap();
    image.set_len(300 * PAGE_SIZE as u64).unwrap();
    let again = here.open("vm", "peer", &layout).unwrap();
    let mut page = [0; PAGE_SIZE];
    again.read(at(0, 299), &mut page).unwrap();
    assert_eq!(page, [1; PAGE_SIZE]);
}

/// A replica whose process is killed while it writes is taken up by the next one, and what had been
/// written is there.
#[test]
fn a_killed_writer_leaves_its_pages() {
    const FOLDER: &str = "TEST_KILLED_WRITER_FOLDER";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let here = Checkpoints::new(Path::new(&folder));
        let opening = opening("vm", "peer", 100);
        let replica = here.open(&opening, &layout(2000)).unwrap();
        for round in 1.. {
            for page in 0..2000 {
                let content = [u8::try_from(round % 250 + 1).unwrap(); PAGE_SIZE];
                replica.write(at(0, page), &content).unwrap();
            }
            if round == 1 {
                fs::write(Path::new(&folder).join("begun"), b"").unwrap();
            }
        }
    }
    let here = Scratch::new("killed");
    let mut writer = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::checkpoint::tests::a_killed_writer_leaves_its_pages",
        ])
        .env(FOLDER, &here.path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !here.path.join("begun").exists() {
        assert!(writer.try_wait().unwrap().is_none(), "the writer ended");
        std::thread::yield_now();
    }
    assert!(matches!(
        here.open("vm", "peer", &layout(2000)),
        Err(CheckpointError::LocalInUse(_))
    ));
    writer.kill().unwrap();
    writer.wait().unwrap();
    let replica = here.open("vm", "peer", &layout(2000)).unwrap();
    let hashes = replica.hash_ranges(&SECRET, 2).unwrap();
    let hasher = crate::block::PageHasher::new(&SECRET);
    let mut page = [0; PAGE_SIZE];
    for (address, hash) in (0..4).flat_map(|range| hashes.pages(range)) {
        replica.read(address, &mut page).unwrap();
        assert_ne!(page[0], 0, "{address:?}");
        assert_eq!(hash, hasher.hash(&page), "{address:?}");
    }
}

/// A file system of a few megabytes, gone at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .output()
            .unwrap();
        if mounted.status.success() {
            return Some(Self(at.into()));
        }
        let required = std::env::var_os("REQUIRE_ALL").is_some();
        assert!(!required, "mounting a small file system: {mounted:?}");
        eprintln!("Skipped: a small file system cannot be mounted here");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let mut unmount = std::process::Command::new("umount");
        // Files of a test that failed may be open still.
        assert!(unmount.arg("-l").arg(&self.0).status().unwrap().success());
    }
}

/// A folder of its own for each test, removed at the end.
struct Scratch {
    path: PathBuf,
    all: Checkpoints,
}

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("checkpoints-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let all = Checkpoints::new(&path);
        Self { path, all }
    }

    fn open(
        &self,
        vm: &str,
        peer: &str,
        layout: &Arc<Layout>,
    ) -> Result<ReplicaFile, CheckpointError> {
        self.all.open(&opening(vm, peer, 100), layout)
    }

    fn open_at(&self, vm: &str, now_s: u64) -> Result<ReplicaFile, CheckpointError> {
        self.all.open(&opening(vm, "peer", now_s), &layout(2000))
    }

    fn limit(&self, bytes_max: Option<u64>, age_max_s: u64) {
        let limits = Limits {
            bytes_max,
            age_max_s,
        };
        self.all.set_limits(&limits).unwrap();
        assert_eq!(self.all.limits(), limits);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).unwrap();
    }
}

fn opening(vm: &str, peer: &str, now_s: u64) -> Opening {
    Opening {
        vm: vm.into(),
        peer: key(peer),
        role: Role::Source,
        attempt: "00".into(),
        now_s,
    }
}

fn names(stored: &[Stored]) -> Vec<&str> {
    stored
        .iter()
        .map(|stored| stored.meta.as_ref().unwrap().vm.as_str())
        .collect()
}

fn digests(replica: &ReplicaFile) -> Vec<[u8; 16]> {
    let hashes = replica.hash_ranges(&SECRET, 2).unwrap();
    let key = BasisKey::new(&SECRET);
    (0..hashes.len())
        .map(|range| hashes.digest(range, &NONCE, &key))
        .collect()
}

fn key(name: &str) -> Fingerprint {
    Fingerprint::of_spki(name.as_bytes())
}

fn layout(pages: u32) -> Arc<Layout> {
    let block = |name: &str, pages| BlockSpec {
        name: name.into(),
        pages,
    };
    Arc::new(Layout::new(vec![block("ram", pages), block("rom", 40)]).unwrap())
}

fn at(block: u16, page: u32) -> PageAddress {
    PageAddress {
        block: BlockId(block),
        page,
    }
}
