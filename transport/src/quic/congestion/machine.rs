//! The machine: acknowledgements and losses in, a window out. No clock, no I/O.

use std::time::{Duration, Instant};

use super::crowd::Crowd;
use super::flight::Flight;
use super::path::PathModel;
use super::phase::{
    DRAIN_ROUNDS, Phase, STARTUP_GROWTH, STARTUP_LOSS, STARTUP_PACKETS, STARTUP_SAMPLES,
    STARTUP_STALLED_ROUNDS, USUAL_LOSS_ROUNDS,
};
use super::recent::Recent;
use super::rounds::{Round, Steady};
use super::window::WINDOW_MIN_PACKETS;
use super::{Estimate, Shaping, scaled};

/// Without an acknowledgement for this long, and four round trips, the path was silent.
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// 46 KB: reaches a link of 100 Mbit/s and 50 ms two round trips earlier than ten packets do.
const INITIAL_WINDOW_PACKETS: u64 = 32;

/// The controller's state. See the folder's doc for the diagram.
#[derive(Debug, Clone)]
pub struct Machine {
    pub(super) shaping: Shaping,
    pub(super) phase: Phase,
    pub(super) window: u64,
    /// Scales the window down while the queue is above its target.
    pub(super) trim: f64,
    pub(super) path: PathModel,
    pub(super) flight: Flight,
    pub(super) round: Round,
    pub(super) recent: Recent,
    pub(super) queue: Option<Duration>,
    /// Greatest rate sample of the round before.
    pub(super) rate_before: u64,
    /// Moving average of the rounds' lost share.
    pub(super) usual_loss: f64,
    /// When the queue was last at its target.
    pub(super) calm_at: Option<Instant>,
    /// How often the rate fell since, and from what.
    pub(super) falls: u32,
    /// Rounds since that lost anything.
    pub(super) lossy_rounds: u32,
    /// Rounds in a row with a queue beyond its target.
    pub(super) rounds_over: u32,
    pub(super) rate_before_falls: u64,
    /// When the base was last seen, all but for a part of the target.
    pub(super) base_seen_at: Option<Instant>,
    /// The window that competed last, and when that ended.
    pub(super) last_crowd: Option<(Instant, Crowd)>,
    /// Rounds without a queue of our own that looked alike.
    pub(super) steady: Steady,
    pub(super) last_ack: Option<Instant>,
    /// Packets sent up to here were under way during a silence: their round trip time is its
    /// length.
    pub(super) silent_until: Option<Instant>,
}

impl Machine {
    /// A controller for a path on which `mtu` bytes of UDP payload pass.
    pub fn new(mtu: u16, shaping: Shaping) -> Self {
        Self {
            shaping,
            phase: Phase::STARTUP,
            window: INITIAL_WINDOW_PACKETS * u64::from(mtu),
            trim: 1.0,
            path: PathModel::new(mtu),
            flight: Flight::default(),
            round: Round::default(),
            recent: Recent::default(),
            queue: None,
            rate_before: 0,
            usual_loss: 0.0,
            calm_at: None,
            falls: 0,
            lossy_rounds: 0,
            rounds_over: 0,
            rate_before_falls: 0,
            base_seen_at: None,
            last_crowd: None,
            steady: Steady::default(),
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
        INITIAL_WINDOW_PACKETS * self.path.mtu
    }

    /// What is known of the path.
    pub fn estimate(&self) -> Estimate {
        let spread = self.recent.spread();
        Estimate {
            rate_bytes_per_s: self.path.recent_rate(),
            rate_low_bytes_per_s: spread.rate_low,
            rate_high_bytes_per_s: spread.rate_high,
            rtt_min: self.path.rtt(),
            queueing: self.queue,
            queueing_p50: spread.queueing_p50,
            queueing_p95: spread.queueing_p95,
            phase: self.phase.name(),
        }
    }

    /// The path carries packets of `mtu` bytes.
    pub fn on_mtu(&mut self, mtu: u16) {
        self.path.mtu = u64::from(mtu);
        self.window = self.window.max(WINDOW_MIN_PACKETS * self.path.mtu);
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
            self.path.take_rtt(now, self.rtt_window(), rtt);
            self.round.acked(now, bytes, rtt);
        }
        if let (Phase::Startup { .. }, false) = (self.phase, app_limited) {
            self.window += bytes;
        }
    }

