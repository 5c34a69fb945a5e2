//! When to look for dirty pages again, when to stop, and what to do when it will not converge: a
//! pure function of what is observed.
//!
//! The backlog is the set of pages announced by QEMU and not sent yet. A page that is dirtied again
//! while it waits there costs nothing, so QEMU is asked for a new dirty sync about once a second
//! while the link drains the backlog, and more often the nearer its end is. At the end QEMU is
//! **armed**: it syncs without a pause and waits for one word to stop the guest, which it then does
//! within a millisecond, so that nothing is dirtied unseen between the decision and the stop.
//!
//! ```text
//!            drained             first sync         what is left fits
//!   Held ------------> Arm ------------------> Armed ----------------> Stop
//!    ^  '- Sync, Refresh                         |
//!    '-------------------------------------------'  ARMED_MAX is over: Disarm
//! ```
//!
//! Reading order: this file, `stuck` (what is done when rounds do not shrink), `rate` (what the link
//! takes), `simulation` (guests against links).

mod rate;
#[cfg(test)]
mod recorded;
#[cfg(test)]
mod simulation;
mod stuck;

use std::time::Duration;

pub use rate::RateMeter;
pub(super) use rate::RecentLeast;
pub use stuck::{Stuck, WhenStuck, WhenStuckError};

/// What the operator asked for, and the constants of the rule.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Longest stop asked for (`--downtime`).
    pub downtime: Duration,
    /// Least time between two syncs while the backlog is large. Default 1 s: a sync costs QEMU a
    /// pass over the dirty log, and the gain of a fresher view is smaller than that below a second.
    pub resync_interval: Duration,
    /// Part of a stop that does not depend on how many pages are left: device state, its load, two
    /// journal writes, QEMU's `cont`. Default 100 ms, measured on a 1 GiB guest with virtio devices.
    pub fixed: Duration,
    /// What to do when what is left does not shrink any more.
    pub when_stuck: WhenStuck,
    /// Strongest throttle of the guest's processors in percent, 1 to 99.
    pub throttle_max: u8,
    /// Rounds after which the move counts as stuck for good (`--max-rounds`).
    pub rounds_max: Option<u32>,
    /// The same for time (`--timeout`).
    pub time_max: Option<Duration>,
}

impl Policy {
    /// The default rule for a wanted downtime.
    #[must_use]
    pub fn new(downtime: Duration) -> Policy {
        Policy {
            downtime,
            resync_interval: Duration::from_secs(1),
            fixed: Duration::from_millis(100),
            when_stuck: WhenStuck::Throttle,
            throttle_max: 50,
            rounds_max: None,
            time_max: None,
        }
    }
}

/// What QEMU is doing for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steering {
    /// It waits for the next sync to be asked for.
    Held {
        /// Since it was armed last; `None`: never.
        since_armed: Option<Duration>,
    },
    /// It syncs without a pause, and stops the guest at a word.
    Armed {
        /// For how long.
        since: Duration,
        /// Since the stop in sight was shortest.
        since_best: Duration,
    },
}

/// One look at the transfer.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// Pages announced and not sent.
    pub backlog_pages: u64,
    /// Bytes sent on lanes and not yet applied at the target, as far as this side has heard.
    pub in_flight_bytes: u64,
    /// Mean bytes on a lane per page that was sent with content lately.
    pub page_cost_bytes: f64,
    /// Applied lane bytes per second.
    pub rate_bytes_per_s: f64,
    /// Least round-trip time seen.
    pub rtt: Duration,
    /// Since QEMU's last dirty sync.
    pub since_sync: Duration,
    /// Distinct pages per second that the guest dirties, from the last syncs; `None` before two.
    pub dirty_pages_per_s: Option<f64>,
    /// What QEMU does.
    pub steering: Steering,
    /// Whether what is left has stopped shrinking.
    pub stuck: Option<Stuck>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Go on sending.
    Wait,
    /// Ask QEMU for a dirty sync in the middle of the drain: what is dirtied again before it is
    /// sent costs nothing.
    Refresh,
    /// The backlog is drained: a round ends, ask QEMU for the next dirty sync.
    Sync,
    /// The backlog is drained: a round ends, QEMU syncs without a pause from here on.
    Arm,
    /// It did not come to fit: back to single syncs.
    Disarm,
    /// Let QEMU stop the guest: what is left fits.
    Stop,
    /// Let QEMU stop the guest although it does not fit: that was asked for.
    StopForced,
    /// Slow the guest's processors by so many percent.
    Throttle(u8),
    /// Stop the guest now, run it at the target, send the rest after.
    PostCopy,
    /// End the move, the guest stays.
    GiveUp,
}

/// Least time between two syncs: one takes up to 100 ms to begin.
const RESYNC_MIN: Duration = Duration::from_millis(150);
/// Backlogs below this drain time count as drained: the next sync takes about as long to come.
const DRAINED: Duration = Duration::from_millis(100);
/// Taken for the link while nothing that was sent says otherwise: 10 Mbit/s.
const RATE_UNMEASURED: f64 = 1.25e6;
/// QEMU takes up to so long to begin a sync, or to arm itself: one of its windows.
const WINDOW: Duration = Duration::from_millis(100);
/// Longest stretch of syncs without a pause: each is a walk over QEMU's dirty log under its lock.
const ARMED_MAX: Duration = Duration::from_secs(2);
/// A stretch in which the stop in sight became no shorter for this long is given up.
const ARMED_PATIENCE: Duration = Duration::from_millis(400);
/// A stop that fits is waited with until it became no shorter for this long, or comes as near to
/// its floor as this.
const ARMED_SETTLED: Duration = Duration::from_millis(60);
const ARMED_NEAR: Duration = Duration::from_millis(20);
/// Least time between two such stretches.
const ARMED_EVERY: Duration = Duration::from_secs(1);
/// The target tells what it has applied as often as this.
const TELLING: Duration = Duration::from_millis(20);

