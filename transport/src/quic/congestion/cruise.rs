//! Cruise: following the link, making room, and the way to the crowd and back.

use std::time::{Duration, Instant};

use super::crowd::Crowd;
use super::machine::Machine;
use super::phase::{
    BASE_UNSEEN_MAX, CLAIM, CROWDED_AGAIN, CROWDED_MEMORY, CROWDED_TRIM, CRUISE_GAINS, CRUISE_LOSS,
    FALLS_MAX, LOOK_ROUNDS, PROBE_BOOST, PROBE_END, PROBE_GROWTH, Phase, SLOWER, STEP_BACK_ROUNDS,
    YIELD_BOOST_MAX, YIELD_LEFT_TRIM, YIELD_STEADY, YIELD_STEADY_ROUNDS,
};
use super::rounds::{Round, Steady};
use super::scaled;

impl Machine {
    /// Ends a round of Cruise.
    pub(super) fn end_cruise_round(
        &mut self,
        now: Instant,
        round: &Round,
        queue: Duration,
    ) -> Phase {
        self.trim_for_queue(queue);
        self.trim_for_loss(round);
        // While yielding, the rate of a crowded link says nothing, and there is no competing.
        let competes = self.budget().is_none();
        let again = self
            .last_crowd
            .filter(|(ended, _)| now.saturating_duration_since(*ended) < CROWDED_MEMORY);
        // Soon after a crowded time a fall of the rate is others coming back.
        if competes && again.is_none() && self.falls < FALLS_MAX && self.is_slower(round, queue) {
            if self.falls == 0 {
                self.rate_before_falls = self.path.rate().unwrap_or(0);
            }
            self.falls += 1;
            self.path.restart_rate(round.rate_max.max(self.rate_before));
            // It may have been a long nap: look soon, and in a large step.
            return Phase::Drain {
                rounds: 0,
                boost: PROBE_BOOST.0,
            };
        }
        self.rounds_over = if queue > self.target() {
            self.rounds_over + 1
        } else {
            0
        };
        if let (true, Some((_, crowd))) = (competes && self.rounds_over >= CROWDED_AGAIN, again) {
            let packets = self.kept_packets(round, queue);
            let crowd = crowd.again(now, packets);
            return Phase::Crowded { crowd, since: now };
        }
        if competes && self.is_crowded(now) {
            let crowd = Crowd::begin(now, self.kept_packets(round, queue), queue);
            return Phase::StepBack {
                rounds: 0,
                crowd: Some(crowd),
            };
        }
        let unseen = (competes || self.trim >= CROWDED_TRIM)
            && self
                .base_seen_at
                .is_some_and(|seen| now.saturating_duration_since(seen) > BASE_UNSEEN_MAX);
        if unseen {
            return Phase::StepBack {
                rounds: 0,
                crowd: None,
            };
        }
        self.next_in_cycle(queue <= self.target())
    }

    /// Ends a round among others, or one of stepping back from them.
    pub(super) fn end_crowded_round(
        &mut self,
        now: Instant,
        round: &Round,
        queue: Duration,
    ) -> Phase {
        let calm = queue <= self.target();
        match self.phase {
            Phase::StepBack {
                rounds,
                crowd: None,
            } if rounds + 1 >= LOOK_ROUNDS => {
                self.base_seen_at = Some(now);
                // The look says nothing of whether there is room.
                Phase::cruise(self.path.rate().unwrap_or(0), 0.0)
            }
            Phase::Crowded { crowd, .. }
            | Phase::StepBack {
                crowd: Some(crowd), ..
            } if calm || self.budget().is_some() => {
                if crowd.has_overflowed() {
                    self.last_crowd = Some((now, crowd));
                }
                self.enter_cruise(0.0)
            }
            Phase::Crowded { mut crowd, since } => {
                crowd.end_round(now, round, queue, self.usual_loss);
                let age = now.saturating_duration_since(since);
                if crowd.looks_around(age, queue) {
                    Phase::StepBack {
                        rounds: 0,
                        crowd: Some(crowd),
                    }
                } else {
                    Phase::Crowded { crowd, since }
                }
            }
            Phase::StepBack {
                rounds,
                crowd: Some(crowd),
            } if rounds + 1 >= STEP_BACK_ROUNDS => Phase::Crowded { crowd, since: now },
            Phase::StepBack { rounds, crowd } => Phase::StepBack {
                rounds: rounds + 1,
                crowd,
            },
            other @ (Phase::Startup { .. }
            | Phase::Hold { .. }
            | Phase::Drain { .. }
            | Phase::Cruise { .. }) => other,
        }
    }

