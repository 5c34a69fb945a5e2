//! What the product writes down on the way is what the lab's charts read.

use std::time::Duration;

use testbed::guest::Machine;
use testbed::pair::Pair;
use testbed::report::Trace;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(60);

/// A small guest moves with a trace: time never runs backwards, the backlog and the rate are known,
/// and the stop comes before the guest runs again.
#[test]
fn a_move_leaves_a_trace() -> anyhow::Result<()> {
    if !(met(&GUESTS)? && met(&[Requirement::Product])?) {
        return Ok(());
    }
    let pair = Pair::booted("trace", &Machine::small())?;
    let path = pair.file("trace.jsonl");
    let mut receive = pair.receive(&[])?;
    let mut send = pair.send(&["--trace", &path.display().to_string()])?;
    assert_eq!(send.wait(MOVE_MAX)?, 0, "{}", send.output());
    assert_eq!(receive.wait(MOVE_MAX)?, 0, "{}", receive.output());

    let trace = Trace::read(&path)?;
    let when = |name: &str| {
        let event = trace.events.iter().find(|event| event.event == name);
        event.map(|event| event.t_ms)
    };
    let (stopped, running) = (when("stopped"), when("running"));
    assert!(stopped.is_some() && stopped < running, "{:?}", trace.events);
    let points = &trace.points;
    assert!(points.windows(2).all(|pair| pair[0].t_ms <= pair[1].t_ms));
    assert!(points.iter().all(|point| point.phase.is_some()));
    for (name, is_known) in [
        (
            "rate",
            points.iter().any(|point| point.rate_bps > Some(0.0)),
        ),
        (
            "backlog",
            points.iter().any(|point| point.backlog_bytes > Some(0.0)),
        ),
        ("round", points.iter().any(|point| point.round.is_some())),
        (
            "throttle",
            points
                .iter()
                .any(|point| point.throttle_percent == Some(0.0)),
        ),
    ] {
        assert!(is_known, "{name} is in no point: {points:?}");
    }
    Ok(())
}
