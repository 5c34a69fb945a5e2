//! The model on guests and links whose figures are known.

use super::*;
use std::time::Duration;
use transport::session::WhenStuck;

fn inputs() -> Inputs {
    Inputs {
        pages_total: 262_144.0,
        costs: Costs {
            zero_share: 0.5,
            content_share: 0.5,
            bytes_per_page: 800.0,
            again_bytes_per_page: 2_100.0,
            hot_bytes_per_page: 300.0,
            core_bytes_per_s: 300e6,
            ..Costs::default()
        },
        dirtying: Dirtying {
            hot: 200.0,
            pages_per_s: 1_000.0,
            working_set: 65_536.0,
        },
        rate_bytes_per_s: 11.5e6,
        rtt_s: 0.05,
        wire_per_byte: 1.08,
        cores: 2.0,
        load: 0.5,
        policy: Policy::new(Duration::from_millis(300)),
        learned: Learned::default(),
    }
}

fn middle(inputs: &Inputs) -> Middle {
    predict(inputs).middle
}

/// A slower link, more content, more writing or a longer way never make a move shorter.
#[test]
fn worse_is_never_faster() {
    for step in 1..30 {
        let worse = 1.0 + f64::from(step) / 10.0;
        let before = 1.0 + f64::from(step - 1) / 10.0;
        let check = |change: &dyn Fn(&mut Inputs, f64)| {
            let (mut less, mut more) = (inputs(), inputs());
            change(&mut less, before);
            change(&mut more, worse);
            let (less, more) = (middle(&less), middle(&more));
            // The rule of the session calls a longer link drained a little earlier.
            assert!(less.total_ms <= more.total_ms * 1.02, "{less:?} {more:?}");
        };
        check(&|inputs, by| inputs.rate_bytes_per_s /= by);
        check(&|inputs, by| inputs.costs.bytes_per_page *= by);
        check(&|inputs, by| inputs.rtt_s *= by);
        check(&|inputs, by| inputs.load = by);
        check(&|inputs, by| inputs.dirtying.pages_per_s *= by.min(2.5));
    }
}

/// Ranges hold their middle and are at most twice as high as low.
#[test]
fn ranges_are_at_most_twice_as_wide() {
    let seen = predict(&inputs());
    let check = |range: Range, middle: f64| {
        let (low, high) = (range.low as f64, range.high as f64);
        assert!(low <= middle && middle <= high, "{range:?} {middle}");
        assert!(high <= 2.0 * low, "{range:?}");
    };
    check(seen.total_ms, seen.middle.total_ms);
    check(seen.downtime_ms, seen.middle.downtime_ms);
    check(seen.wire_bytes, seen.middle.wire_bytes);
}

/// A guest at rest costs its content once, and stops for the fixed part and the round trips.
#[test]
fn a_guest_at_rest() {
    let mut quiet = inputs();
    quiet.dirtying = Dirtying::default();
    let seen = predict(&quiet);
    let bytes = 262_144.0 * 800.0;
    assert_eq!(seen.converges, Converges::Yes);
    assert!((seen.middle.wire_bytes / (bytes * 1.08) - 1.0).abs() < 0.01);
    assert!(
        (seen.middle.total_ms / (bytes / 11.5e6 * 1e3) - 1.0).abs() < 0.1,
        "{seen:?}"
    );
    assert!(
        (190.0..260.0).contains(&seen.middle.downtime_ms),
        "{seen:?}"
    );
}

