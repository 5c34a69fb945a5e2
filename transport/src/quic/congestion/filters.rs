//! Windowed maximum, minimum and median.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Greatest value of the last `LENGTH` rounds.
#[derive(Debug, Clone, Default)]
pub(super) struct RoundMax {
    /// Rising rounds, falling values: the front is the maximum, the next one its heir. At most
    /// one entry a round.
    entries: VecDeque<(u64, u64)>,
}

const LENGTH: u64 = 10;

impl RoundMax {
    pub(super) fn update(&mut self, round: u64, value: u64) {
        while self.entries.back().is_some_and(|&(_, last)| last <= value) {
            self.entries.pop_back();
        }
        // A smaller value of the same round can never become the maximum.
        if self.entries.back().is_none_or(|&(last, _)| last != round) {
            self.entries.push_back((round, value));
        }
        while self
            .entries
            .front()
            .is_some_and(|&(first, _)| first + LENGTH <= round)
        {
            self.entries.pop_front();
        }
    }

    pub(super) fn get(&self) -> Option<u64> {
        self.entries.front().map(|&(_, value)| value)
    }

    /// Forgets all but `value`.
    pub(super) fn restart(&mut self, round: u64, value: u64) {
        self.entries.clear();
        self.entries.push_back((round, value));
    }
}

/// Least value within a time window, at a resolution of 1/64 of the window.
#[derive(Debug, Clone, Default)]
pub(super) struct TimeMin {
    /// Rising times, rising values: the front is the minimum.
    entries: VecDeque<(Instant, Duration)>,
}

const RESOLUTION: u32 = 64;

impl TimeMin {
    pub(super) fn update(&mut self, now: Instant, window: Duration, value: Duration) {
        while self.entries.back().is_some_and(|&(_, last)| last >= value) {
            self.entries.pop_back();
        }
        // Bounds the memory: an heir that is hardly younger than the one before it is left out.
        let spaced =
            |&(last, _): &(Instant, Duration)| now.duration_since(last) * RESOLUTION > window;
        if self.entries.back().is_none_or(spaced) {
            self.entries.push_back((now, value));
        }
        while self.entries.len() > 1
            && self
                .entries
                .front()
                .is_some_and(|&(first, _)| now.duration_since(first) > window)
        {
            self.entries.pop_front();
        }
    }

    pub(super) fn get(&self) -> Option<Duration> {
        self.entries.front().map(|&(_, value)| value)
    }
}

/// Median of the last [`MEDIAN_OF`] values.
#[derive(Debug, Clone, Default)]
pub(super) struct Median {
    entries: VecDeque<Duration>,
    /// Known after each update: it is asked for more often than it changes.
    median: Option<Duration>,
}

const MEDIAN_OF: usize = 15;

impl Median {
    pub(super) fn update(&mut self, value: Duration) {
        if self.entries.len() == MEDIAN_OF {
            self.entries.pop_front();
        }
        self.entries.push_back(value);
        let mut sorted: Vec<Duration> = self.entries.iter().copied().collect();
        sorted.sort_unstable();
        self.median = sorted.get(sorted.len() / 2).copied();
    }

    pub(super) fn get(&self) -> Option<Duration> {
        self.median
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an Instant to count from")]
mod tests {
    use super::*;

    #[test]
    fn maximum_is_of_the_last_ten_rounds() {
        let mut filter = RoundMax::default();
        filter.update(0, 100);
        for round in 1..10 {
            filter.update(round, 50 + round);
            filter.update(round, 3);
        }
        assert_eq!(filter.get(), Some(100));
        filter.update(10, 1);
        assert_eq!(filter.get(), Some(59));
        filter.restart(10, 7);
        assert_eq!(filter.get(), Some(7));
    }

    #[test]
    fn median_is_of_the_last_fifteen() {
        let mut filter = Median::default();
        for ms in [900, 900, 1, 2, 3] {
            filter.update(Duration::from_millis(ms));
        }
        assert_eq!(filter.get(), Some(Duration::from_millis(3)));
        for ms in 0..15 {
            filter.update(Duration::from_millis(ms));
        }
        assert_eq!(filter.get(), Some(Duration::from_millis(7)));
    }

    /// Rising values are the worst case: each could be the next minimum.
    #[test]
    fn minimum_expires_and_memory_is_bounded() {
        let start = Instant::now();
        let window = Duration::from_secs(10);
        let mut filter = TimeMin::default();
        for step in 0..100_000u32 {
            let value = Duration::from_micros(u64::from(step));
            filter.update(
                start + Duration::from_micros(u64::from(step) * 1000),
                window,
                value,
            );
        }
        assert!(filter.entries.len() <= 65, "{}", filter.entries.len());
        let oldest = Duration::from_micros(100_000 - 10_000);
        let found = filter.get().unwrap();
        assert!(
            found >= oldest && found < oldest + Duration::from_micros(320),
            "{found:?}"
        );
    }
}
