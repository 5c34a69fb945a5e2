//! The machine: acknowledgements and losses in, a window out. No clock, no I/O.

use std::time::{Duration, Instant};

use super::flight::Flight;
use super::path::PathModel;
use super::phase::{
    CROWDED_FOR, CROWDED_GAINS, CROWDED_TRIM, CRUISE_GAINS, CRUISE_LOSS, DRAIN_GAIN, DRAIN_ROUNDS,
    HOLD_GAIN, PROBE_BOOST, PROBE_END, PROBE_GROWTH, Phase, SLOWER, STARTUP_GAIN_MAX,
    STARTUP_GROWTH, STARTUP_LOSS, STARTUP_SAMPLES, STARTUP_STALLED_ROUNDS, STEP_BACK_GAIN,
    STEP_BACK_ROUNDS, TRIM_MIN, USUAL_LOSS_ROUNDS, YIELD_GAINS, YIELD_RTT_WINDOW, YIELD_TRIM_MIN,
};
use super::rounds::Round;
use super::{Estimate, Mode, Shaping, scaled};

/// Without an acknowledgement for this long, and four round trips, the path was silent.
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// 46 KB: reaches a link of 100 Mbit/s and 50 ms two round trips earlier than ten packets do.
const INITIAL_WINDOW_PACKETS: u64 = 32;
const WINDOW_MIN_PACKETS: u64 = 4;
/// On top of every Cruise window: acknowledgements cover two packets, batches ten.
const CRUISE_EXTRA_PACKETS: u64 = 4;
const STARTUP_EXTRA_PACKETS: u64 = 10;

