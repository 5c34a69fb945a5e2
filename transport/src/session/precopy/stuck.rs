//! What is done when what is left does not shrink any more, or when a limit is reached.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{Decision, Policy};

/// `--when-stuck`: what to do when the guest dirties as fast as the link takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenStuck {
    /// Go on until it fits, or until a limit.
    Wait,
    /// Slow the guest's processors step by step, up to a limit; then wait.
    Throttle,
    /// Run the guest at the target at once, send what is left behind it.
    PostCopy,
    /// Stop the guest at the best moment, longer than asked for.
    Force,
    /// End the move; the guest stays.
    Abort,
}

impl WhenStuck {
    const NAMES: [(&'static str, WhenStuck); 5] = [
        ("wait", WhenStuck::Wait),
        ("throttle", WhenStuck::Throttle),
        ("post-copy", WhenStuck::PostCopy),
        ("force", WhenStuck::Force),
        ("abort", WhenStuck::Abort),
    ];
}

impl fmt::Display for WhenStuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, known)| known == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

/// The text names none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("when stuck, a move can wait, throttle, post-copy, force or abort")]
pub struct WhenStuckError;

impl FromStr for WhenStuck {
    type Err = WhenStuckError;

    fn from_str(text: &str) -> Result<Self, WhenStuckError> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text);
        known.map(|(_, known)| *known).ok_or(WhenStuckError)
    }
}

/// A move that does not get on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stuck {
    /// Shortest stop that was in sight lately.
    pub stop_least: Duration,
    /// `--max-rounds` or `--timeout` is over.
    pub limit_reached: bool,
    /// How much the guest is slowed now, in percent.
    pub throttle_percent: u8,
    /// Since that was last changed; `None`: never.
    pub since_throttle: Option<Duration>,
    /// What no throttle shortens: round trips and the fixed part.
    pub stop_floor: Duration,
    /// Whether the target can run the guest before it has all pages.
    pub can_post_copy: bool,
}

/// QEMU takes two syncs that are a second apart to change its throttle, and what it brings shows a
/// round later.
const THROTTLE_EVERY: Duration = Duration::from_secs(4);
/// First step and the steps after it, in percent of the processors' time.
const THROTTLE_STEP: u8 = 10;

/// What a stuck move does; `None`: it goes on as before.
pub(super) fn decide(stuck: &Stuck, policy: &Policy) -> Option<Decision> {
    match policy.when_stuck {
        WhenStuck::PostCopy if stuck.can_post_copy => Some(Decision::PostCopy),
        WhenStuck::Abort => Some(Decision::GiveUp),
        WhenStuck::Force if stuck.limit_reached => Some(Decision::StopForced),
        WhenStuck::Force => None,
        WhenStuck::Wait | WhenStuck::Throttle | WhenStuck::PostCopy if stuck.limit_reached => {
            Some(Decision::GiveUp)
        }
        WhenStuck::Wait => None,
        WhenStuck::Throttle | WhenStuck::PostCopy => throttle(stuck, policy),
    }
}

fn throttle(stuck: &Stuck, policy: &Policy) -> Option<Decision> {
    let is_early = stuck
        .since_throttle
        .is_some_and(|since| since < THROTTLE_EVERY);
    let helps = stuck.stop_floor < policy.downtime;
    if is_early || !helps || stuck.throttle_percent >= policy.throttle_max {
        return None;
    }
    Some(Decision::Throttle(step(stuck, policy)))
}

/// The further off, the larger the step: a stop of twice the wanted length asks for two.
fn step(stuck: &Stuck, policy: &Policy) -> u8 {
    let wanted = policy.downtime.max(Duration::from_millis(1));
    let steps = (stuck.stop_least.as_millis() / wanted.as_millis().max(1)).clamp(1, 3);
    let more = THROTTLE_STEP * u8::try_from(steps).unwrap_or(1);
    stuck
        .throttle_percent
        .saturating_add(more)
        .min(policy.throttle_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUCK: Stuck = Stuck {
        stop_least: Duration::from_millis(450),
        limit_reached: false,
        throttle_percent: 0,
        since_throttle: None,
        stop_floor: Duration::from_millis(175),
        can_post_copy: true,
    };

    fn check(when_stuck: WhenStuck, stuck: Stuck, expected: Option<Decision>) {
        let policy = Policy {
            when_stuck,
            ..Policy::new(Duration::from_millis(300))
        };
        assert_eq!(decide(&stuck, &policy), expected, "{when_stuck} {stuck:?}");
    }

    /// Each policy, stuck and at its limit.
    #[test]
    fn policies() {
        let over = Stuck {
            limit_reached: true,
            ..STUCK
        };
        check(WhenStuck::Wait, STUCK, None);
        check(WhenStuck::Wait, over, Some(Decision::GiveUp));
        check(WhenStuck::Throttle, STUCK, Some(Decision::Throttle(10)));
        check(WhenStuck::Throttle, over, Some(Decision::GiveUp));
        check(WhenStuck::Force, STUCK, None);
        check(WhenStuck::Force, over, Some(Decision::StopForced));
        check(WhenStuck::Abort, STUCK, Some(Decision::GiveUp));
        check(WhenStuck::PostCopy, STUCK, Some(Decision::PostCopy));
        let cannot = Stuck {
            can_post_copy: false,
            ..STUCK
        };
        check(WhenStuck::PostCopy, cannot, Some(Decision::Throttle(10)));
    }

    /// Throttling waits for what the last step brought, grows with the distance, ends at its limit.
    #[test]
    fn throttle_is_proportional_and_bounded() {
        let at = |percent, since_s| Stuck {
            throttle_percent: percent,
            since_throttle: Some(Duration::from_secs(since_s)),
            ..STUCK
        };
        check(WhenStuck::Throttle, at(10, 1), None);
        check(WhenStuck::Throttle, at(10, 5), Some(Decision::Throttle(20)));
        check(WhenStuck::Throttle, at(45, 5), Some(Decision::Throttle(50)));
        check(WhenStuck::Throttle, at(50, 5), None);
        let far = Stuck {
            stop_least: Duration::from_secs(9),
            ..at(10, 5)
        };
        check(WhenStuck::Throttle, far, Some(Decision::Throttle(40)));
        let hopeless = Stuck {
            stop_floor: Duration::from_millis(301),
            ..STUCK
        };
        check(WhenStuck::Throttle, hopeless, None);
    }

    /// Names are read as they are written.
    #[test]
    fn names() {
        for (_, policy) in WhenStuck::NAMES {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert_eq!("hope".parse::<WhenStuck>(), Err(WhenStuckError));
    }
}
