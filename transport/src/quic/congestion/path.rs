//! The model of the path: how fast it delivers, how long it takes without a queue.

use std::time::{Duration, Instant};

use super::filters::{Median, RoundMax, TimeMin};
use super::flight::RateSample;
use super::rounds::Round;
use super::scaled;

/// Below this a round trip time is the hosts' latency, not the path's: without the floor loopback
/// runs at a fifteenth of its speed.
const RTT_FLOOR: Duration = Duration::from_millis(2);
/// Quinn's batch: packets that are sent at one instant.
const BATCH_PACKETS: u64 = 10;
/// Longest queue that is allowed for the batches' sake.
const BATCH_TIME_MAX: Duration = Duration::from_millis(30);

/// Rounds of a held back window that age the rates as one that tested the link.
const HELD_BACK_ROUNDS: u64 = 4;

/// What the link once gave is remembered for one to two of these.
const BEST_SPAN: Duration = Duration::from_secs(30);

/// Rate and round trip times of the path.
#[derive(Debug, Clone)]
pub(super) struct PathModel {
    pub(super) mtu: u64,
    rate: RoundMax,
    /// The same without the memory for rounds in which the window was what limited the rate.
    recent_rate: RoundMax,
    /// Least round trip time of packets.
    rtt: TimeMin,
    /// Least mean round trip time of rounds.
    base: TimeMin,
    /// Mean less least round trip time, round by round.
    spread: Median,
    /// Greatest rate that a round has shown on this path.
    greatest: u64,
    /// The same of this [`BEST_SPAN`] and of the one before, and when this one began.
    best: (u64, u64),
    best_since: Option<Instant>,
    /// Rounds that said something of the link's rate: their number is the rate filter's time.
    rounds: u64,
    recent_rounds: u64,
    /// Rounds in a row that were held back.
    held_back: u64,
}

impl PathModel {
    pub(super) fn new(mtu: u16) -> Self {
        Self {
            mtu: u64::from(mtu),
            rate: RoundMax::default(),
            recent_rate: RoundMax::default(),
            rtt: TimeMin::default(),
            base: TimeMin::default(),
            spread: Median::default(),
            greatest: 0,
            best: (0, 0),
            best_since: None,
            rounds: 0,
            recent_rounds: 0,
            held_back: 0,
        }
    }