/// A guest that writes faster than the link takes does not converge; one with many hot pages does with
/// the budget that is named.
#[test]
fn a_guest_that_writes_too_fast() {
    let mut fast = inputs();
    fast.dirtying.pages_per_s = 20_000.0;
    let seen = predict(&fast);
    assert_eq!(seen.converges, Converges::No);
    let needed = seen.downtime_needed_ms.expect("a long stop would do");
    assert!(needed > 2000, "{seen:?}");
    assert_eq!(seen.ends, Ending::Open, "{seen:?}");
    fast.policy.downtime = Duration::from_millis(needed * 3 / 2);
    let patient = predict(&fast);
    assert_eq!(patient.ends, Ending::Arrives, "{patient:?}");
    assert_eq!(patient.converges, Converges::Yes, "{patient:?}");
    let mut hot = inputs();
    hot.dirtying.hot = 40_000.0;
    let seen = predict(&hot);
    assert_eq!(seen.converges, Converges::No);
    let needed = seen.downtime_needed_ms.expect("the link takes the rest");
    assert!(needed > 400, "{seen:?}");
    hot.policy.downtime = Duration::from_millis(needed * 3 / 2);
    assert_eq!(predict(&hot).converges, Converges::Yes);
}

/// The same guest by each rule: what is sent before the stall is the same, what follows differs.
#[test]
fn every_rule_has_its_end() {
    let mut fast = inputs();
    fast.dirtying.pages_per_s = 20_000.0;
    let end = |when_stuck, time_max: Option<u64>| {
        let mut asked = fast.clone();
        asked.policy.when_stuck = when_stuck;
        asked.policy.time_max = time_max.map(Duration::from_secs);
        predict(&asked)
    };
    let abort = end(WhenStuck::Abort, None);
    let force = end(WhenStuck::Force, None);
    let post_copy = end(WhenStuck::PostCopy, None);
    assert_eq!(abort.ends, Ending::Stays);
    assert_eq!(abort.middle.downtime_ms, 0.0);
    assert_eq!(force.ends, Ending::Forced);
    assert!(force.middle.downtime_ms > 400.0, "{force:?}");
    assert_eq!(post_copy.ends, Ending::PostCopy);
    assert!(post_copy.middle.downtime_ms < 300.0, "{post_copy:?}");
    assert!(
        abort.middle.total_ms < post_copy.middle.total_ms,
        "{post_copy:?}"
    );
    assert_eq!(end(WhenStuck::Throttle, None).ends, Ending::Open);
    let wait = end(WhenStuck::Wait, None);
    assert_eq!(wait.ends, Ending::Open);
    let late = end(WhenStuck::Wait, Some(400));
    assert_eq!(late.ends, Ending::Stays);
    assert!(late.middle.total_ms >= 400_000.0, "{late:?}");
    assert!(
        late.middle.wire_bytes > wait.middle.wire_bytes,
        "{late:?} {wait:?}"
    );
    // A throttle of up to a half helps where the guest writes half as much too fast, and takes its time.
    fast.dirtying.pages_per_s = 8_000.0;
    let force = predict(&Inputs {
        policy: Policy {
            when_stuck: WhenStuck::Force,
            ..fast.policy
        },
        ..fast.clone()
    });
    let slowed = predict(&fast);
    assert_eq!(slowed.ends, Ending::Throttled);
    assert!((30..=50).contains(&slowed.throttle_percent), "{slowed:?}");
    assert!(slowed.middle.total_ms > force.middle.total_ms, "{slowed:?}");
    assert!(slowed.middle.downtime_ms < 300.0, "{slowed:?}");
    // A limit ends a move that would have converged.
    let mut slow = inputs();
    slow.policy.time_max = Some(Duration::from_secs(5));
    let short = predict(&slow);
    assert_eq!(short.ends, Ending::Stays);
    assert!((short.middle.total_ms - 5_000.0).abs() < 1.0, "{short:?}");
    assert!(short.middle.wire_bytes < predict(&inputs()).middle.wire_bytes);
}

/// What was learned moves and narrows the ranges.
#[test]
fn learned_factors() {
    let mut again = inputs();
    again.learned = Learned {
        moves: 8,
        total: 1.5,
        downtime: 1.0,
        wire: 1.0,
        spread: 1.44,
    };
    let (plain, seen) = (predict(&inputs()), predict(&again));
    assert_eq!(plain.middle, seen.middle);
    let high = plain.middle.total_ms * 1.5 * 1.2;
    assert!((seen.total_ms.high as f64 - high).abs() < 2.0, "{seen:?}");
}