    /// Has the path become longer? Then what looks like others' queue does not move while this flow
    /// has all but left.
    pub(super) fn is_longer(&mut self, now: Instant, round: &Round, queue: Duration) -> bool {
        let (rounds_min, time_min, part) = match self.phase {
            // The first round still finds what was sent before it. What overflows is a queue, but the
            // change itself may look like a loss.
            Phase::StepBack {
                rounds: 1..,
                crowd: Some(crowd),
            } if self.lossy_rounds < 2 && !crowd.has_overflowed() => {
                (STEP_BACK_ROUNDS - 1, Duration::ZERO, 100)
            }
            Phase::Cruise { .. } if self.budget().is_some() && self.trim < YIELD_LEFT_TRIM => {
                (YIELD_STEADY_ROUNDS, YIELD_STEADY, 32)
            }
            Phase::Startup { .. }
            | Phase::Hold { .. }
            | Phase::Drain { .. }
            | Phase::Cruise { .. }
            | Phase::Crowded { .. }
            | Phase::StepBack { .. } => {
                self.steady = Steady::default();
                return false;
            }
        };
        let Some(mean) = round.rtt_mean() else {
            return false;
        };
        let (rounds, time) = self.steady.take(now, mean, part);
        rounds >= rounds_min && time >= time_min && queue > self.target()
    }

    /// Is the window, not the link, what limits the rate? Then the round says nothing of the link,
    /// and an older and greater rate stays true: or else a wrong trim would feed on itself.
    pub(super) fn holds_back(&self, round: &Round) -> bool {
        let Phase::Cruise { position, .. } = self.phase else {
            return false;
        };
        let allowed = self.gains()[position] * self.trim;
        let rate = self.path.rate().unwrap_or(0);
        allowed < 1.0 && round.rate_max > scaled(rate, allowed * 0.8)
    }

    /// A window to compete with: what keeps the present share of the link, or a part of what was
    /// had before the others came.
    fn kept_packets(&self, round: &Round, queue: Duration) -> f64 {
        let before = if self.falls > 0 {
            self.rate_before_falls
        } else {
            0
        };
        let rate = round.rate_max.max(scaled(before, CLAIM));
        let rtt = self.path.base().unwrap_or_default() + queue;
        let kept = scaled(rate, rtt.as_secs_f64()).max(self.path.bdp().unwrap_or(0));
        kept as f64 / self.path.mtu as f64
    }

    fn trim_for_queue(&mut self, queue: Duration) {
        let target = self.target();
        if queue > target {
            let rtt = self.path.base().unwrap_or_default() + queue;
            let over = (queue - target).as_secs_f64() / rtt.as_secs_f64();
            self.trim = (self.trim * (1.0 - 0.7 * over)).max(self.trim_min());
        } else if queue < target.mul_f64(0.75) {
            self.trim = (self.trim + 0.04).min(1.0);
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
    fn is_crowded(&self, now: Instant) -> bool {
        let patience = self.path.base().unwrap_or_default() * 10;
        let patience = patience.max(Duration::from_secs(1));
        let makes_room = self.trim < CROWDED_TRIM || self.falls >= FALLS_MAX;
        let waited = self
            .calm_at
            .is_some_and(|calm| now.saturating_duration_since(calm) > patience);
        makes_room && waited
    }

    fn next_in_cycle(&self, calm: bool) -> Phase {
        let Phase::Cruise {
            position,
            boost,
            rate_before,
        } = self.phase
        else {
            return self.phase;
        };
        let rate = self.path.rate().unwrap_or(0);
        if position == PROBE_END && calm && rate > scaled(rate_before, PROBE_GROWTH) {
            // The link became faster: look for its end with ever longer steps.
            let most = self.budget().map_or(PROBE_BOOST.1, |_| YIELD_BOOST_MAX);
            let boost = (boost + PROBE_BOOST.0).min(most);
            return Phase::Cruise {
                position: 0,
                boost,
                rate_before: rate,
            };
        }
        let boost = if position == PROBE_END { 0.0 } else { boost };
        let position = (position + 1) % CRUISE_GAINS.len();
        let rate_before = if position == 0 { rate } else { rate_before };
        Phase::Cruise {
            position,
            boost,
            rate_before,
        }
    }
}
