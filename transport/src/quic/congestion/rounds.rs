//! One round trip's sums.

use std::time::{Duration, Instant};

/// Rounds in a row whose mean round trip times are all but equal, although this flow holds no queue:
/// a path that became longer. A queue of others' would move.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Steady {
    span: Option<(Duration, Duration)>,
    since: Option<Instant>,
    rounds: u32,
}

/// How far equal means may lie apart, if not by a part of them.
const STEADY_WITHIN: Duration = Duration::from_millis(1);

impl Steady {
    /// Counts a round; returns how many have been alike, and for how long.
    pub(super) fn take(&mut self, now: Instant, mean: Duration, part: u32) -> (u32, Duration) {
        let (least, most) = self.span.map_or((mean, mean), |(least, most)| {
            (least.min(mean), most.max(mean))
        });
        if most - least > STEADY_WITHIN.max(most / part) {
            *self = Self::default();
            return self.take(now, mean, part);
        }
        self.span = Some((least, most));
        self.rounds += 1;
        let since = *self.since.get_or_insert(now);
        (self.rounds, now.saturating_duration_since(since))
    }
}

/// What happened since the round began.
#[derive(Debug, Clone, Default)]
pub(super) struct Round {
    /// The round ends when a packet is acknowledged that was sent after this many bytes had been
    /// delivered.
    ends_at: u64,
    /// First acknowledgement.
    first_ack: Option<Instant>,
    acked_bytes: u64,
    lost_bytes: u64,
    samples: u32,
    rtt_sum: Duration,
    rtt_min: Option<Duration>,
    /// Greatest rate sample.
    pub(super) rate_max: u64,
    /// A router marked packets instead of dropping them.
    pub(super) ecn: bool,
    /// The application left the window unused at some time.
    pub(super) app_limited: bool,
}

impl Round {
    pub(super) fn begin(delivered: u64) -> Self {
        Self {
            ends_at: delivered,
            ..Self::default()
        }
    }

    pub(super) fn acked(&mut self, now: Instant, bytes: u64, rtt: Duration) {
        self.first_ack.get_or_insert(now);
        self.acked_bytes += bytes;
        self.samples += 1;
        self.rtt_sum += rtt;
        self.rtt_min = Some(self.rtt_min.map_or(rtt, |least| least.min(rtt)));
    }

    pub(super) fn lost(&mut self, bytes: u64) {
        self.lost_bytes += bytes;
    }

    pub(super) fn has_ended(&self, delivered_before: u64) -> bool {
        delivered_before >= self.ends_at
    }

    /// Time over which its acknowledgements came.
    pub(super) fn age(&self, now: Instant) -> Duration {
        self.first_ack
            .map_or(Duration::ZERO, |first| now.saturating_duration_since(first))
    }

    pub(super) fn rtt_mean(&self) -> Option<Duration> {
        (self.samples > 0).then(|| self.rtt_sum / self.samples)
    }

    /// Least round trip time, once at least `count` packets were measured.
    pub(super) fn rtt_min_of(&self, count: u32) -> Option<Duration> {
        self.rtt_min.filter(|_| self.samples >= count)
    }

    /// Lost bytes of all that were settled, 0 to 1.
    pub(super) fn lost_share(&self) -> f64 {
        let settled = self.acked_bytes + self.lost_bytes;
        if settled == 0 {
            0.0
        } else {
            self.lost_bytes as f64 / settled as f64
        }
    }
}
