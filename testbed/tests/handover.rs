//! The product moves a real guest between two QEMUs, and every byte of its RAM is compared.
//!
//! Both ends run on this machine over loopback; `testbed run` does the same over emulated links.

use std::time::Duration;

use serde_json::json;
use testbed::guest::{Machine, Ram, compare};
use testbed::pair::Pair;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);

fn can_run() -> anyhow::Result<bool> {
    Ok(met(&GUESTS)? && met(&[Requirement::Product])?)
}

/// Moves the guest, leaves both copies stopped, compares all RAM blocks; then lets it run and has it
/// check itself.
fn move_and_compare(pair: &Pair, from_cloud: bool) -> anyhow::Result<()> {
    let (sender, receiver) = match from_cloud {
        true => (&pair.cloud, &pair.client),
        false => (&pair.client, &pair.cloud),
    };
    let before = pair.source.control()?.next()?;
    let mut receive = pair.receive_with(receiver, &["--paused", "--verify", "full"], &[])?;
    let mut send = pair.send_with(sender, &["--keep-source"], &[])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let said = || format!("send:\n{}\nreceive:\n{}", send.output(), receive.output());
    assert_eq!((sent, received), (0, 0), "{}", said());
    assert_eq!(pair.source.monitor().run_state()?, "postmigrate");
    assert_eq!(pair.target.monitor().run_state()?, "paused");

    let comparison = compare(&pair.source, &pair.target)?;
    assert!(
        comparison.pages() >= 160 * 256,
        "{} pages",
        comparison.pages()
    );
    assert_eq!(comparison.left_out, Vec::<String>::new());
    assert_eq!(comparison.differing(), 0, "{comparison:?}\n{}", said());
    assert_eq!(pair.running_max(), 1);

    for verb in ["send", "receive"] {
        let report = pair.report(verb)?;
        assert_eq!(report["schema"], 1, "{report}");
        assert_eq!(report["outcome"], "arrived", "{report}");
    }
    pair.target.monitor().execute("cont", &json!({}))?;
    let control = pair.target.control()?;
    let after = control.next()?;
    assert!(after.count >= before.count, "{after:?} after {before:?}");
    assert_eq!(control.verify()?.errors, 0);
    Ok(())
}

/// 0 differing pages from cloud to client, and back again.
#[test]
fn no_page_differs_there_and_back() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let mut pair = Pair::new("there-and-back", &Machine::small())?;
    move_and_compare(&pair, true)?;
    pair.turn_round()?;
    move_and_compare(&pair, false)
}

/// The same for a guest whose RAM no other process can map.
#[test]
fn no_page_differs_with_private_ram() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new(
        "private-ram",
        &Machine {
            ram: Ram::Plain,
            ..Machine::small()
        },
    )?;
    move_and_compare(&pair, true)
}

/// Without options the guest runs on at the target and its old QEMU ends.
#[test]
fn the_guest_runs_on_and_the_source_ends() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let mut pair = Pair::new("runs-on", &Machine::small())?;
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
    pair.source.wait_exit(Duration::from_secs(10))?;
    assert!(pair.target.is_running()?);
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}

/// A guest that was paused is moved, and stays paused.
#[test]
fn a_paused_guest_stays_paused() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("paused", &Machine::small())?;
    pair.source.monitor().execute("stop", &json!({}))?;
    let mut receive = pair.receive(&["--verify", "full"])?;
    let mut send = pair.send(&["--keep-source"])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(
        (sent, received),
        (0, 0),
        "{}\n{}",
        send.output(),
        receive.output()
    );
    assert_eq!(pair.target.monitor().run_state()?, "paused");
    assert_eq!(compare(&pair.source, &pair.target)?.differing(), 0);
    Ok(())
}

/// A peer that nobody trusts is refused, in words that say how to trust it; the guest runs on.
#[test]
fn an_unknown_peer_is_refused() -> anyhow::Result<()> {
    if !can_run()? {
        return Ok(());
    }
    let pair = Pair::new("unknown", &Machine::small())?;
    let mut forget = pair.client.command(&["trust", "remove", "cloud"]);
    assert!(forget.status()?.success());
    let receive = pair.receive(&[])?;
    let mut send = pair.send(&[])?;
    assert_eq!(send.wait(MOVE_MAX)?, 1, "{}", send.output());
    let said = format!("{}\n{}", send.output(), receive.output());
    assert!(said.contains("scaleaway trust add"), "{said}");
    assert!(pair.source.is_running()?);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}