    /// An ACK frame is at its end.
    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        // A cap says as little of the link as an application that has nothing to send.
        self.round.app_limited |= app_limited || self.is_capped();
        let Some(sample) = self.flight.end_acks(now, in_flight) else {
            return;
        };
        self.path.take_rate(sample, app_limited, &mut self.round);
        if self.round.has_ended(sample.delivered_before) {
            let next = Round::begin(self.flight.delivered());
            let round = std::mem::replace(&mut self.round, next);
            self.end_round(now, &round);
        }
        if let (Phase::Startup { .. }, true) = (self.phase, self.packets_are_late(now)) {
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
            if let Some(rate) = self.path.rate() {
                self.path.restart_rate(rate / 2);
                self.window = self.path.bdp().map_or(self.window, |bdp| bdp / 4);
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
            .path
            .rtt()
            .map_or(SILENCE_MIN, |rtt| (rtt * 4).max(SILENCE_MIN));
        if silence.is_some_and(|silence| silence > usual) {
            self.silent_until = self.last_ack;
            self.round = Round::begin(self.flight.delivered());
            self.calm_at = Some(now);
            self.base_seen_at = Some(now);
        }
        self.last_ack = Some(now);
    }

    /// Do all of the round's packets find a queue?
    fn packets_are_late(&self, now: Instant) -> bool {
        let Some(rtt) = self.path.rtt() else {
            return false;
        };
        // As many acknowledgements at one instant may be the end of a nap.
        let spread = self.round.age(now) > rtt / 4;
        let least = self.round.rtt_min_of(STARTUP_SAMPLES);
        self.path.rate().is_some() && spread && least > self.late_after()
    }

    /// Round trip time of a packet that found a queue.
    fn late_after(&self) -> Option<Duration> {
        let rtt = self.path.rtt()?;
        Some(rtt + (rtt / 8).clamp(Duration::from_millis(2), Duration::from_millis(16)))
    }

    fn end_round(&mut self, now: Instant, round: &Round) {
        if !round.app_limited {
            self.path.age_rates(self.holds_back(round));
            self.recent.take_rate(round.rate_max);
        }
        let Some(queue) = self.path.end_round(now, self.rtt_window(), round) else {
            return;
        };
        // What a round sees alone is a nap of one of the hosts, not a queue.
        let standing = self.queue.map_or(queue, |before| before.min(queue));
        self.queue = Some(queue);
        self.recent.take_queue(queue);
        let queue = standing;
        if !matches!(self.phase, Phase::Crowded { .. }) {
            self.usual_loss += (round.lost_share() - self.usual_loss) / USUAL_LOSS_ROUNDS;
        }
        let target = self.target();
        let calm = queue <= target;
        if calm {
            (self.calm_at, self.falls, self.lossy_rounds) = (Some(now), 0, 0);
        } else {
            self.lossy_rounds += u32::from(round.lost_share() > 0.0);
        }
        if self.is_longer(now, round, queue) {
            self.path.restart_rtt(now, round);
            (self.steady, self.trim) = (Steady::default(), 1.0);
            self.phase = self.enter_cruise(0.0);
            return;
        }
        if queue <= target / 4 {
            self.base_seen_at = Some(now);
        }
        self.phase = match self.phase {
            Phase::Startup { full_rate, stalled } => {
                self.end_startup_round(round, full_rate, stalled)
            }
            Phase::Hold { .. } => Phase::Drain {
                rounds: 0,
                boost: 0.0,
            },
            Phase::Drain { rounds, boost } if calm || rounds + 1 >= DRAIN_ROUNDS => {
                self.enter_cruise(boost)
            }
            Phase::Drain { rounds, boost } => Phase::Drain {
                rounds: rounds + 1,
                boost,
            },
            Phase::Cruise { .. } => self.end_cruise_round(now, round, queue),
            Phase::Crowded { .. } | Phase::StepBack { .. } => {
                self.end_crowded_round(now, round, queue)
            }
        };
        self.rate_before = round.rate_max;
    }

    fn end_startup_round(&self, round: &Round, full_rate: u64, stalled: u32) -> Phase {
        let rate = self.path.rate().unwrap_or(0);
        if rate >= scaled(full_rate, STARTUP_GROWTH) {
            return Phase::Startup {
                full_rate: rate,
                stalled: 0,
            };
        }
        if round.app_limited || round.rtt_min_of(STARTUP_PACKETS).is_none() {
            return Phase::Startup { full_rate, stalled };
        }
        // Without a queue a few packets' bad luck may be that much.
        let overflows = round.rtt_mean() > self.late_after() || stalled > 0;
        let lossy = overflows && round.lost_share() > STARTUP_LOSS;
        if stalled + 1 >= STARTUP_STALLED_ROUNDS || lossy {
            return Phase::Drain {
                rounds: 0,
                boost: 0.0,
            };
        }
        Phase::Startup {
            full_rate,
            stalled: stalled + 1,
        }
    }

    pub(super) fn enter_cruise(&mut self, boost: f64) -> Phase {
        self.trim = 1.0;
        Phase::cruise(self.path.rate().unwrap_or(0), boost)
    }
}
