//! Whoever dies before the point of no return: the guest runs on at the source, and a second try
//! succeeds.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use testbed::clock;
use testbed::guest::Machine;
use testbed::pair::Pair;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);
/// Slow enough that pre-copy lasts for many seconds.
const SLOW: [&str; 2] = ["--max-bandwidth", "20M"];
/// So much must have been sent when the fault comes.
const SENT_MIN_BYTES: u64 = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Send,
    Receive,
    TargetQemu,
}

/// Kills a part in pre-copy, then looks at the guest, settles what is unsettled, and tries again.
fn check(name: &str, victim: Victim) -> anyhow::Result<()> {
    if !(met(&GUESTS)? && met(&[Requirement::Product])?) {
        return Ok(());
    }
    let mut pair = Pair::new(name, &Machine::small())?;
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&SLOW)?;
    wait_for_precopy(&pair)?;
    match victim {
        Victim::Send => send.kill(),
        Victim::Receive => receive.kill(),
        Victim::TargetQemu => {
            let pid = Pid::from_raw(pair.target.pid()).expect("QEMU is not process 0");
            kill_process(pid, Signal::KILL)?;
        }
    }
    // Whoever is left notices by itself and says that the guest is still at the source.
    if victim != Victim::Send {
        assert_eq!(send.wait(MOVE_MAX)?, 1, "{}", send.output());
    }
    if victim != Victim::Receive {
        assert_eq!(receive.wait(MOVE_MAX)?, 1, "{}", receive.output());
        // S3: no loaded copy survives an abort.
        pair.target.wait_exit(Duration::from_secs(10))?;
    }
    guest_is_well_at_source(&pair)?;
    settle(&pair)?;
    guest_is_well_at_source(&pair)?;

    pair.replace_target()?;
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&[])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(
        (sent, received),
        (0, 0),
        "{}\n{}",
        send.output(),
        receive.output()
    );
    assert!(pair.target.is_running()?);
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}

#[test]
fn send_is_killed() -> anyhow::Result<()> {
    check("kill-send", Victim::Send)
}

#[test]
fn receive_is_killed() -> anyhow::Result<()> {
    check("kill-receive", Victim::Receive)
}

#[test]
fn target_qemu_is_killed() -> anyhow::Result<()> {
    check("kill-target", Victim::TargetQemu)
}

/// QEMU itself says how much it has handed out.
fn wait_for_precopy(pair: &Pair) -> anyhow::Result<()> {
    clock::wait_until("the first pages", MOVE_MAX, || {
        let state = pair
            .source
            .monitor()
            .execute("query-migrate", &serde_json::json!({}))?;
        let sent = state["ram"]["transferred"].as_u64().unwrap_or(0);
        Ok((state["status"] == "active" && sent > SENT_MIN_BYTES).then_some(()))
    })
}

fn guest_is_well_at_source(pair: &Pair) -> anyhow::Result<()> {
    let running = clock::wait_until("the guest at the source", Duration::from_secs(10), || {
        Ok(pair.source.is_running()?.then_some(()))
    });
    running?;
    let control = pair.source.control()?;
    control.next()?;
    assert_eq!(control.verify()?.errors, 0);
    Ok(())
}

/// Does what `status` advises, as a user would after an agent was killed.
fn settle(pair: &Pair) -> anyhow::Result<()> {
    for (product, side) in [(&pair.cloud, "--here"), (&pair.client, "--there")] {
        let status = product.status()?;
        for vm in status.as_array().into_iter().flatten() {
            if vm["settled"] == true {
                continue;
            }
            let name = vm["vm"].as_str().unwrap_or_default();
            let output = product.command(&["resolve", name, side]).output()?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "resolve {side}: {said}");
        }
    }
    Ok(())
}
