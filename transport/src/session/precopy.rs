//! When to look for dirty pages again, and when to stop: a pure function of what is observed.
//!
//! The backlog is the set of pages announced by QEMU and not sent yet. A page that is dirtied again
//! while it waits there costs nothing, so QEMU is asked for a new dirty sync about once a second
//! while the link drains the backlog, and at once when the backlog has become small.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What the operator asked for, and the constants of the rule.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Longest stop asked for (`--downtime`).
    pub downtime: Duration,
    /// Least time between two syncs while the backlog is large. Default 1 s: a sync costs QEMU a
    /// pass over the dirty log, and the gain of a fresher view is smaller than that below a second.
    pub resync_interval: Duration,
    /// Rounds in a row that did not shrink before the stop is taken anyway. Default 3.
    pub stuck_rounds: u32,
    /// Part of a stop that does not depend on how many pages are left: device state, its load, two
    /// journal writes, QEMU's `cont`. Default 100 ms, measured on a 1 GiB guest with virtio devices.
    pub fixed: Duration,
}

impl Policy {
    /// The default rule for a wanted downtime.
    #[must_use]
    pub fn new(downtime: Duration) -> Policy {
        Policy {
            downtime,
            resync_interval: Duration::from_secs(1),
            stuck_rounds: 3,
            fixed: Duration::from_millis(100),
        }
    }
}

/// One look at the transfer.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// Pages announced and not sent.
    pub backlog_pages: u64,
    /// Bytes sent on lanes and not yet applied at the target.
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
    /// Rounds in a row that did not shrink.
    pub rounds_not_shrinking: u32,
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
    /// Let QEMU stop the guest: what is left fits.
    Stop,
    /// Let QEMU stop the guest although it does not fit: rounds stopped shrinking.
    StopStuck,
}

/// Least time between two syncs: one takes up to 100 ms to begin.
const RESYNC_MIN: Duration = Duration::from_millis(150);
/// Backlogs below this drain time count as drained: the next sync takes about as long to come.
const DRAINED: Duration = Duration::from_millis(100);
/// Taken for the link while nothing that was sent says otherwise: 10 Mbit/s.
const RATE_UNMEASURED: f64 = 1.25e6;
/// QEMU stops within one of its 100 ms windows after it is allowed to.
const STOP_WINDOW: Duration = Duration::from_millis(100);

/// The rule, in the order in which it is applied: no rate yet -> wait; what is left fits -> stop;
/// drained and rounds stopped shrinking -> stop; drained, or due for a fresher view -> sync.
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
    let drain = seconds(
        (as_f64(seen.backlog_pages) * seen.page_cost_bytes + as_f64(seen.in_flight_bytes))
            / seen.rate_bytes_per_s,
    );
    if drain <= DRAINED + seen.rtt {
        if predicted_downtime(seen, policy).is_some_and(|stop| stop <= policy.downtime) {
            return Decision::Stop;
        }
        if seen.rounds_not_shrinking >= policy.stuck_rounds {
            return Decision::StopStuck;
        }
        return Decision::Sync;
    }
    // The nearer the end, the fresher the view must be: what is left at the first empty backlog is
    // what was dirtied since the last look.
    let interval = (drain / 2).clamp(RESYNC_MIN, policy.resync_interval);
    if seen.since_sync >= interval {
        Decision::Refresh
    } else {
        Decision::Wait
    }
}

