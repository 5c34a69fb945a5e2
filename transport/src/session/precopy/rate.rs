//! What the link takes, as far as the target has acknowledged it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::as_f64;

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

/// Least duration of the last one to two [`RecentLeast::SPAN`]s: what an early guess said is
/// forgotten.
#[derive(Debug, Clone, Copy)]
pub(in crate::session) struct RecentLeast {
    since: Option<Instant>,
    least: Duration,
    before: Duration,
}

impl RecentLeast {
    /// A cycle of a guest's writing, or of the rounds, fits in.
    const SPAN: Duration = Duration::from_secs(10);

    pub(crate) const NONE: RecentLeast = RecentLeast {
        since: None,
        least: Duration::MAX,
        before: Duration::MAX,
    };

    pub(crate) fn take(&mut self, now: Instant, value: Duration) {
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) >= Self::SPAN {
            (self.since, self.before, self.least) = (Some(now), self.least, Duration::MAX);
        }
        self.least = self.least.min(value);
    }

    /// `Duration::MAX` before the first.
    pub(crate) fn get(&self) -> Duration {
        self.least.min(self.before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least of the last spans, and nothing older.
    #[test]
    fn least_is_recent() {
        #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
        let start = Instant::now();
        let mut least = RecentLeast::NONE;
        for second in 0..40_u32 {
            let value = if second == 0 {
                1
            } else {
                100 + u64::from(second)
            };
            let now = start + Duration::from_secs(u64::from(second));
            least.take(now, Duration::from_secs(value));
        }
        assert_eq!(least.get(), Duration::from_secs(120));
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
