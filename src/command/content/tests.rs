//! The verbs on a state dir of their own, with images that `qemu-img` made.

use std::fs;
use std::process::Command;

use super::*;
use crate::state_dir::tests::Scratch;
use crate::trust::Peer;

const SECRET: [u8; 32] = [3; 32];

/// A qcow2 image over a base is known content, all of its chain; a change to the base is seen.
#[test]
fn a_chain_is_shared_and_its_base_watched() {
    let here = Scratch::new("content");
    let state = StateDir::at(&here.0.join("state")).unwrap();
    let key = Fingerprint::of_spki(b"cloud");
    let peer = Peer {
        name: "cloud".into(),
        fingerprint: key,
        address: None,
    };
    Trust::load(&state).unwrap().add(peer).unwrap();
    let (base, top) = (here.0.join("base.raw"), here.0.join("top.qcow2"));
    fs::write(&base, [[1; 4096], [2; 4096]].concat()).unwrap();
    let image = format!("create -q -f qcow2 -b {} -F raw", base.display());
    run_program(
        "qemu-img",
        &image
            .split(' ')
            .chain([top.to_str().unwrap(), "1M"])
            .collect::<Vec<_>>(),
    );
    run_program(
        "qemu-io",
        &[
            "-c",
            "write -P 7 512k 8k",
            "-f",
            "qcow2",
            top.to_str().unwrap(),
        ],
    );
    add(&state, &top, &["cloud".into()], None).unwrap();

    let index = open_index(&state, key, &SECRET).unwrap();
    let find = |index: &transport::store::ContentIndex, byte: u8| {
        let hash = blake3::keyed_hash(&SECRET, &[byte; 4096]);
        index.lookup(hash.as_bytes().first_chunk().unwrap())
    };
    // The cluster of 64 KiB that holds the written bytes is copied whole, the rest of it zero.
    let found = [1, 2, 7, 9].map(|byte| find(&index, byte));
    assert_eq!(found, [Some(0), Some(1), Some(128), None]);
    let mut page = [0; 4096];
    index.read(128, &mut page).unwrap();
    assert_eq!(page, [7; 4096]);

    fs::write(&base, [[1; 4096], [9; 4096]].concat()).unwrap();
    assert_eq!(find(&index, 2), None, "S13: read again before it is named");
    let index = open_index(&state, key, &SECRET).unwrap();
    let found = [1, 2, 7, 9].map(|byte| find(&index, byte));
    assert_eq!(found, [Some(0), None, Some(128), Some(1)]);

    remove(&state, &top, &["cloud".into()]).unwrap();
    assert_eq!(open_index(&state, key, &SECRET).unwrap().known_pages(), 0);
    let again = remove(&state, &top, &[]).unwrap_err().to_string();
    assert!(again.ends_with("is not shared"), "{again}");
}

/// Wrong use is told before anything is changed.
#[test]
fn wrong_use_is_refused() {
    let here = Scratch::new("content-use");
    let state = StateDir::at(&here.0.join("state")).unwrap();
    let disk = here.0.join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let stranger = Fingerprint::of_spki(b"stranger").to_string();
    let check = |path: &Path, peers: &[&str], format, expected: &str| {
        let peers: Vec<String> = peers.iter().map(|peer| (*peer).to_owned()).collect();
        let error = format!("{:#}", add(&state, path, &peers, format).unwrap_err());
        assert!(error.contains(expected), "{error}");
    };
    check(&disk, &[&stranger], None, "say --format");
    check(&disk, &["nobody"], Some("raw"), "trust add nobody");
    check(&disk, &[&stranger, &stranger], Some("raw"), "named twice");
    check(&disk, &[&stranger], Some("qcow2"), "no qcow2 image");
    check(
        &here.0.join("none"),
        &[&stranger],
        Some("raw"),
        "No such file",
    );
    assert!(Shares::load(state.path()).unwrap().all().is_empty());
}

fn run_program(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().unwrap();
    assert!(done.status.success(), "{program} {args:?}: {done:?}");
}