/// The rule. See the module for its states.
#[must_use]
pub fn decide(seen: &Observation, policy: &Policy) -> Decision {
    if seen.rate_bytes_per_s < 1.0 {
        if seen.backlog_pages > 0 || seen.in_flight_bytes > 0 {
            return Decision::Wait;
        }
        // Everything was known at the target, so no rate could be measured.
        let modest = Observation {
            rate_bytes_per_s: RATE_UNMEASURED,
            ..*seen
        };
        return decide(&modest, policy);
    }
    match seen.steering {
        Steering::Armed { since, since_best } => {
            let pace = Pace {
                is_settled: since_best >= ARMED_SETTLED || since >= ARMED_PATIENCE,
                is_over: since_best >= ARMED_PATIENCE || since >= ARMED_MAX,
            };
            armed(seen, policy, &pace)
        }
        Steering::Held { since_armed } => held(seen, policy, since_armed),
    }
}

/// How an armed stretch gets on.
struct Pace {
    /// The stop in sight became no shorter for a moment, or it has had its time for that.
    is_settled: bool,
    /// It is not to go on.
    is_over: bool,
}

fn armed(seen: &Observation, policy: &Policy, pace: &Pace) -> Decision {
    let stop = predicted_stop(seen, policy);
    // Nearly there a moment more is a shorter stop.
    let is_least = stop <= stop_floor(seen.rtt, policy) + ARMED_NEAR || pace.is_settled;
    if stop <= policy.downtime && is_least {
        return Decision::Stop;
    }
    let is_over = pace.is_over;
    if let Some(stuck) = seen.stuck
        && policy.when_stuck == WhenStuck::Force
        && (stop <= stuck.stop_least.mul_f64(1.1) || is_over)
    {
        return Decision::StopForced;
    }
    if is_over {
        Decision::Disarm
    } else {
        Decision::Wait
    }
}

fn held(seen: &Observation, policy: &Policy, since_armed: Option<Duration>) -> Decision {
    let drain = drain_time(seen);
    // It never drains, and what is left fits all the same: a long stop was asked for.
    let fits = seen.stuck.is_some() && predicted_stop(seen, policy) <= policy.downtime;
    if let Some(stuck) = &seen.stuck
        && !fits
        && let Some(decision) = stuck::decide(stuck, policy)
    {
        return decision;
    }
    // What never drains is stopped at its best moment.
    let is_best = |stuck: &Stuck| predicted_stop(seen, policy) <= stuck.stop_least.mul_f64(1.1);
    let forces = policy.when_stuck == WhenStuck::Force && seen.stuck.as_ref().is_some_and(is_best);
    // The nearer the end, the fresher the view must be: what is left at the first empty backlog is
    // what was dirtied since the last look.
    let interval = (drain / 2).clamp(RESYNC_MIN, policy.resync_interval);
    if drain > DRAINED + seen.rtt && !forces && !fits {
        return if seen.since_sync >= interval {
            Decision::Refresh
        } else {
            Decision::Wait
        };
    }
    // Nobody knows yet how fast this guest dirties, or it was armed in vain a moment ago.
    let soon = since_armed.is_some_and(|since| since < ARMED_EVERY);
    if seen.dirty_pages_per_s.is_none() || soon {
        Decision::Sync
    } else {
        Decision::Arm
    }
}

/// Time in which the link takes all that waits for it.
#[must_use]
pub(super) fn drain_time(seen: &Observation) -> Duration {
    let bytes = as_f64(seen.backlog_pages) * seen.page_cost_bytes + waiting_bytes(seen);
    seconds(bytes / seen.rate_bytes_per_s.max(1.0))
}

/// What is in flight beyond the pipe. What fills that is on its way: its last byte takes half a
/// round trip, and half a round trip and a telling later this side hears of it.
fn waiting_bytes(seen: &Observation) -> f64 {
    let pipe = seen.rate_bytes_per_s * (seen.rtt + TELLING / 2).as_secs_f64();
    (as_f64(seen.in_flight_bytes) - pipe).max(0.0)
}

/// Stop to run, if an armed QEMU were told to stop the guest now: what is left on the link beyond
/// its pipe, one and a half round trips of the handover (the last page, `Loaded`, `Commit`), and
/// the fixed part.
#[must_use]
pub(super) fn predicted_stop(seen: &Observation, policy: &Policy) -> Duration {
    let unseen = match seen.steering {
        Steering::Armed { .. } => 0.0,
        Steering::Held { .. } => {
            seen.dirty_pages_per_s.unwrap_or(0.0) * (seen.since_sync + WINDOW).as_secs_f64()
        }
    };
    let bytes = (as_f64(seen.backlog_pages) + unseen) * seen.page_cost_bytes + waiting_bytes(seen);
    seconds(bytes / seen.rate_bytes_per_s.max(1.0)) + stop_floor(seen.rtt, policy)
}

/// What no throttle and no wait shortens of it.
#[must_use]
pub(super) fn stop_floor(rtt: Duration, policy: &Policy) -> Duration {
    rtt.mul_f64(1.5) + policy.fixed
}

/// Longest span that a division by a tiny rate may ask for.
const SECONDS_MAX: f64 = 1e6;

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, SECONDS_MAX))
}

#[expect(clippy::cast_precision_loss, reason = "estimates need no 53rd bit")]
fn as_f64(value: u64) -> f64 {
    value as f64
}
