//! A guest that never fits the wanted downtime is moved by post-copy: it runs at the target while its
//! last pages are at the source.

use std::time::Duration;

use serde_json::{Value, json};
use testbed::guest::{Load, Machine, compare};
use testbed::pair::Pair;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);
/// No stop fits that, and the link is slow enough that much is left behind.
const STUCK: [&str; 6] = [
    "--when-stuck",
    "post-copy",
    "--downtime",
    "1",
    "--max-bandwidth",
    "60M",
];

/// Faster than 40 Mbit/s take: seconds of pages are left behind.
const WRITES_PER_S: u32 = 6000;

fn can_run() -> anyhow::Result<bool> {
    Ok(met(&GUESTS)? && met(&[Requirement::Product])?)
}

/// The guest never runs at the target, so both copies can be compared when all pages are there.
#[test]
fn every_page_is_the_sources() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("pc-pages", &Machine::small())?;
    let mut receive = pair.receive(&["--paused", "--verify", "full"])?;
    let words = [&STUCK[..], &["--keep-source"]].concat();
    let mut send = pair.send_with(&pair.cloud, &words, &[])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let said = || format!("send:\n{}\nreceive:\n{}", send.output(), receive.output());
    assert_eq!((sent, received), (0, 0), "{}", said());
    assert_eq!(pair.target.monitor().run_state()?, "paused");
    assert!(post_copy(&pair)?["pages"].as_u64() > Some(0), "{}", said());
    let comparison = compare(&pair.source, &pair.target)?;
    assert!(
        comparison.pages() >= 160 * 256,
        "{} pages",
        comparison.pages()
    );
    assert_eq!(comparison.differing(), 0, "{comparison:?}\n{}", said());
    pair.target.monitor().execute("cont", &json!({}))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    Ok(())
}

/// The guest runs on at once, finds every page right, and its old QEMU ends only when it has all.
#[test]
fn the_guest_runs_before_its_pages() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let mut pair = Pair::new("pc-runs", &Machine::small())?;
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send_with(&pair.cloud, &STUCK, &[])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let said = || format!("send:\n{}\nreceive:\n{}", send.output(), receive.output());
    assert_eq!((sent, received), (0, 0), "{}", said());
    pair.source.wait_exit(Duration::from_secs(10))?;
    assert!(pair.target.is_running()?);
    assert_eq!(pair.target.control()?.verify()?.errors, 0, "{}", said());
    assert_eq!(pair.running_max(), 1);
    let report = post_copy(&pair)?;
    assert!(report["faults"].as_u64() > Some(0), "{report}\n{}", said());
    assert!(report["fault_ms"]["p50"].as_f64() > Some(0.0), "{report}");
    Ok(())
}

fn post_copy(pair: &Pair) -> anyhow::Result<Value> {
    Ok(pair.report("receive")?["post_copy"].clone())
}

/// `send` is killed when it hears that the guest runs: its QEMU holds the pages, and `resolve` sends them.
#[test]
fn send_is_killed_after_run() -> anyhow::Result<()> {
    killed("pc-send", "source-before-retire")
}

/// `receive` is killed when the guest runs: its QEMU, whose main loop may wait for a page, is brought
/// the rest by `resolve`.
#[test]
fn receive_is_killed_after_run() -> anyhow::Result<()> {
    killed("pc-receive", "target-after-running")
}

/// `receive` is killed when `cont` has run, and before anybody has heard of it.
#[test]
fn receive_is_killed_after_cont() -> anyhow::Result<()> {
    killed("pc-cont", "target-after-cont")
}

/// `receive` is killed when it has accepted Commit, before `cont`.
#[test]
fn receive_is_killed_after_commit() -> anyhow::Result<()> {
    killed("pc-commit", "target-after-committed")
}

fn killed(name: &str, point: &str) -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let small = Machine::small();
    let busy = Load {
        writes_per_s: WRITES_PER_S,
        ..small.load.clone()
    };
    let mut pair = Pair::new(
        name,
        &Machine {
            load: busy,
            ..small
        },
    )?;
    let fault = [("SCALEAWAY_FAULT", point)];
    let source_dies = point.starts_with("source-");
    let (at_source, at_target) = match source_dies {
        true => (&fault[..], &[][..]),
        false => (&[][..], &fault[..]),
    };
    let mut receive = pair.receive_with(&pair.client, &[], at_target)?;
    let slower = [&STUCK[..4], &["--max-bandwidth", "40M"]].concat();
    let mut send = pair.send_with(&pair.cloud, &slower, at_source)?;
    let (victim, survivor, died, way) = match source_dies {
        true => (&mut send, &mut receive, &pair.cloud, "--to"),
        false => (&mut receive, &mut send, &pair.client, "--listen"),
    };
    assert_eq!(victim.wait(MOVE_MAX)?, -1, "{}", victim.output());
    let status = died.status()?;
    assert_eq!(status[0]["settled"], false, "{status}");
    let vm = status[0]["vm"].as_str().unwrap_or_default().to_owned();
    let resolved = died
        .command(&["resolve", &vm, way, &pair.address()])
        .output()?;
    let story = String::from_utf8_lossy(&resolved.stderr).into_owned();
    assert!(resolved.status.success(), "{story}\n{}", survivor.output());
    assert_eq!(
        survivor.wait(MOVE_MAX)?,
        0,
        "{story}\n{}",
        survivor.output()
    );
    pair.source.wait_exit(Duration::from_secs(10))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0, "{story}");
    assert_eq!(pair.running_max(), 1);
    for product in [&pair.cloud, &pair.client] {
        assert_eq!(product.status()?[0]["settled"], true);
    }
    Ok(())
}
