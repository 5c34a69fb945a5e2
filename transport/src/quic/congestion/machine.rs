//! The machine: acknowledgements and losses in, a window out. No clock, no I/O.

use std::time::{Duration, Instant};

use super::filters::{Median, RoundMax, TimeMin};
use super::flight::{Flight, RateSample};
use super::phase::{
    CROWDED_FOR, CROWDED_GAINS, CROWDED_TRIM, CRUISE_GAINS, CRUISE_LOSS, DRAIN_GAIN, DRAIN_ROUNDS,
    HOLD_GAIN, PROBE_BOOST, PROBE_END, PROBE_GROWTH, Phase, SLOWER, STARTUP_GAIN_MAX, STARTUP_GROWTH,
    STARTUP_LOSS, STARTUP_SAMPLES, STARTUP_STALLED_ROUNDS, STEP_BACK_GAIN, STEP_BACK_ROUNDS,
    TRIM_MIN,
};
use super::rounds::Round;
use super::{Estimate, scaled};

/// Below this a round trip time is the hosts' latency, not the path's: without the floor loopback
/// runs at a fifteenth of its speed.
const RTT_FLOOR: Duration = Duration::from_millis(2);
/// How long a least round trip time is believed; longer while others hold the queue.
const RTT_WINDOW: Duration = Duration::from_secs(10);
const RTT_WINDOW_CROWDED: Duration = Duration::from_secs(30);
/// Without an acknowledgement for this long, and four round trips, the path was silent.
const SILENCE_MIN: Duration = Duration::from_secs(1);
const INITIAL_WINDOW_PACKETS: u64 = 10;
/// Quinn's batch: packets that are sent at one instant.
const BATCH_PACKETS: u64 = 10;
const WINDOW_MIN_PACKETS: u64 = 4;
/// On top of every Cruise window: acknowledgements cover two packets, batches ten.
const CRUISE_EXTRA_PACKETS: u64 = 4;
const STARTUP_EXTRA_PACKETS: u64 = 10;

/// The controller's state. See the folder's doc for the diagram.
#[derive(Debug, Clone)]
pub struct Machine {
    phase: Phase,
    window: u64,
    mtu: u64,
    /// Scales the window down while the queue is above its target.
    trim: f64,
    rate: RoundMax,
    /// Least round trip time of packets.
    rtt: TimeMin,
    /// Least mean round trip time of rounds.
    base: TimeMin,
    spread: Median,
    flight: Flight,
    round: Round,
    /// Rounds in which the application used the window.
    full_rounds: u64,
    queue: Option<Duration>,
    last_ack: Option<Instant>,
    /// Packets sent up to here were under way during a silence: their round trip time is its
    /// length.
    silent_until: Option<Instant>,
}

impl Machine {
    /// A controller for a path on which `mtu` bytes of UDP payload pass.
    pub fn new(mtu: u16) -> Self {
        let mtu = u64::from(mtu);
        Self {
            phase: Phase::STARTUP,
            window: INITIAL_WINDOW_PACKETS * mtu,
            mtu,
            trim: 1.0,
            rate: RoundMax::default(),
            rtt: TimeMin::default(),
            base: TimeMin::default(),
            spread: Median::default(),
            flight: Flight::default(),
            round: Round::default(),
            full_rounds: 0,
            queue: None,
            last_ack: None,
            silent_until: None,
        }
    }

    /// Bytes that may be in flight; never 0.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Bytes that may be in flight before anything is known.
    pub fn initial_window(&self) -> u64 {
        INITIAL_WINDOW_PACKETS * self.mtu
    }

    /// What is known of the path.
    pub fn estimate(&self) -> Estimate {
        Estimate {
            rate_bytes_per_s: self.rate.get(),
            rtt_min: self.rtt.get(),
            queueing: self.queue,
            phase: self.phase.name(),
        }
    }

    /// The path carries packets of `mtu` bytes.
    pub fn on_mtu(&mut self, mtu: u16) {
        self.mtu = u64::from(mtu);
        self.window = self.window.max(WINDOW_MIN_PACKETS * self.mtu);
    }

