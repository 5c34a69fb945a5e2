//! What the source measures during pre-copy, and what it decides from it.

use std::time::{Duration, Instant};

use super::{Round, Sample};
use crate::session::precopy::{
    Decision, Observation, Policy, RateMeter, RecentLeast, Steering, Stuck, decide, drain_time,
    predicted_stop, stop_floor,
};

/// Measurements of one attempt.
#[derive(Debug)]
pub(super) struct Rounds {
    pub(super) policy: Policy,
    rate: RateMeter,
    sample: Sample,
    cost_from: Sample,
    applied_bytes: u64,
    page_cost_bytes: f64,
    dirty_pages_per_s: Option<f64>,
    sync_at: Option<Instant>,
    /// Pages dirtied up to this sync are in the dirty rate; those after it are not yet.
    counted_to: Option<Instant>,
    uncounted_pages: u64,
    round_at: Option<Instant>,
    round_from: Sample,
    pages_least: u64,
    not_shrinking: u32,
    paced_at: Option<Instant>,
    rounds: u32,
    began_at: Option<Instant>,
    armed_at: Option<Instant>,
    /// Shortest stop in sight of this armed stretch, and when.
    armed_best: (Duration, Option<Instant>),
    disarmed_at: Option<Instant>,
    /// Shortest stop that was in sight lately.
    stop_least: RecentLeast,
    /// Least backlog so far, and when it last became a tenth smaller.
    left_least: u64,
    shrank_at: Option<Instant>,
    throttle_percent: u8,
    throttled_at: Option<Instant>,
    pub(super) can_post_copy: bool,
}

/// Pages that make half of the page cost: fewer would follow single batches.
const COST_PAGES: u64 = 256;
/// Below this, what was sent says nothing of what the link could carry.
const RATE_BYTES_MIN: u64 = 256 << 10;
/// Taken for such a link: 10 Mbit/s.
const RATE_MODEST: f64 = 1.25e6;
/// Rounds in a row that did not shrink before the move counts as stuck.
const STUCK_ROUNDS: u32 = 3;
/// A backlog that became no tenth smaller for this long, and this share of its drain, stalls: a
/// tenth takes a tenth of it where the guest writes nothing.
const STALL_MIN: Duration = Duration::from_secs(10);
const STALL_SHARE: f64 = 0.5;
/// Guess before the first measurement: half a page.
const COST_GUESS_BYTES: f64 = 2048.0;

impl Rounds {
    pub(super) fn new(policy: Policy) -> Rounds {
        Rounds {
            policy,
            rate: RateMeter::default(),
            sample: Sample::default(),
            cost_from: Sample::default(),
            applied_bytes: 0,
            page_cost_bytes: COST_GUESS_BYTES,
            dirty_pages_per_s: None,
            sync_at: None,
            counted_to: None,
            uncounted_pages: 0,
            round_at: None,
            round_from: Sample::default(),
            pages_least: u64::MAX,
            not_shrinking: 0,
            paced_at: None,
            rounds: 0,
            began_at: None,
            armed_at: None,
            armed_best: (Duration::MAX, None),
            disarmed_at: None,
            stop_least: RecentLeast::NONE,
            left_least: u64::MAX,
            shrank_at: None,
            throttle_percent: 0,
            throttled_at: None,
            can_post_copy: false,
        }
    }

    pub(super) fn begin(&mut self, now: Instant) {
        self.began_at = Some(now);
        self.round_at = Some(now);
        self.sync_at.get_or_insert(now);
    }

    /// Takes the target's running total of applied bytes.
    pub(super) fn progress(&mut self, now: Instant, total_bytes: u64) {
        self.applied_bytes = self
            .applied_bytes
            .max(total_bytes.min(self.sample.sent_bytes));
        self.rate
            .record(now, self.applied_bytes, self.sample.backlog_pages > 0);
    }

    pub(super) fn sampled(&mut self, sample: Sample) {
        let pages = sample
            .content_pages
            .saturating_sub(self.cost_from.content_pages);
        if pages > 0 {
            let bytes = sample.sent_bytes.saturating_sub(self.cost_from.sent_bytes);
            let cost = as_f64(bytes) / as_f64(pages);
            // Many pages count for more, but never for more than a quarter.
            let weight = (as_f64(pages) / as_f64(2 * COST_PAGES)).min(0.25);
            self.page_cost_bytes += weight * (cost - self.page_cost_bytes);
            self.cost_from = sample;
        }
        self.sample = sample;
    }

