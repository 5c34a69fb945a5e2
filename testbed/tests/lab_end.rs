//! Whatever ends a run, nothing of it is left, and the next one starts clean.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use testbed::clock;
use testbed::pair::TestFolder;
use testbed::requirement::{GUESTS, met};

const PROGRAM: &str = env!("CARGO_BIN_EXE_testbed");
const END_MAX: Duration = Duration::from_secs(20);

/// `kill -9` of the lab's own process in the middle of a move: every process it had started (all of
/// them inherit a word in their environment) ends, with them their namespaces, and the run's files
/// go. A second run then moves its guest.
#[test]
fn a_killed_run_leaves_nothing() -> anyhow::Result<()> {
    if !met(&GUESTS)? {
        return Ok(());
    }
    let results = TestFolder::new("killed-run")?;
    // Hosts have a /tmp of their own, so runs keep their files elsewhere.
    let base = format!("/var/tmp/lab-test-{}", std::process::id());
    let mut lab = start(&results, &base)?;
    let stderr = lab.stderr.take().context("its messages are not a pipe")?;
    let moving = BufReader::new(stderr)
        .lines()
        .map_while(Result::ok)
        .find(|line| line.contains("moving"));
    assert!(moving.is_some(), "the run did not come to the move");
    let started = processes(&base);
    assert!(
        started.len() > 5,
        "three hosts, two QEMUs, an emulator: {started:?}"
    );

    lab.kill()?;
    lab.wait()?;
    clock::wait_until("the end of all processes", END_MAX, || {
        Ok(processes(&base).is_empty().then_some(()))
    })
    .with_context(|| format!("left: {:?}", processes(&base)))?;
    clock::wait_until("the end of the run's files", END_MAX, || {
        Ok((!fs::exists(&base)?).then_some(()))
    })?;

    let again = start(&results, &base)?.wait_with_output()?;
    assert!(
        again.status.success(),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
    clock::wait_until("the end of the second run's files", END_MAX, || {
        Ok((!fs::exists(&base)?).then_some(()))
    })
}

fn start(results: &TestFolder, base: &str) -> anyhow::Result<Child> {
    Command::new(PROGRAM)
        .args(["run", "smoke", "--arm", "qemu-plain", "--resume"])
        .arg(results.path())
        .env("SCALEAWAY_LAB_DIR", base)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the lab")
}

/// Numbers of the processes that have the run's word in their environment.
fn processes(base: &str) -> Vec<u32> {
    let word = format!("SCALEAWAY_LAB_DIR={base}");
    let has_word = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|entry| entry == word.as_bytes())
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(has_word)
        .collect()
}