    /// Something was sent.
    pub fn on_sent(&mut self, now: Instant) {
        self.flight.sent(now);
    }

    /// A packet that was sent at `sent` is acknowledged.
    pub fn on_acked(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        self.notice_silence(now);
        self.flight.acked(now, sent, bytes);
        if self.silent_until.is_none_or(|silent| sent > silent) {
            let rtt = now.saturating_duration_since(sent);
            self.rtt.update(now, self.rtt_window(), rtt);
            self.round.acked(bytes, rtt);
        }
        if let (Phase::Startup { .. }, false) = (self.phase, app_limited) {
            self.window += bytes;
        }
    }

    /// An ACK frame is at its end.
    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        self.round.app_limited |= app_limited;
        let Some(sample) = self.flight.end_acks(now, in_flight) else {
            return;
        };
        self.take_rate(sample, app_limited);
        if self.round.has_ended(sample.delivered_before) {
            let next = Round::begin(self.flight.delivered());
            let round = std::mem::replace(&mut self.round, next);
            self.end_round(now, &round);
        }
        if let (Phase::Startup { .. }, true) = (self.phase, self.packets_are_late()) {
            self.phase = Phase::Hold {
                window_max: self.window,
            };
            self.round = Round::begin(self.flight.delivered());
        }
        self.set_window();
    }

    /// Packets were lost; 0 bytes stand for a router's mark.
    pub fn on_lost(&mut self, bytes: u64, persistent: bool) {
        if bytes == 0 {
            self.round.ecn = true;
        }
        self.round.lost(bytes);
        if persistent {
            // Everything of three probe timeouts is gone: the path was cut, or is another one.
            // Half of the rate is still a better guess than none.
            if let Some(rate) = self.rate.get() {
                self.rate.restart(self.full_rounds, rate / 2);
                self.window = self.bdp().map_or(self.window, |bdp| bdp / 4);
            }
            self.trim = 1.0;
            self.phase = Phase::STARTUP;
            self.set_window();
        }
    }

    /// After a cut, or a pause of the application, the current round means nothing.
    fn notice_silence(&mut self, now: Instant) {
        let silence = self
            .last_ack
            .map(|last| now.saturating_duration_since(last));
        let usual = self
            .rtt
            .get()
            .map_or(SILENCE_MIN, |rtt| (rtt * 4).max(SILENCE_MIN));
        if silence.is_some_and(|silence| silence > usual) {
            self.silent_until = self.last_ack;
            self.round = Round::begin(self.flight.delivered());
            if let Phase::Cruise { calm_at, .. } = &mut self.phase {
                *calm_at = now;
            }
        }
        self.last_ack = Some(now);
    }

    fn take_rate(&mut self, sample: RateSample, app_limited: bool) {
        // Acknowledgements come in bunches: a sample of less than a round trip may be one.
        if self
            .rtt
            .get()
            .is_some_and(|rtt| sample.interval < rtt.mul_f64(0.9))
        {
            return;
        }
        self.round.rate_max = self.round.rate_max.max(sample.bytes_per_s);
        let known = self.rate.get().unwrap_or(0);
        if !app_limited || sample.bytes_per_s > known {
            self.rate.update(self.full_rounds, sample.bytes_per_s);
        }
    }

    fn packets_are_late(&self) -> bool {
        let (Some(least), Some(rtt)) = (self.round.rtt_min_of(STARTUP_SAMPLES), self.rtt.get())
        else {
            return false;
        };
        let tolerance = (rtt / 8).clamp(Duration::from_millis(2), Duration::from_millis(16));
        self.rate.get().is_some() && least > rtt + tolerance
    }

    fn end_round(&mut self, now: Instant, round: &Round) {
        if !round.app_limited && !self.holds_back(round) {
            self.full_rounds += 1;
        }
        let Some(mean) = round.rtt_mean() else { return };
        self.base.update(now, self.rtt_window(), mean);
        if let Some(least) = round.rtt_min_of(1) {
            self.spread.update(mean - least);
        }
        let base = self.base_rtt().unwrap_or(mean);
        let queue = mean.saturating_sub(base);
        self.queue = Some(queue);
        let calm = queue <= self.target();
        self.phase = match self.phase {
            Phase::Startup { full_rate, stalled } => {
                self.end_startup_round(round, full_rate, stalled)
            }
            Phase::Hold { .. } => Phase::Drain { rounds: 0 },
            Phase::Drain { rounds } if calm || rounds + 1 >= DRAIN_ROUNDS => self.enter_cruise(now),
            Phase::Drain { rounds } => Phase::Drain { rounds: rounds + 1 },
            Phase::Cruise { .. } => self.end_cruise_round(now, round, base, queue),
            Phase::Crowded { since, .. } if now.duration_since(since) >= CROWDED_FOR => {
                Phase::StepBack { rounds: 0 }
            }
            Phase::Crowded { position, since } => {
                self.trim_for_loss(round);
                Phase::Crowded {
                    position: (position + 1) % CROWDED_GAINS.len(),
                    since,
                }
            }
            Phase::StepBack { .. } if calm => self.enter_cruise(now),
            Phase::StepBack { rounds } if rounds + 1 >= STEP_BACK_ROUNDS => self.enter_crowded(now),
            Phase::StepBack { rounds } => Phase::StepBack { rounds: rounds + 1 },
        };
    }

    /// Is the window, not the link, what limits the rate? Then the round says nothing of the link,
    /// and an older and greater rate stays true: or else a wrong trim would feed on itself.
    fn holds_back(&self, round: &Round) -> bool {
        let allowed = match self.phase {
            Phase::Cruise { position, .. } => CRUISE_GAINS[position] * self.trim,
            Phase::Startup { .. }
            | Phase::Hold { .. }
            | Phase::Drain { .. }
            | Phase::Crowded { .. }
            | Phase::StepBack { .. } => return false,
        };
        let rate = self.rate.get().unwrap_or(0);
        allowed < 1.0 && round.rate_max > scaled(rate, allowed * 0.8)
    }

    fn end_startup_round(&self, round: &Round, full_rate: u64, stalled: u32) -> Phase {
        let rate = self.rate.get().unwrap_or(0);
        if rate >= scaled(full_rate, STARTUP_GROWTH) {
            return Phase::Startup {
                full_rate: rate,
                stalled: 0,
            };
        }
        if round.app_limited {
            return Phase::Startup { full_rate, stalled };
        }
        if stalled + 1 >= STARTUP_STALLED_ROUNDS || round.lost_share() > STARTUP_LOSS {
            return Phase::Drain { rounds: 0 };
        }
        Phase::Startup {
            full_rate,
            stalled: stalled + 1,
        }
    }

    fn enter_cruise(&mut self, now: Instant) -> Phase {
        self.trim = 1.0;
        Phase::cruise(now, self.rate.get().unwrap_or(0))
    }

    fn enter_crowded(&mut self, now: Instant) -> Phase {
        self.trim = 1.0;
        Phase::Crowded {
            position: 0,
            since: now,
        }
    }

    fn end_cruise_round(
        &mut self,
        now: Instant,
        round: &Round,
        base: Duration,
        queue: Duration,
    ) -> Phase {
        let Phase::Cruise {
            position,
            boost,
            rate_before,
            calm_at,
        } = self.phase
        else {
            return self.phase;
        };
        let target = self.target();
        let calm = queue <= target;
        if queue > base / 2 && round.rate_max < scaled(self.rate.get().unwrap_or(0), SLOWER) {
            // The link became slower. The filter would believe in the old rate for ten rounds,
            // each as long as the queue that the old rate builds.
            self.rate.restart(self.full_rounds, round.rate_max);
            return Phase::Drain { rounds: 0 };
        }
        if !calm {
            let over = (queue - target).as_secs_f64() / (base + queue).as_secs_f64();
            self.trim = (self.trim * (1.0 - 0.7 * over)).max(TRIM_MIN);
        } else if queue < target / 2 {
            self.trim = (self.trim + 0.05).min(1.0);
        }
        self.trim_for_loss(round);
        let calm_at = if calm { now } else { calm_at };
        let patience = (base * 10).max(Duration::from_secs(1));
        if self.trim < CROWDED_TRIM && now.duration_since(calm_at) > patience {
            return self.enter_crowded(now);
        }
        let rate = self.rate.get().unwrap_or(0);
        if position == PROBE_END && calm && rate > scaled(rate_before, PROBE_GROWTH) {
            // The link became faster: look for its end with ever longer steps.
            let boost = (boost + PROBE_BOOST.0).min(PROBE_BOOST.1);
            return Phase::Cruise {
                position: 0,
                boost,
                rate_before: rate,
                calm_at,
            };
        }
        let boost = if position == PROBE_END { 0.0 } else { boost };
        let position = (position + 1) % CRUISE_GAINS.len();
        let rate_before = if position == 0 { rate } else { rate_before };
        Phase::Cruise {
            position,
            boost,
            rate_before,
            calm_at,
        }
    }

    fn trim_for_loss(&mut self, round: &Round) {
        if round.ecn || round.lost_share() > CRUISE_LOSS {
            self.trim = (self.trim * 0.85).max(TRIM_MIN);
        }
    }

    fn set_window(&mut self) {
        let Some(bdp) = self.bdp() else {
            self.window = self.window.max(WINDOW_MIN_PACKETS * self.mtu);
            return;
        };
        let window = match self.phase {
            Phase::Startup { .. } => {
                let most = scaled(bdp, STARTUP_GAIN_MAX) + STARTUP_EXTRA_PACKETS * self.mtu;
                if self.full_rounds >= 2 {
                    self.window.min(most)
                } else {
                    self.window
                }
            }
            Phase::Hold { window_max } => window_max.min(scaled(bdp, HOLD_GAIN)),
            Phase::Drain { .. } => scaled(bdp, DRAIN_GAIN),
            Phase::Cruise {
                position, boost, ..
            } => {
                let boost = if position <= PROBE_END { boost } else { 0.0 };
                let gain = CRUISE_GAINS[position] + boost;
                scaled(bdp, gain * self.trim) + CRUISE_EXTRA_PACKETS * self.mtu
            }
            Phase::Crowded { position, .. } => scaled(bdp, CROWDED_GAINS[position] * self.trim),
            Phase::StepBack { .. } => scaled(bdp, STEP_BACK_GAIN),
        };
        self.window = window.max(WINDOW_MIN_PACKETS * self.mtu);
    }

    /// Bandwidth-delay product. The base is not known well before Cruise: Startup's rounds have
    /// its own queue in them.
    fn bdp(&self) -> Option<u64> {
        let rtt = match self.phase {
            Phase::Startup { .. } | Phase::Hold { .. } | Phase::Drain { .. } => self.rtt.get()?,
            Phase::Cruise { .. } | Phase::Crowded { .. } | Phase::StepBack { .. } => {
                self.base_rtt()?
            }
        };
        Some(scaled(self.rate.get()?, rtt.max(RTT_FLOOR).as_secs_f64()))
    }

    /// Round trip time without a queue, jitter included.
    fn base_rtt(&self) -> Option<Duration> {
        let jittered = self.rtt.get()? + self.jitter();
        Some(self.base.get()?.max(jittered))
    }

    /// How far a round's packets lie above the quickest of them, on most rounds, when the batches
    /// that we send are not the reason.
    fn jitter(&self) -> Duration {
        let batch = self.rate.get().map_or(0.0, |rate| {
            (BATCH_PACKETS * self.mtu) as f64 / rate.max(1) as f64
        });
        let spread = self.spread.get().unwrap_or_default();
        spread.saturating_sub(Duration::from_secs_f64(batch))
    }

    /// The queue that is allowed.
    fn target(&self) -> Duration {
        let rtt = self.rtt.get().unwrap_or_default();
        let quiet = (rtt / 10).clamp(Duration::from_millis(3), Duration::from_millis(15));
        quiet + self.jitter()
    }

    fn rtt_window(&self) -> Duration {
        match self.phase {
            Phase::Crowded { .. } | Phase::StepBack { .. } => RTT_WINDOW_CROWDED,
            Phase::Startup { .. }
            | Phase::Hold { .. }
            | Phase::Drain { .. }
            | Phase::Cruise { .. } => RTT_WINDOW,
        }
    }
}