    /// QEMU has looked at its dirty log. A guest that dirties little makes it look again and again
    /// until it hears that one look was enough.
    pub(super) fn synced(&mut self, now: Instant) {
        self.sync_at = Some(now);
        self.counted_to.get_or_insert(now);
    }

    /// The pass after the latest sync is over; it announced so many pages.
    pub(super) fn pass_drained(&mut self, pages: u64) {
        let (Some(from), Some(to)) = (self.counted_to, self.sync_at) else {
            return;
        };
        let span = to.duration_since(from).as_secs_f64();
        // The first pass announces all of memory, whatever was dirtied.
        if span > 0.0 {
            self.uncounted_pages = self.uncounted_pages.saturating_add(pages);
        }
        tracing::debug!(pages, span_s = span, "pass drained");
        // Spans below 20 ms are set-up noise.
        if span > 0.02 {
            self.dirty_pages_per_s = Some(as_f64(self.uncounted_pages) / span);
            (self.counted_to, self.uncounted_pages) = (Some(to), 0);
        }
    }

    pub(super) fn decide(&mut self, now: Instant) -> Decision {
        let seen = self.observation(now);
        let drain = drain_time(&seen);
        // In pages: what a page costs is still being learned.
        let left = seen.backlog_pages;
        if self.shrank_at.is_none() || left < self.left_least - self.left_least / 10 {
            (self.left_least, self.shrank_at) = (left, Some(now));
        }
        if seen.rate_bytes_per_s >= 1.0 && seen.dirty_pages_per_s.is_some() {
            let stop = predicted_stop(&seen, &self.policy);
            self.stop_least.take(now, stop);
            if self.armed_at.is_some() && stop < self.armed_best.0 {
                self.armed_best = (stop, Some(now));
            }
        }
        let seen = Observation {
            steering: self.steering(now),
            stuck: self.stuck(now, drain),
            ..seen
        };
        decide(&seen, &self.policy)
    }

    fn steering(&self, now: Instant) -> Steering {
        let since = |at: Instant| now.duration_since(at);
        match self.armed_at {
            Some(at) => Steering::Armed {
                since: since(at),
                since_best: since(self.armed_best.1.unwrap_or(at)),
            },
            None => Steering::Held {
                since_armed: self.disarmed_at.map(since),
            },
        }
    }

    /// Stop to run, if the stop were asked for now; `None` while nothing is known of the link.
    pub(super) fn predicted_stop(&self, now: Instant) -> Option<Duration> {
        let seen = self.observation(now);
        (seen.rate_bytes_per_s >= 1.0).then(|| predicted_stop(&seen, &self.policy))
    }

    /// Shortest stop that was in sight, once the move does not get on any more.
    pub(super) fn stuck_at(&self, now: Instant) -> Option<Duration> {
        let drain = drain_time(&self.observation(now));
        self.stuck(now, drain).map(|stuck| stuck.stop_least)
    }

    fn stuck(&self, now: Instant, drain: Duration) -> Option<Stuck> {
        let since = |at: Option<Instant>| at.map(|at| now.duration_since(at));
        let limit_reached = self.limit_reached(now);
        let stalls = since(self.shrank_at)
            .is_some_and(|since| since > STALL_MIN.max(drain.mul_f64(STALL_SHARE)));
        let is_stuck = limit_reached || stalls || self.not_shrinking >= STUCK_ROUNDS;
        is_stuck.then(|| Stuck {
            stop_least: self.stop_least.get(),
            limit_reached,
            throttle_percent: self.throttle_percent,
            since_throttle: since(self.throttled_at),
            stop_floor: stop_floor(self.sample.rtt, &self.policy),
            can_post_copy: self.can_post_copy,
        })
    }

    pub(super) fn limit_reached(&self, now: Instant) -> bool {
        let policy = &self.policy;
        let time = self.began_at.map(|at| now.duration_since(at));
        policy.rounds_max.is_some_and(|most| self.rounds >= most)
            || policy
                .time_max
                .zip(time)
                .is_some_and(|(most, time)| time >= most)
    }

    /// QEMU syncs without a pause from now on.
    pub(super) fn armed(&mut self, now: Instant) {
        (self.armed_at, self.armed_best) = (Some(now), (Duration::MAX, None));
    }

