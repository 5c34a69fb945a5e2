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
        let opening = Opening {
            vm: vm.into(),
            peer: key(peer),
            role: Role::Source,
            attempt: "00".into(),
            now_s: 100,
        };
        self.all.open(&opening, layout)
    }

    fn open_at(&self, vm: &str, now_s: u64) -> Result<ReplicaFile, CheckpointError> {
        let opening = Opening {
            vm: vm.into(),
            peer: key("peer"),
            role: Role::Target,
            attempt: "00".into(),
            now_s,
        };
        self.all.open(&opening, &layout(2000))
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
