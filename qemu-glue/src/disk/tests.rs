//! Images that `qemu-img` and `qemu-io` made, read back and compared with QEMU's own view.

use std::process::Command;

use super::*;

const CLUSTER: u64 = 64 << 10;

/// A chain of raw, qcow2 and qcow2 with data, zero clusters, discarded and compressed clusters in
/// all of them reads as `qemu-img convert` reads it.
#[test]
fn a_chain_reads_as_qemu_reads_it() {
    let here = Scratch::new("chain");
    let base = here.path.join("base.raw");
    let bytes: Vec<u8> = (0..40 * CLUSTER)
        .map(|at| u8::try_from(at / 1000 % 251).unwrap())
        .collect();
    fs::write(&base, &bytes).unwrap();
    here.img("create -q -f qcow2 -b base.raw -F raw mid.qcow2 4M");
    here.io(
        "mid.qcow2",
        &[
            "write -P 7 60k 200k",
            "write -z 1M 128k",
            "write -P 9 3M 4k",
            "discard 512k 64k",
        ],
    );
    here.img("create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 5M");
    here.io(
        "top.qcow2",
        &[
            "write -P 1 0 4k",
            "write -P 2 1100k 4k",
            "write -z 128k 64k",
            "write -P 5 4992k 128k",
        ],
    );
    here.img("convert -O raw top.qcow2 flat.raw");
    let expected = fs::read(here.path.join("flat.raw")).unwrap();

    let image = DiskImage::open(&here.path.join("top.qcow2"), Format::Qcow2).unwrap();
    assert_eq!(image.bytes(), 5 << 20);
    assert_eq!(image.identity().lines().count(), 3);
    let mut found = vec![1; expected.len()];
    image.read(0, &mut found).unwrap();
    assert!(found == expected, "the whole disk");
    for at in [0, 4095, 65_535, 262_143, 1_126_399, 4_194_303] {
        let mut piece = [1; 5000];
        image.read(at as u64, &mut piece).unwrap();
        assert!(piece == expected[at..at + 5000], "at {at}");
    }
    let mut end = [0; 2];
    let error = image.read((5 << 20) - 1, &mut end).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    // Extents cover the disk, and what is called zero is zero.
    let mut at = 0;
    while let Some(extent) = image.extent(at).unwrap() {
        let end = at + extent.bytes;
        if extent.kind == Kind::Zero {
            let part = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
            assert!(
                expected[part].iter().all(|byte| *byte == 0),
                "{at} {extent:?}"
            );
        }
        at = end;
    }
    assert_eq!(at, 5 << 20);
    assert_eq!(image.extent(4 << 20).unwrap().unwrap().kind, Kind::Zero);
}

/// Compressed clusters are told apart and never read as data.
#[test]
fn compressed_clusters_are_packed() {
    let here = Scratch::new("packed");
    fs::write(here.path.join("a.raw"), vec![6; 1 << 20]).unwrap();
    here.img("convert -c -f raw -O qcow2 a.raw a.qcow2");
    here.io("a.qcow2", &["write -P 3 64k 64k"]);
    let image = DiskImage::open(&here.path.join("a.qcow2"), Format::Qcow2).unwrap();
    let kind = |at| image.extent(at).unwrap().unwrap().kind;
    assert_eq!(
        (kind(0), kind(CLUSTER), kind(2 * CLUSTER)),
        (Kind::Packed, Kind::Data, Kind::Packed)
    );
    let mut page = [0; 4096];
    let error = image.read(0, &mut page).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    image.read(CLUSTER, &mut page).unwrap();
    assert_eq!(page, [3; 4096]);
}

/// Each thing that is not read has its own refusal.
#[test]
fn what_is_not_supported_is_refused() {
    let here = Scratch::new("refused");
    let open = |name: &str, format| DiskImage::open(&here.path.join(name), format).unwrap_err();
    assert!(matches!(
        open("none", Format::Raw),
        DiskError::LocalFile { .. }
    ));
    assert!(matches!(
        open(".", Format::Raw),
        DiskError::UnsupportedFile(_)
    ));
    fs::write(here.path.join("text"), "no image").unwrap();
    assert!(matches!(
        open("text", Format::Qcow2),
        DiskError::ImageDamaged { .. }
    ));
    here.img("create -q -f qcow2 -o extended_l2=on sub 1M");
    here.img("create -q -f qcow2 -o data_file=d.raw data 1M");
    here.img("create -q -f qcow2 -o cluster_size=512 tiny 1M");
    here.img("create -q -f qcow2 -u -b nbd://h/x -F raw net 1M");
    for (one, other) in [("ring", "back"), ("back", "ring")] {
        here.img(&format!(
            "create -q -f qcow2 -u -b {other} -F qcow2 {one} 1M"
        ));
    }
    for name in ["sub", "data", "tiny", "net"] {
        assert!(
            matches!(
                open(name, Format::Qcow2),
                DiskError::UnsupportedFeature { .. }
            ),
            "{name}"
        );
    }
    assert!(matches!(
        open("ring", Format::Qcow2),
        DiskError::ImageChain(_)
    ));
}

/// Random damage to the metadata never panics, loops or takes memory without limit.
#[test]
fn damaged_metadata_is_survived() {
    let here = Scratch::new("damaged");
    here.img("create -q -f qcow2 a.qcow2 64M");
    here.io("a.qcow2", &["write -P 3 0 1M", "write -P 4 32M 64k"]);
    let good = fs::read(here.path.join("a.qcow2")).unwrap();
    let path = here.path.join("b.qcow2");
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..2000 {
        let mut bad = good.clone();
        for _ in 0..1 + round % 4 {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            // Header, first table, second tables: the first five clusters.
            let reach = if round % 2 == 0 { 112 } else { 5 * CLUSTER };
            let at = usize::try_from((seed >> 20) % reach).unwrap();
            bad[at] = u8::try_from(seed >> 56).unwrap();
        }
        fs::write(&path, &bad).unwrap();
        let Ok(image) = DiskImage::open(&path, Format::Qcow2) else {
            continue;
        };
        let mut at = 0;
        let mut page = [0; 4096];
        for _ in 0..64 {
            let Ok(Some(extent)) = image.extent(at) else {
                break;
            };
            assert!(extent.bytes > 0);
            image.read(at, &mut page).unwrap_or_default();
            at += extent.bytes;
        }
    }
}

/// A folder of its own for each test, removed at the end.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("disk-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self { path }
    }

    fn run(&self, program: &str, args: &[&str]) {
        let done = Command::new(program)
            .args(args)
            .current_dir(&self.path)
            .output()
            .expect("qemu-utils is installed");
        assert!(done.status.success(), "{program} {args:?}: {done:?}");
    }

    fn img(&self, words: &str) {
        let args: Vec<&str> = words.split(' ').collect();
        self.run("qemu-img", &args);
    }

    fn io(&self, image: &str, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2"];
        for command in commands {
            args.extend(["-c", *command]);
        }
        args.push(image);
        self.run("qemu-io", &args);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).unwrap();
    }
}
