//! What the last rounds saw, for reports and predictions: windows do not depend on it.

use std::collections::VecDeque;
use std::time::Duration;

/// Rounds that are kept: some seconds on a WAN.
const ROUNDS_MAX: usize = 64;
/// Shares of the rounds below the low and the high rate.
const LOW_PERCENT: usize = 10;
const HIGH_PERCENT: usize = 90;

/// Rates and queues of the last rounds.
#[derive(Debug, Clone, Default)]
pub(super) struct Recent {
    /// Of rounds in which the application used the window.
    rates: VecDeque<u64>,
    queues: VecDeque<Duration>,
}

/// Points of the last rounds' distribution. `None`: no round yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Spread {
    /// Tenth and ninetieth percentile of the rates, in bytes per second.
    pub(super) rate_low: Option<u64>,
    pub(super) rate_high: Option<u64>,
    pub(super) queueing_p50: Option<Duration>,
    pub(super) queueing_p95: Option<Duration>,
}

impl Recent {
    pub(super) fn take_rate(&mut self, bytes_per_s: u64) {
        push(&mut self.rates, bytes_per_s);
    }

    pub(super) fn take_queue(&mut self, queue: Duration) {
        push(&mut self.queues, queue);
    }

    pub(super) fn spread(&self) -> Spread {
        Spread {
            rate_low: percentile(&self.rates, LOW_PERCENT),
            rate_high: percentile(&self.rates, HIGH_PERCENT),
            queueing_p50: percentile(&self.queues, 50),
            queueing_p95: percentile(&self.queues, 95),
        }
    }
}

fn push<T>(entries: &mut VecDeque<T>, value: T) {
    if entries.len() == ROUNDS_MAX {
        entries.pop_front();
    }
    entries.push_back(value);
}

/// Nearest rank.
fn percentile<T: Copy + Ord>(entries: &VecDeque<T>, percent: usize) -> Option<T> {
    let mut sorted: Vec<T> = entries.iter().copied().collect();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_of_the_last_rounds() {
        let mut recent = Recent::default();
        assert_eq!(recent.spread(), Spread::default());
        for round in 0..1000 {
            recent.take_rate(round);
            recent.take_queue(Duration::from_millis(round % 10));
        }
        assert_eq!(recent.rates.len(), ROUNDS_MAX);
        let spread = recent.spread();
        assert_eq!(spread.rate_low, Some(936 + 6));
        assert_eq!(spread.rate_high, Some(936 + 57));
        assert_eq!(spread.queueing_p95, Some(Duration::from_millis(9)));
    }
}
