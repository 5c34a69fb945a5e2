//! How a move ends whose stop does not come to fit by itself: the session's own rule is asked what it
//! would do, second by second.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use transport::session::{Decision, Observation, Policy, Steering, Stuck, WhenStuck, decide};

/// How a move ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ending {
    /// The guest runs at the target, after a stop as short as asked.
    Arrives,
    /// The same, its processors slowed before.
    Throttled,
    /// The guest runs at the target, after a longer stop than asked.
    Forced,
    /// The guest runs at the target before it has all pages.
    PostCopy,
    /// The guest stays here.
    Stays,
    /// The move goes on for as long as the guest writes as it does now.
    Open,
}

impl Ending {
    /// Whether the guest is stopped here at all.
    pub(crate) fn arrives(self) -> bool {
        !matches!(self, Ending::Stays | Ending::Open)
    }
}

/// A move that does not get on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stall {
    pub(super) policy: Policy,
    /// Since the begin, and rounds so far.
    pub(super) elapsed_s: f64,
    pub(super) rounds: u32,
    /// What no throttle shortens of the stop that the rule sees.
    pub(super) floor_s: f64,
}

/// What the rule sees of a guest that does a part of its writing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    pub(super) stop_s: f64,
    /// It stops the guest by itself.
    pub(super) fits: bool,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Foreseen {
    pub(super) ending: Ending,
    /// Part of its writing that the guest still does at the end.
    pub(super) writing: f64,
    /// From the stall to the end.
    pub(super) more_s: f64,
}

/// The rule looks at a stalled move this often, for a round is about as long.
const ROUND: Duration = Duration::from_secs(1);
/// A move without a limit, whose throttle cannot grow, is given up here after so long.
const OPEN: Duration = Duration::from_secs(3600);

/// Asks the rule. `sight` is what it sees when the guest does a part of its writing.
pub(super) fn foresee(stall: &Stall, sight: &dyn Fn(f64) -> Sight) -> Foreseen {
    let policy = &stall.policy;
    let (mut percent, mut since_throttle) = (0, None);
    let mut more = Duration::ZERO;
    let mut rounds = stall.rounds;
    let (ending, writing) = loop {
        let writing = 1.0 - f64::from(percent) / 100.0;
        let Sight { stop_s, fits } = sight(writing);
        let elapsed = Duration::from_secs_f64(stall.elapsed_s.clamp(0.0, 1e6)) + more;
        let limit_reached = policy.rounds_max.is_some_and(|most| rounds >= most)
            || policy.time_max.is_some_and(|most| elapsed >= most);
        if fits && !limit_reached {
            let ending = match percent {
                0 => Ending::Arrives,
                _ => Ending::Throttled,
            };
            break (ending, writing);
        }
        let stuck = Stuck {
            stop_least: Duration::from_secs_f64(stop_s.clamp(0.0, 1e6)),
            limit_reached,
            throttle_percent: percent,
            since_throttle,
            stop_floor: Duration::from_secs_f64(stall.floor_s.clamp(0.0, 1e6)),
            can_post_copy: true,
        };
        match decide(&seen(stuck), policy) {
            Decision::Throttle(to) => (percent, since_throttle) = (to, Some(Duration::ZERO)),
            Decision::PostCopy => break (Ending::PostCopy, writing),
            Decision::GiveUp => break (Ending::Stays, writing),
            Decision::StopForced => break (Ending::Forced, writing),
            // It looks, and stops at its best moment.
            _ if policy.when_stuck == WhenStuck::Force => break (Ending::Forced, writing),
            Decision::Wait
            | Decision::Refresh
            | Decision::Sync
            | Decision::Arm
            | Decision::Disarm
            | Decision::Stop => {}
        }
        more += ROUND;
        rounds = rounds.saturating_add(1);
        since_throttle = since_throttle.map(|since| since + ROUND);
        if more >= OPEN {
            break (Ending::Open, writing);
        }
    };
    Foreseen {
        ending,
        writing,
        more_s: if ending == Ending::Open {
            0.0
        } else {
            more.as_secs_f64()
        },
    }
}

/// A stalled move as the rule sees one between its looks.
fn seen(stuck: Stuck) -> Observation {
    Observation {
        backlog_pages: u64::from(u32::MAX),
        in_flight_bytes: 0,
        page_cost_bytes: 4096.0,
        rate_bytes_per_s: 1e6,
        rtt: Duration::ZERO,
        since_sync: Duration::ZERO,
        dirty_pages_per_s: None,
        steering: Steering::Held { since_armed: None },
        stuck: Some(stuck),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stall(policy: Policy) -> Stall {
        Stall {
            policy,
            elapsed_s: 40.0,
            rounds: 6,
            floor_s: 0.175,
        }
    }

    fn policy(when_stuck: WhenStuck) -> Policy {
        Policy {
            when_stuck,
            ..Policy::new(Duration::from_millis(300))
        }
    }

    /// A stop of 175 ms and what the guest writes, which takes `writes_s` unslowed.
    fn check(policy: Policy, writes_s: f64, expected: Ending) -> Foreseen {
        let found = foresee(&stall(policy), &|writing| {
            let stop_s = 0.175 + writing * writes_s;
            Sight {
                stop_s,
                fits: stop_s <= 0.3,
            }
        });
        assert_eq!(found.ending, expected, "{policy:?} {writes_s} {found:?}");
        found
    }

    /// Each rule, where the guest writes about a third too much.
    #[test]
    fn every_rule() {
        let found = check(policy(WhenStuck::Throttle), 0.17, Ending::Throttled);
        assert!((0.6..0.75).contains(&found.writing), "{found:?}");
        assert!((4.0..15.0).contains(&found.more_s), "{found:?}");
        check(policy(WhenStuck::Wait), 0.17, Ending::Open);
        check(policy(WhenStuck::Force), 0.17, Ending::Forced);
        check(policy(WhenStuck::Abort), 0.17, Ending::Stays);
        check(policy(WhenStuck::PostCopy), 0.17, Ending::PostCopy);
        check(policy(WhenStuck::Wait), 0.1, Ending::Arrives);
    }

    /// A throttle that may not grow far enough leaves the move open; a limit ends it, and makes `force` stop.
    #[test]
    fn limits() {
        let gentle = Policy {
            throttle_max: 20,
            ..policy(WhenStuck::Throttle)
        };
        check(gentle, 0.17, Ending::Open);
        let timed = Policy {
            time_max: Some(Duration::from_secs(60)),
            ..gentle
        };
        let found = check(timed, 0.17, Ending::Stays);
        assert_eq!(found.more_s, 20.0);
        let rounds = Policy {
            rounds_max: Some(10),
            ..gentle
        };
        assert_eq!(check(rounds, 0.17, Ending::Stays).more_s, 4.0);
        let over = Policy {
            time_max: Some(Duration::from_secs(30)),
            ..policy(WhenStuck::Force)
        };
        assert_eq!(check(over, 0.0, Ending::Forced).more_s, 0.0);
    }

    /// A floor above what is asked is no work for a throttle.
    #[test]
    fn a_floor_above_the_downtime() {
        let far = Stall {
            floor_s: 0.4,
            ..stall(policy(WhenStuck::Throttle))
        };
        let found = foresee(&far, &|_| Sight {
            stop_s: 0.4,
            fits: false,
        });
        assert_eq!(found.ending, Ending::Open);
        assert_eq!(found.writing, 1.0);
    }
}