/// The controller's state. See the folder's doc for the diagram.
#[derive(Debug, Clone)]
pub struct Machine {
    shaping: Shaping,
    phase: Phase,
    window: u64,
    /// Scales the window down while the queue is above its target.
    trim: f64,
    path: PathModel,
    flight: Flight,
    round: Round,
    queue: Option<Duration>,
    /// Greatest rate sample of the round before.
    rate_before: u64,
    /// Moving average of the rounds' lost share.
    usual_loss: f64,
    last_ack: Option<Instant>,
    /// Packets sent up to here were under way during a silence: their round trip time is its
    /// length.
    silent_until: Option<Instant>,
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
            queue: None,
            rate_before: 0,
            usual_loss: 0.0,
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
        Estimate {
            rate_bytes_per_s: self.path.recent_rate(),
            rtt_min: self.path.rtt(),
            queueing: self.queue,
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
            if let Phase::Cruise { calm_at, .. } = &mut self.phase {
                *calm_at = now;
            }
        }
        self.last_ack = Some(now);
    }

    /// Do all of the round's packets find a queue?
    fn packets_are_late(&self, now: Instant) -> bool {
        let (Some(least), Some(rtt)) = (self.round.rtt_min_of(STARTUP_SAMPLES), self.path.rtt())
        else {
            return false;
        };
        let tolerance = (rtt / 8).clamp(Duration::from_millis(2), Duration::from_millis(16));
        // As many acknowledgements at one instant may be the end of a nap.
        let spread = self.round.age(now) > rtt / 4;
        self.path.rate().is_some() && spread && least > rtt + tolerance
    }

    fn end_round(&mut self, now: Instant, round: &Round) {
        if !round.app_limited {
            self.path.age_rates(self.holds_back(round));
        }
        let Some(queue) = self.path.end_round(now, self.rtt_window(), round) else {
            return;
        };
        // What a round sees alone is a nap of one of the hosts, not a queue.
        let standing = self.queue.map_or(queue, |before| before.min(queue));
        self.queue = Some(queue);
        let queue = standing;
        self.usual_loss += (round.lost_share() - self.usual_loss) / USUAL_LOSS_ROUNDS;
        let calm = queue <= self.target();
        self.phase = match self.phase {
            Phase::Startup { full_rate, stalled } => {
                self.end_startup_round(round, full_rate, stalled)
            }
            Phase::Hold { .. } => Phase::Drain {
                rounds: 0,
                boost: 0.0,
            },
            Phase::Drain { rounds, boost } if calm || rounds + 1 >= DRAIN_ROUNDS => {
                self.enter_cruise(now, boost)
            }
            Phase::Drain { rounds, boost } => Phase::Drain {
                rounds: rounds + 1,
                boost,
            },
            Phase::Cruise {
                position,
                boost,
                rate_before,
                calm_at,
            } => {
                let calm_at = if calm { now } else { calm_at };
                self.trim_for_queue(queue);
                self.trim_for_loss(round);
                if self.budget().is_some() {
                    // Whoever fills the queue, this flow makes room; its rate says nothing.
                    self.next_in_cycle(
                        calm,
                        Phase::Cruise {
                            position,
                            boost,
                            rate_before,
                            calm_at,
                        },
                    )
                } else if self.is_slower(round, queue) {
                    self.path.restart_rate(round.rate_max.max(self.rate_before));
                    // It may have been a long nap: look soon, and in a large step.
                    Phase::Drain {
                        rounds: 0,
                        boost: PROBE_BOOST.0,
                    }
                } else if self.is_crowded(now, calm_at) {
                    self.enter_crowded(now)
                } else {
                    self.next_in_cycle(
                        calm,
                        Phase::Cruise {
                            position,
                            boost,
                            rate_before,
                            calm_at,
                        },
                    )
                }
            }
            Phase::Crowded { .. } | Phase::StepBack { .. } if self.budget().is_some() => {
                self.enter_cruise(now, 0.0)
            }
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
            Phase::StepBack { .. } if calm => self.enter_cruise(now, 0.0),
            Phase::StepBack { rounds } if rounds + 1 >= STEP_BACK_ROUNDS => self.enter_crowded(now),
            Phase::StepBack { rounds } => Phase::StepBack { rounds: rounds + 1 },
        };
        self.rate_before = round.rate_max;
    }

    /// Is the window, not the link, what limits the rate? Then the round says nothing of the link,
    /// and an older and greater rate stays true: or else a wrong trim would feed on itself.
    fn holds_back(&self, round: &Round) -> bool {
        let Phase::Cruise { position, .. } = self.phase else {
            return false;
        };
        let allowed = self.gains()[position] * self.trim;
        let rate = self.path.rate().unwrap_or(0);
        allowed < 1.0 && round.rate_max > scaled(rate, allowed * 0.8)
    }

    fn end_startup_round(&self, round: &Round, full_rate: u64, stalled: u32) -> Phase {
        let rate = self.path.rate().unwrap_or(0);
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

    fn enter_cruise(&mut self, now: Instant, boost: f64) -> Phase {
        self.trim = 1.0;
        Phase::cruise(now, self.path.rate().unwrap_or(0), boost)
    }

    fn enter_crowded(&mut self, now: Instant) -> Phase {
        self.trim = 1.0;
        Phase::Crowded {
            position: 0,
            since: now,
        }
    }

    fn trim_for_queue(&mut self, queue: Duration) {
        let target = self.target();
        if queue > target {
            let rtt = self.path.base().unwrap_or_default() + queue;
            let over = (queue - target).as_secs_f64() / rtt.as_secs_f64();
            self.trim = (self.trim * (1.0 - 0.7 * over)).max(self.trim_min());
        } else if queue < target / 2 {
            self.trim = (self.trim + 0.05).min(1.0);
        }
    }

    fn trim_for_loss(&mut self, round: &Round) {
        if round.ecn || round.lost_share() > self.usual_loss + CRUISE_LOSS {
            self.trim = (self.trim * 0.85).max(self.trim_min());
        }
    }

    /// Did the link become slower? The rate filter would believe in the old rate for ten rounds,
    /// each as long as the queue that the old rate builds.
    fn is_slower(&self, round: &Round, queue: Duration) -> bool {
        let base = self.path.base().unwrap_or_default();
        let rate = self.path.rate().unwrap_or(0);
        queue > (base / 2).max(self.target())
            && round.rate_max.max(self.rate_before) < scaled(rate, SLOWER)
    }

    /// Does the queue stay although this flow makes room?
    fn is_crowded(&self, now: Instant, calm_at: Instant) -> bool {
        let patience = self.path.base().unwrap_or_default() * 10;
        let patience = patience.max(Duration::from_secs(1));
        self.trim < CROWDED_TRIM && now.duration_since(calm_at) > patience
    }

    fn next_in_cycle(&self, calm: bool, phase: Phase) -> Phase {
        let Phase::Cruise {
            position,
            boost,
            rate_before,
            calm_at,
        } = phase
        else {
            return phase;
        };
        let rate = self.path.rate().unwrap_or(0);
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

    /// Queue that the operator allows; `None` in mode fill.
    fn budget(&self) -> Option<Duration> {
        match self.shaping.mode() {
            Mode::Fill => None,
            Mode::Yield { queueing } => Some(queueing),
        }
    }

    fn target(&self) -> Duration {
        self.path.target(self.budget())
    }

    fn gains(&self) -> &'static [f64; 8] {
        if self.budget().is_some() {
            &YIELD_GAINS
        } else {
            &CRUISE_GAINS
        }
    }

    fn trim_min(&self) -> f64 {
        if self.budget().is_some() {
            YIELD_TRIM_MIN
        } else {
            TRIM_MIN
        }
    }

    fn rtt_window(&self) -> Duration {
        if self.budget().is_some() && self.trim < CROWDED_TRIM {
            YIELD_RTT_WINDOW
        } else {
            self.phase.rtt_window()
        }
    }

    fn set_window(&mut self) {
        let mut window = self.wanted_window().unwrap_or(self.window);
        if let Some((least, most)) = self.shaped_window() {
            window = window.max(least).min(most);
        }
        self.window = window.max(WINDOW_MIN_PACKETS * self.path.mtu);
    }

    /// Least and greatest window by the operator's rates: a rate is a window per round trip, the
    /// queue in it included.
    fn shaped_window(&self) -> Option<(u64, u64)> {
        let rtt = self.path.base()? + self.queue.unwrap_or_default();
        let window = |rate| scaled(rate, rtt.as_secs_f64());
        let mtu = self.path.mtu;
        let least = self.budget().map_or(0, |_| {
            window(self.shaping.bytes_min(mtu, self.path.greatest_rate()))
        });
        let most = self.shaping.bytes_max(mtu).map_or(u64::MAX, window);
        Some((least, most))
    }

    /// Is the operator's cap what limits the rate?
    fn is_capped(&self) -> bool {
        self.shaped_window()
            .is_some_and(|(_, most)| self.window >= most)
    }

    /// `None` while the path is unknown.
    fn wanted_window(&self) -> Option<u64> {
        let mtu = self.path.mtu;
        Some(match self.phase {
            Phase::Startup { .. } if self.path.rounds() < 2 => self.window,
            Phase::Startup { .. } => {
                let most = scaled(self.path.bdp_early()?, STARTUP_GAIN_MAX);
                self.window.min(most + STARTUP_EXTRA_PACKETS * mtu)
            }
            Phase::Hold { window_max } => window_max.min(scaled(self.path.bdp_early()?, HOLD_GAIN)),
            Phase::Drain { .. } => scaled(self.path.bdp_early()?, DRAIN_GAIN),
            Phase::Cruise {
                position, boost, ..
            } => {
                let boost = if position <= PROBE_END { boost } else { 0.0 };
                let gain = self.gains()[position] + boost;
                scaled(self.path.bdp()?, gain * self.trim) + CRUISE_EXTRA_PACKETS * mtu
            }
            Phase::Crowded { position, .. } => {
                scaled(self.path.bdp()?, CROWDED_GAINS[position] * self.trim)
            }
            Phase::StepBack { .. } => scaled(self.path.bdp()?, STEP_BACK_GAIN),
        })
    }
}
