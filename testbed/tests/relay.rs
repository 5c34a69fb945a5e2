//! A stream that cannot be parsed is relayed byte for byte, with the same gate (S4).

use std::time::Duration;

use serde_json::json;
use testbed::guest::{Machine, compare};
use testbed::pair::Pair;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);

/// A virtio-mem device puts a section that nobody here knows before the first page: both sides say
/// that they relay, the guest arrives with every page, and its source ends in `postmigrate` only
/// after the target has loaded.
#[test]
fn s4_an_unknown_section_makes_a_relay() -> anyhow::Result<()> {
    if !(met(&GUESTS)? && met(&[Requirement::Product])?) {
        return Ok(());
    }
    let machine = Machine {
        virtio_mem: true,
        // Space for the tables of what it may be given.
        memory_mib: 256,
        ..Machine::small()
    };
    let pair = Pair::new("relay", &machine)?;
    let mut receive = pair.receive(&["--paused", "--verify", "sample"])?;
    let mut send = pair.send(&["--keep-source"])?;
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let said = format!("send:\n{}\nreceive:\n{}", send.output(), receive.output());
    assert_eq!((sent, received), (0, 0), "{said}");
    for output in [send.output(), receive.output()] {
        assert!(output.contains("byte for byte"), "{said}");
    }
    assert_eq!(pair.source.monitor().run_state()?, "postmigrate");
    let comparison = compare(&pair.source, &pair.target)?;
    assert_eq!(comparison.differing(), 0, "{comparison:?}\n{said}");
    assert_eq!(pair.running_max(), 1);
    pair.target.monitor().execute("cont", &json!({}))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0);
    Ok(())
}