    /// QEMU is back at single syncs: what was announced meanwhile tells nothing of distinct pages.
    pub(super) fn disarmed(&mut self, now: Instant) {
        (self.armed_at, self.disarmed_at) = (None, Some(now));
        (self.counted_to, self.uncounted_pages) = (None, 0);
    }

    /// The guest is slowed.
    pub(super) fn throttled(&mut self, now: Instant, percent: u8) {
        (self.throttle_percent, self.throttled_at) = (percent, Some(now));
        // What was learned of its rounds is of another guest.
        (self.not_shrinking, self.pages_least) = (0, u64::MAX);
        (self.left_least, self.shrank_at) = (u64::MAX, None);
    }

    pub(super) fn throttle_percent(&self) -> u8 {
        self.throttle_percent
    }

    fn observation(&self, now: Instant) -> Observation {
        Observation {
            backlog_pages: self.sample.backlog_pages,
            in_flight_bytes: self.sample.sent_bytes.saturating_sub(self.applied_bytes),
            page_cost_bytes: self.page_cost_bytes,
            rate_bytes_per_s: self.rate_bytes_per_s(),
            rtt: self.sample.rtt,
            since_sync: self
                .sync_at
                .map_or(Duration::ZERO, |at| now.duration_since(at)),
            dirty_pages_per_s: self.dirty_pages_per_s,
            steering: self.steering(now),
            stuck: None,
        }
    }

    /// Closes the round if the backlog is as good as empty.
    pub(super) fn end_round(&mut self, now: Instant) -> Option<Round> {
        let from = self.round_at?;
        let round = Round {
            dirty_pages: self
                .sample
                .announced_pages
                .saturating_sub(self.round_from.announced_pages),
            sent_bytes: self
                .sample
                .sent_bytes
                .saturating_sub(self.round_from.sent_bytes),
            length: now.duration_since(from),
        };
        self.rounds += 1;
        self.round_at = Some(now);
        self.round_from = self.sample;
        // A tenth less than ever before counts as shrinking: an uneven guest must not start over
        // with each round that is smaller than the last.
        let shrank = round.dirty_pages < self.pages_least - self.pages_least / 10;
        self.not_shrinking = if shrank { 0 } else { self.not_shrinking + 1 };
        self.pages_least = self.pages_least.min(round.dirty_pages);
        Some(round)
    }

    /// Starvation hold: raw bytes at the rate at which the link takes their encodings, a quarter
    /// more so that the backlog never runs dry, a trickle while it is worth more than a second.
    pub(super) fn pace(&mut self, now: Instant) -> Option<u64> {
        const PACE_INTERVAL: Duration = Duration::from_millis(200);
        const TRICKLE_BYTES_PER_S: u64 = 100_000;
        if self
            .paced_at
            .is_some_and(|at| now.duration_since(at) < PACE_INTERVAL)
        {
            return None;
        }
        let pages_per_s = self.rate_bytes_per_s() / self.page_cost_bytes.max(1.0);
        if pages_per_s < 1.0 {
            return None;
        }
        self.paced_at = Some(now);
        let backlog_s = as_f64(self.sample.backlog_pages) / pages_per_s;
        let raw = as_u64(pages_per_s * 4096.0 * 1.25);
        Some(if backlog_s > 1.0 {
            TRICKLE_BYTES_PER_S
        } else {
            raw.max(TRICKLE_BYTES_PER_S)
        })
    }

    pub(super) fn applied_bytes(&self) -> u64 {
        self.applied_bytes
    }

    /// Applied bytes per second while the link was busy. A link that took everything before that
    /// could be measured has the congestion controller's estimate.
    pub(super) fn rate_bytes_per_s(&self) -> f64 {
        let measured = self.rate.bytes_per_s();
        let estimate = as_f64(self.sample.link_bytes_per_s);
        if measured > 0.0 {
            measured
        } else if estimate > 0.0 && self.sample.sent_bytes < RATE_BYTES_MIN {
            // An estimate from a trickle is a trickle's.
            estimate.max(RATE_MODEST)
        } else {
            estimate
        }
    }

    pub(super) fn page_cost_bytes(&self) -> f64 {
        self.page_cost_bytes
    }

    pub(super) fn dirty_pages_per_s(&self) -> Option<f64> {
        self.dirty_pages_per_s
    }
}

#[expect(clippy::cast_precision_loss, reason = "estimates need no 53rd bit")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to the range first"
)]
fn as_u64(value: f64) -> u64 {
    value.clamp(0.0, 1e18) as u64
}
