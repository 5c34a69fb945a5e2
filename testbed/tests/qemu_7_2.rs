//! A live migration between two QEMUs of 7.2, which knows neither switchover-ack nor mapped-ram.
//!
//! `make test-qemu-7.2` unpacks Debian 12's own packages and names their program in `QEMU_7_2`.

use std::time::Duration;

use anyhow::Context;
use testbed::guest::{Machine, compare};
use testbed::pair::Pair;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);

#[test]
#[ignore = "it needs an unpacked QEMU 7.2: make test-qemu-7.2"]
fn a_running_guest_moves_from_7_2_to_7_2() -> anyhow::Result<()> {
    if !(met(&GUESTS)? && met(&[Requirement::Product])?) {
        return Ok(());
    }
    let qemu = std::env::var_os("QEMU_7_2").context("set QEMU_7_2 to the program of QEMU 7.2")?;
    let machine = Machine {
        qemu: qemu.into(),
        ..Machine::small()
    };
    let pair = Pair::booted("qemu-7-2", &machine)?;
    let version = pair
        .source
        .monitor()
        .execute("query-version", &serde_json::json!({}))?;
    assert_eq!(
        (
            version["qemu"]["major"].as_u64(),
            version["qemu"]["minor"].as_u64()
        ),
        (Some(7), Some(2))
    );

    let mut receive = pair.receive(&["--paused", "--verify", "full"])?;
    let mut send = pair.send(&["--keep-source"])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(
        (sent, received),
        (0, 0),
        "{}\n{}",
        send.output(),
        receive.output()
    );
    let comparison = compare(&pair.source, &pair.target)?;
    assert!(comparison.pages() >= 160 * 256, "{comparison:?}");
    assert_eq!(comparison.differing(), 0, "{comparison:?}");
    pair.target
        .monitor()
        .execute("cont", &serde_json::json!({}))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    assert_eq!(pair.running_max(), 1);
    Ok(())
}
