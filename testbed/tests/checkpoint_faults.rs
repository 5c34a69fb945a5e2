//! What is kept on disk is never trusted: a torn checkpoint, a full disk and an attempt that was
//! killed cost bytes at most, and a real guest arrives each time with every page in its place.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::clock;
use testbed::guest::{Machine, compare};
use testbed::pair::Pair;
use testbed::product::Product;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);

fn can_run() -> anyhow::Result<bool> {
    Ok(met(&GUESTS)? && met(&[Requirement::Product])?)
}

/// Moves the paused-at-the-end guest and compares all RAM; returns the source's report.
fn move_and_compare(pair: &Pair, from_cloud: bool) -> anyhow::Result<Value> {
    let (sender, receiver): (&Product<'_>, &Product<'_>) = match from_cloud {
        true => (&pair.cloud, &pair.client),
        false => (&pair.client, &pair.cloud),
    };
    let mut receive = pair.receive_with(receiver, &["--paused", "--verify", "full"], &[])?;
    let mut send = pair.send_with(sender, &["--keep-source"], &[])?;
    let ended = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let said = format!("send:\n{}\nreceive:\n{}", send.output(), receive.output());
    assert_eq!(ended, (0, 0), "{said}");
    let comparison = compare(&pair.source, &pair.target)?;
    assert_eq!(comparison.differing(), 0, "{comparison:?}\n{said}");
    assert_eq!(pair.running_max(), 1, "{said}");
    pair.target
        .monitor()
        .execute("cont", &serde_json::json!({}))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    pair.report("send")
}

fn pages(report: &Value, encoding: &str) -> u64 {
    report["bytes_by_encoding"][encoding]["pages"]
        .as_u64()
        .unwrap_or(0)
}

/// The one checkpoint's image in a state dir.
fn image(pair: &Pair, state: &str) -> anyhow::Result<PathBuf> {
    let folder = pair.file(state).join("checkpoints");
    let mut found = Vec::new();
    for vm in fs::read_dir(&folder)?
        .flatten()
        .filter(|vm| vm.path().is_dir())
    {
        for peer in fs::read_dir(vm.path())?.flatten() {
            found.push(peer.path().join("image"));
        }
    }
    ensure!(found.len() == 1, "{found:?}");
    found.pop().context("one")
}

/// S13: bytes that rotted, pages that never reached the disk, a file that was cut: only what both
/// sides still hold is the basis, the rest is sent.
#[test]
fn torn_checkpoint_is_no_basis_where_it_is_torn() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let mut pair = Pair::new("torn", &Machine::small())?;
    move_and_compare(&pair, true)?;
    let path = image(&pair, "cloud-state")?;
    let file = fs::OpenOptions::new().write(true).open(&path)?;
    let bytes = file.metadata()?.len();
    for piece in 0..8 {
        file.write_all_at(&[0xa5; 5000], piece * (bytes / 9) + 777)?;
    }
    file.set_len(bytes * 3 / 4)?;
    pair.turn_round()?;
    let report = move_and_compare(&pair, false)?;
    let (same, literal) = (pages(&report, "same"), pages(&report, "literal"));
    assert!(same > 10_000, "{same} pages were the same: {report}");
    assert!(literal > 100, "the torn ranges were sent: {report}");
    Ok(())
}

/// The checkpoints' disk is full on both sides, right away and in mid-transfer: nothing is kept, the
/// guest arrives.
#[test]
fn full_disk_keeps_nothing_and_loses_nothing() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("full-disk", &Machine::small())?;
    let small = Tmpfs::mount(&pair.file("cloud-state").join("checkpoints"), "3M")?;
    let tiny = Tmpfs::mount(&pair.file("client-state").join("checkpoints"), "64k")?;
    move_and_compare(&pair, true)?;
    drop((small, tiny));
    Ok(())
}

/// Target QEMU dies in mid-transfer: the next attempt starts from what had arrived.
#[test]
fn pages_of_a_failed_attempt_count() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let mut pair = Pair::new("failed", &Machine::small())?;
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&["--max-bandwidth", "30M"])?;
    clock::wait_until("pages at the target", MOVE_MAX, || {
        let bytes = image(&pair, "client-state").and_then(|path| Ok(fs::metadata(path)?.blocks()));
        Ok((bytes.unwrap_or(0) * 512 > 16 << 20).then_some(()))
    })?;
    let pid = Pid::from_raw(pair.target.pid()).context("QEMU is not process 0")?;
    kill_process(pid, Signal::KILL)?;
    assert_eq!(send.wait(MOVE_MAX)?, 1, "{}", send.output());
    assert_eq!(receive.wait(MOVE_MAX)?, 1, "{}", receive.output());
    pair.replace_target()?;
    let report = move_and_compare(&pair, true)?;
    let same = pages(&report, "same");
    let content = pages(&report, "literal") + pages(&report, "raw");
    assert!(same > 2000, "{same} pages were the same: {report}");
    assert!(content > 0, "{report}");
    Ok(())
}

/// A small file system in place of a folder.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(folder: &Path, size: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let options = format!("size={size},mode=0700");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder)
            .status()?;
        ensure!(mounted.success(), "cannot mount a small file system");
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Left mounted it would keep the test's folder.
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}