/// Stop to run, if the stop were asked for at this moment: the pages dirtied since the last sync
/// and in QEMU's stop window, the last bytes of the backlog, one and a half round trips of the
/// handover (pages and `Loaded`, `Commit`), and the fixed part. `None` while nobody knows how fast
/// the guest dirties.
#[must_use]
fn predicted_downtime(seen: &Observation, policy: &Policy) -> Option<Duration> {
    let fresh = seen.dirty_pages_per_s? * (seen.since_sync + STOP_WINDOW).as_secs_f64();
    // What the link sends during the stop window is gone before the guest stops.
    let left = as_f64(seen.backlog_pages) * seen.page_cost_bytes + as_f64(seen.in_flight_bytes)
        - seen.rate_bytes_per_s * STOP_WINDOW.as_secs_f64();
    let bytes = fresh * seen.page_cost_bytes + left.max(0.0);
    Some(seconds(bytes / seen.rate_bytes_per_s) + seen.rtt.mul_f64(1.5) + policy.fixed)
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

/// Applied bytes per second while the link is kept busy, over the last [`RateMeter::WINDOW`].
#[derive(Debug, Default)]
pub struct RateMeter {
    marks: VecDeque<(Instant, u64)>,
    latest: f64,
}

impl RateMeter {
    /// Span of the mean: longer than a cycle of the congestion controller at 100 ms of RTT.
    pub const WINDOW: Duration = Duration::from_secs(2);
    /// Below this span a burst says nothing about the link.
    const SPAN_MIN: Duration = Duration::from_millis(300);
    const MARKS_MAX: usize = 256;

    /// Takes the running total of applied bytes. `busy`: the source had something to send all the
    /// time; what an idle link carries says nothing of what it could carry.
    pub fn record(&mut self, now: Instant, total_bytes: u64, busy: bool) {
        if !busy {
            self.marks.clear();
            return;
        }
        if self.marks.len() == Self::MARKS_MAX {
            self.marks.pop_front();
        }
        self.marks.push_back((now, total_bytes));
        while let Some((at, _)) = self.marks.get(1)
            && now.duration_since(*at) > Self::WINDOW
        {
            self.marks.pop_front();
        }
        let (Some((from, low)), Some((to, high))) = (self.marks.front(), self.marks.back()) else {
            return;
        };
        let span = to.duration_since(*from);
        if span >= Self::SPAN_MIN {
            self.latest = as_f64(high.saturating_sub(*low)) / span.as_secs_f64();
        }
    }

    /// Latest estimate; 0 before the first.
    #[must_use]
    pub fn bytes_per_s(&self) -> f64 {
        self.latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: Observation = Observation {
        backlog_pages: 0,
        in_flight_bytes: 0,
        page_cost_bytes: 2000.0,
        rate_bytes_per_s: 12e6,
        rtt: Duration::from_millis(50),
        since_sync: Duration::from_millis(50),
        dirty_pages_per_s: Some(500.0),
        rounds_not_shrinking: 0,
    };

    fn check(seen: Observation, expected: Decision) {
        assert_eq!(
            decide(&seen, &Policy::new(Duration::from_millis(300))),
            expected,
            "{seen:?}"
        );
    }

    /// Each arm of the rule, one observation each.
    #[test]
    fn decisions() {
        check(SEEN, Decision::Stop);
        check(
            Observation {
                dirty_pages_per_s: None,
                ..SEEN
            },
            Decision::Sync,
        );
        check(
            Observation {
                backlog_pages: 1,
                rate_bytes_per_s: 0.0,
                ..SEEN
            },
            Decision::Wait,
        );
        check(
            Observation {
                rate_bytes_per_s: 0.0,
                dirty_pages_per_s: Some(5.0),
                ..SEEN
            },
            Decision::Stop,
        );
        check(
            Observation {
                backlog_pages: 100_000,
                ..SEEN
            },
            Decision::Wait,
        );
        let old = Duration::from_secs(1);
        check(
            Observation {
                backlog_pages: 100_000,
                since_sync: old,
                ..SEEN
            },
            Decision::Refresh,
        );
        check(
            Observation {
                dirty_pages_per_s: Some(50_000.0),
                ..SEEN
            },
            Decision::Sync,
        );
        let stuck = Observation {
            dirty_pages_per_s: Some(50_000.0),
            rounds_not_shrinking: 3,
            ..SEEN
        };
        check(stuck, Decision::StopStuck);
    }

    /// A steady flow is measured within 1 %, an old burst is forgotten, idleness changes nothing.
    #[test]
    fn rate_of_a_steady_flow() {
        #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
        let start = Instant::now();
        let mut meter = RateMeter::default();
        for step in 0..1000_u32 {
            let extra = if step > 2 { 50_000_000 } else { 0 };
            let total = extra + u64::from(step) * 20_000;
            meter.record(start + step * Duration::from_millis(20), total, true);
        }
        meter.record(start + Duration::from_secs(30), 0, false);
        let rate = meter.bytes_per_s();
        assert!((rate - 1e6).abs() < 1e4, "{rate}");
    }
}