    /// Rounds that said something of the link's rate.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds
    }

    pub(super) fn rate(&self) -> Option<u64> {
        self.rate.get()
    }

    /// What the link gave lately, held back or not: for reports, not for windows.
    pub(super) fn recent_rate(&self) -> Option<u64> {
        self.recent_rate.get()
    }

    /// The greatest rate ever, for what yielding keeps.
    pub(super) fn greatest_rate(&self) -> u64 {
        self.greatest
    }

    /// The greatest rate of the last half minute, at least.
    pub(super) fn best_rate(&self) -> u64 {
        self.best.0.max(self.best.1)
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt.get()
    }

    /// Round trip time without a queue, jitter included. The least mean alone is too small under
    /// jitter, since the luckiest of all rounds has it.
    pub(super) fn base(&self) -> Option<Duration> {
        let jittered = self.rtt.get()? + self.jitter();
        Some(self.base.get()?.max(jittered))
    }

    /// How far a round's packets lie above the quickest of them, on most rounds, when the batches
    /// that we send are not the reason. A queue of our own lifts all packets alike.
    fn jitter(&self) -> Duration {
        self.spread
            .get()
            .unwrap_or_default()
            .saturating_sub(self.batch())
    }

    /// How long the link takes for a batch.
    fn batch(&self) -> Duration {
        let bytes = (BATCH_PACKETS * self.mtu) as f64;
        let batch_s = self
            .rate
            .get()
            .map_or(0.0, |rate| bytes / rate.max(1) as f64);
        Duration::try_from_secs_f64(batch_s).unwrap_or(Duration::MAX)
    }

    /// The queue that is allowed; `budget` is the operator's, while yielding, `factor` this flow's
    /// otherwise.
    pub(super) fn target(&self, budget: Option<Duration>, factor: f64) -> Duration {
        let rtt = self.rtt.get().unwrap_or_default();
        let quiet = (rtt / 10).clamp(Duration::from_millis(3), Duration::from_millis(15));
        let quiet = budget.unwrap_or_else(|| quiet.mul_f64(factor));
        // Less than a batch is no queue; and a small flow beside a large one must not give way first.
        quiet.max(self.batch().min(BATCH_TIME_MAX)) + self.jitter()
    }

    /// Bandwidth-delay product of the quickest packets: for the phases whose rounds have Startup's
    /// own queue in them.
    pub(super) fn bdp_early(&self) -> Option<u64> {
        self.bdp_of(self.rtt.get()?)
    }

    /// Bandwidth-delay product.
    pub(super) fn bdp(&self) -> Option<u64> {
        self.bdp_of(self.base()?)
    }

    fn bdp_of(&self, rtt: Duration) -> Option<u64> {
        Some(scaled(self.rate.get()?, rtt.max(RTT_FLOOR).as_secs_f64()))
    }

    pub(super) fn take_rtt(&mut self, now: Instant, window: Duration, rtt: Duration) {
        self.rtt.update(now, window, rtt);
    }

    pub(super) fn take_rate(&mut self, sample: RateSample, app_limited: bool, round: &mut Round) {
        // Acknowledgements come in bunches: a sample of less than a round trip may be one.
        if self
            .rtt
            .get()
            .is_some_and(|rtt| sample.interval < rtt.mul_f64(0.9))
        {
            return;
        }
        round.rate_max = round.rate_max.max(sample.bytes_per_s);
        self.greatest = self.greatest.max(sample.bytes_per_s);
        let rate = sample.bytes_per_s;
        if !app_limited || rate > self.rate.get().unwrap_or(0) {
            self.rate.update(self.rounds, rate);
        }
        if !app_limited || rate > self.recent_rate.get().unwrap_or(0) {
            self.recent_rate.update(self.recent_rounds, rate);
        }
    }

    /// Takes a round's mean; returns the queue that it found above the base.
    pub(super) fn end_round(
        &mut self,
        now: Instant,
        window: Duration,
        round: &Round,
    ) -> Option<Duration> {
        let (mean, least) = (round.rtt_mean()?, round.rtt_min_of(1)?);
        self.base.update(now, window, mean);
        let since = *self.best_since.get_or_insert(now);
        if now.saturating_duration_since(since) > BEST_SPAN {
            (self.best, self.best_since) = ((0, self.best.0), Some(now));
        }
        self.best.0 = self.best.0.max(round.rate_max);
        self.spread.update(mean.saturating_sub(least));
        Some(mean.saturating_sub(self.base()?))
    }

    /// A round is over in which the application used the window. Unless the window was what `held
    /// back` the rate, it tested the link, and older rates lose weight. A window that is held back
    /// for long loses it too, slowly: others may have come to stay.
    pub(super) fn age_rates(&mut self, held_back: bool) {
        self.recent_rounds += 1;
        self.held_back = if held_back { self.held_back + 1 } else { 0 };
        if self.held_back.is_multiple_of(HELD_BACK_ROUNDS) {
            self.rounds += 1;
        }
    }

    /// The path became longer: forgets all round trip times but this round's.
    pub(super) fn restart_rtt(&mut self, now: Instant, round: &Round) {
        (self.rtt, self.base) = (TimeMin::default(), TimeMin::default());
        if let (Some(mean), Some(least)) = (round.rtt_mean(), round.rtt_min_of(1)) {
            self.rtt.update(now, Duration::ZERO, least);
            self.base.update(now, Duration::ZERO, mean);
        }
    }

    /// Forgets all rates but this one.
    pub(super) fn restart_rate(&mut self, bytes_per_s: u64) {
        self.rate.restart(self.rounds, bytes_per_s);
        self.recent_rate.restart(self.recent_rounds, bytes_per_s);
    }
}
