//! A guest that writes more than its link takes: each policy does what it says, an operator can
//! change and end a running move, and what was done to the guest is undone when it stays.

use std::time::Duration;

use serde_json::json;
use testbed::clock;
use testbed::guest::{Load, Machine};
use testbed::pair::Pair;
use testbed::product::Running;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);
/// 5 MB/s: about 2300 of this guest's pages a second.
const LINK: [&str; 2] = ["--max-bandwidth", "40M"];
const WRITES_PER_S: u32 = 6000;

#[test]
fn a_move_that_does_not_converge() -> anyhow::Result<()> {
    if !(met(&GUESTS)? && met(&[Requirement::Product])?) {
        return Ok(());
    }
    let small = Machine::small();
    let machine = Machine {
        load: Load {
            writes_per_s: WRITES_PER_S,
            ..small.load.clone()
        },
        ..small
    };
    let mut pair = Pair::new("stuck", &machine)?;

    throttled_then_aborted(&pair)?;
    pair.replace_target()?;
    given_up(&pair)?;
    pair.replace_target()?;
    forced_while_it_runs(&pair)?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}

/// The default: QEMU slows the guest, and the line says so; `abort` ends it, and the guest runs
/// at the source at its full speed.
fn throttled_then_aborted(pair: &Pair) -> anyhow::Result<()> {
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&LINK)?;
    clock::wait_until("a throttled guest", MOVE_MAX, || {
        Ok((throttle(pair)? >= 5).then_some(()))
    })?;
    wait_for(&mut send, "guest slowed by")?;
    verb(pair, &["abort", &vm(pair)?])?;
    assert_eq!(send.wait(MOVE_MAX)?, 1, "{}", send.output());
    assert_eq!(receive.wait(MOVE_MAX)?, 1, "{}", receive.output());
    assert!(pair.source.is_running()?);
    assert_eq!(throttle(pair)?, 0, "the throttle stays on");
    Ok(())
}

/// `abort` as policy, and a limit: the move ends with a word about what would do.
fn given_up(pair: &Pair) -> anyhow::Result<()> {
    let more = [&LINK[..], &["--when-stuck", "abort", "--timeout", "5"]].concat();
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&more)?;
    assert_eq!(send.wait(MOVE_MAX)?, 1, "{}", send.output());
    assert_eq!(receive.wait(MOVE_MAX)?, 1, "{}", receive.output());
    assert!(
        send.output().contains("does not converge"),
        "{}",
        send.output()
    );
    assert!(pair.source.is_running()?);
    Ok(())
}

/// A move that waits is told to force the stop: it arrives past what was asked for.
fn forced_while_it_runs(pair: &Pair) -> anyhow::Result<()> {
    let more = [&LINK[..], &["--when-stuck", "wait"]].concat();
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&more)?;
    wait_for(&mut send, "precopy")?;
    let vm = vm(pair)?;
    verb(pair, &["set", &vm, "downtime", "200"])?;
    verb(pair, &["set", &vm, "when-stuck", "force"])?;
    assert_eq!(send.wait(MOVE_MAX)?, 0, "{}", send.output());
    assert_eq!(receive.wait(MOVE_MAX)?, 0, "{}", receive.output());
    assert!(
        send.output().contains("StopForced"),
        "it did not have to be forced:\n{}",
        send.output()
    );
    assert!(pair.target.is_running()?);
    Ok(())
}

/// How much QEMU slows the guest's processors, in percent.
fn throttle(pair: &Pair) -> anyhow::Result<u64> {
    let state = pair.source.monitor().execute("query-migrate", &json!({}))?;
    Ok(state["cpu-throttle-percentage"].as_u64().unwrap_or(0))
}

fn vm(pair: &Pair) -> anyhow::Result<String> {
    let uuid = pair.source.monitor().execute("query-uuid", &json!({}))?;
    Ok(uuid["UUID"].as_str().unwrap_or_default().to_owned())
}

fn wait_for(send: &mut Running, word: &str) -> anyhow::Result<()> {
    clock::wait_until(word, MOVE_MAX, || {
        anyhow::ensure!(
            send.exit_code()?.is_none(),
            "send ended:\n{}",
            send.output()
        );
        Ok(send.output().contains(word).then_some(()))
    })
}

/// A verb at the source's installation that must succeed.
fn verb(pair: &Pair, words: &[&str]) -> anyhow::Result<()> {
    let output = pair.cloud.command(words).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(output.status.success(), "{words:?}: {said}");
    Ok(())
}
