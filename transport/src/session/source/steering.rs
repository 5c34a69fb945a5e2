//! The source during pre-copy: what QEMU is asked to do next, by the rule in `session::precopy`.

use std::time::{Duration, Instant};

use super::machine::{STOP_MAX, Source, State};
use super::{Action, Sample};
use crate::session::Hold;
use crate::session::precopy::{Decision, WhenStuck};
use crate::wire::AbortCode;

/// What QEMU was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Triggered,
    Open,
    Held,
    /// QEMU will sync without a pause.
    Arming,
    /// It does, and stops the guest at a word.
    Armed,
}

impl Source {
    pub(super) fn sampled(&mut self, now: Instant, sample: Sample) {
        self.rounds.sampled(sample);
        if self.state != State::Precopy || self.is_relay {
            return;
        }
        match self.config.hold {
            Hold::SwitchoverAck if matches!(self.pass, Pass::Held | Pass::Armed) => {
                self.steer(now, sample);
            }
            Hold::SwitchoverAck => {}
            Hold::Starvation if self.rounds.limit_reached(now) => self.end_starvation(now),
            Hold::Starvation => {
                if let Some(rate) = self.rounds.pace(now) {
                    self.act(Action::Pace(rate));
                }
            }
        }
    }

    fn steer(&mut self, now: Instant, sample: Sample) {
        let decision = self.rounds.decide(now);
        match decision {
            Decision::Wait => {}
            Decision::Refresh | Decision::Sync => {
                if decision == Decision::Sync {
                    self.end_round(now);
                }
                self.pass = Pass::Triggered;
                self.act(Action::TriggerPass);
            }
            Decision::Arm => {
                self.end_round(now);
                self.pass = Pass::Arming;
                self.act(Action::Arm);
            }
            Decision::Disarm => {
                self.rounds.disarmed(now);
                self.pass = Pass::Open;
                self.act(Action::Disarm);
            }
            Decision::Throttle(percent) => {
                tracing::info!("the guest's processors are slowed by {percent} %");
                self.rounds.throttled(now, percent);
                self.act(Action::Throttle(percent));
            }
            Decision::Stop | Decision::StopForced => self.stop(now, decision, sample),
            Decision::GiveUp => self.give_up(now),
            Decision::PostCopy => {
                self.leaves_pages = true;
                self.stop(now, decision, sample);
            }
        }
    }

    fn stop(&mut self, now: Instant, decision: Decision, sample: Sample) {
        let predicted = self.rounds.predicted_stop(now);
        tracing::info!(
            ?decision,
            backlog = sample.backlog_pages,
            ?predicted,
            "stop"
        );
        self.end_round(now);
        self.enter(now, State::Stopping, Some(STOP_MAX));
        self.act(if self.pass == Pass::Armed {
            Action::Acknowledge
        } else {
            Action::Release
        });
    }

    /// QEMU decides the stop by itself; a limit is all that can be kept.
    fn end_starvation(&mut self, now: Instant) {
        if self.rounds.policy.when_stuck == WhenStuck::Force {
            self.enter(now, State::Stopping, Some(STOP_MAX));
            self.act(Action::Arm);
        } else {
            self.give_up(now);
        }
    }

    /// A clear word with what would do.
    fn give_up(&mut self, now: Instant) {
        let needs = self
            .rounds
            .stuck_at(now)
            .filter(|least| *least < Duration::MAX);
        let detail = match needs {
            Some(least) => format!(
                "the move does not converge: give --downtime {} or more, --when-stuck force or post-copy, or move when the guest writes less",
                least.as_millis()
            ),
            None => "the move does not converge within its limits: give --when-stuck force or post-copy, or move when the guest writes less".into(),
        };
        self.fail(now, AbortCode::Operator, detail);
    }

    fn end_round(&mut self, now: Instant) {
        if let Some(round) = self.rounds.end_round(now) {
            self.act(Action::Round(round));
        }
    }

    pub(super) fn pass_started(&mut self, now: Instant) {
        self.rounds.synced(now);
        match self.pass {
            Pass::Triggered => {
                self.pass = Pass::Open;
                self.act(Action::OpenPass);
            }
            Pass::Arming => {
                self.pass = Pass::Armed;
                self.rounds.armed(now);
            }
            Pass::Open | Pass::Held | Pass::Armed => {}
        }
    }

    pub(super) fn pass_drained(&mut self, pages: u64) {
        if self.pass == Pass::Open && self.config.hold == Hold::SwitchoverAck {
            self.rounds.pass_drained(pages);
            self.pass = Pass::Held;
            self.act(Action::HoldPass);
        }
    }
}
