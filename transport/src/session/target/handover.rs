//! The target's half of the handover: from Commit to the outcome, and every way out before it (S2,
//! S3). The mirror of the source's `handover`.

use std::time::Instant;

use super::machine::{ANSWER_MAX, State, Target};
use super::{Action, Mark, Phase};
use crate::block::Root;
use crate::session::Outcome;
use crate::wire::{AbortCode, AttemptId, Frame, RunState, Verdict};

impl Target {
    pub(super) fn commit(
        &mut self,
        now: Instant,
        named: (AttemptId, u64, Root),
        run_state: RunState,
    ) {
        let Some((root, ..)) = self.last else { return };
        if named != (self.config.attempt, self.config.incarnation, root) {
            self.refuse(
                now,
                AbortCode::Protocol,
                "Commit names another attempt, process or image".into(),
            );
            return;
        }
        self.run_state = run_state;
        self.enter(now, State::Rechecking, Some(ANSWER_MAX));
        self.act(Action::Recheck);
    }

    pub(super) fn rechecked(&mut self, now: Instant, result: Result<(), String>) {
        let Some((root, ..)) = self.last else { return };
        match (self.state, result) {
            (State::Rechecking, Ok(())) => {
                self.enter(now, State::Committing, None);
                self.act(Action::Phase(Phase::Commit));
                self.act(Action::Journal(Mark::Committed {
                    root,
                    run_state: self.run_state,
                }));
            }
            (State::Rechecking, Err(detail)) => self.refuse(now, AbortCode::Qemu, detail),
            _ => {}
        }
    }

    pub(super) fn journaled(&mut self, now: Instant, result: Result<(), String>) {
        match (self.state, result) {
            (State::Committing, Ok(())) => {
                self.enter(now, State::Starting, None);
                if self.run_state == RunState::Running && !self.config.stay_paused {
                    self.act(Action::Continue);
                } else {
                    self.guest_is_here(now);
                }
            }
            (State::Committing, Err(detail)) => {
                self.state = State::Rechecking;
                self.refuse(now, AbortCode::Resources, format!("journal: {detail}"));
            }
            (State::Refusing, Ok(())) => {
                if let Some(verdict) = self.refusal {
                    let (attempt, epoch) = (self.config.attempt, self.config.epoch);
                    self.act(Action::Send(Frame::Answer {
                        attempt,
                        verdict,
                        epoch,
                    }));
                }
                self.end_refusal();
            }
            // Not durable: the word must not be given.
            (State::Refusing, Err(detail)) => {
                tracing::error!(detail, "refusal not durable");
                self.end_refusal();
            }
            (_, Ok(())) => {}
            (_, Err(detail)) => tracing::warn!(detail, "journal entry not durable"),
        }
    }

    pub(super) fn vm_resumed(&mut self, now: Instant) {
        match self.state {
            State::Starting => self.guest_is_here(now),
            State::Running | State::Refusing | State::Done => {}
            State::Waiting
            | State::Preparing
            | State::Receiving
            | State::Loading
            | State::Proving
            | State::Loaded
            | State::Rechecking
            | State::Committing => {
                // Somebody else ran it: it must not live on beside the source.
                self.refuse(
                    now,
                    AbortCode::Qemu,
                    "target guest was run before Commit".into(),
                );
            }
        }
    }

    fn guest_is_here(&mut self, now: Instant) {
        self.enter(now, State::Running, None);
        self.act(Action::Send(Frame::Running));
        if self.absent_pages > 0 {
            self.act(Action::Journal(Mark::Filling));
            self.act(Action::Phase(Phase::PostCopy));
            return;
        }
        self.act(Action::Journal(Mark::Running));
        self.act(Action::Phase(Phase::Settle));
        if self.leaving_out {
            self.act(Action::Send(Frame::AllPages));
        }
    }

    pub(super) fn never_ran(&mut self, now: Instant, detail: String) {
        if self.state == State::Starting {
            self.refusal = Some(Verdict::NeverRan);
            self.enter(now, State::Refusing, None);
            self.outcome = Some(Outcome::Stayed {
                code: AbortCode::Qemu,
                detail: detail.clone(),
            });
            self.act(Action::Journal(Mark::NeverRan(detail)));
        }
    }

    pub(super) fn peer_lost(&mut self, now: Instant, detail: &str) {
        if self.owns_guest() {
            self.act(Action::AwaitPeer);
        } else {
            self.refuse(
                now,
                AbortCode::Link,
                format!("link to the source lost: {detail}"),
            );
        }
    }

    /// The operator wants to leave. Before Commit that is a refusal; after it the guest is here, or is
    /// on its way to running, and `resolve` finds out.
    pub(super) fn abort(&mut self, now: Instant, detail: String) {
        match self.state {
            State::Running if self.absent_pages > 0 => self.finish(Outcome::Doubt {
                detail: format!("the guest is here and lacks pages of the source: {detail}"),
            }),
            State::Running => {
                tracing::warn!("the source has not acknowledged the end: `scaleaway resolve` will");
                self.finish(Outcome::Arrived);
            }
            State::Committing | State::Starting => self.finish(Outcome::Doubt { detail }),
            State::Waiting
            | State::Preparing
            | State::Receiving
            | State::Loading
            | State::Proving
            | State::Loaded
            | State::Rechecking
            | State::Refusing
            | State::Done => self.refuse(now, AbortCode::Operator, detail),
        }
    }

    pub(super) fn vm_failed(&mut self, now: Instant, detail: String) {
        match self.state {
            // Whether `cont` ran before QEMU ended cannot be told any more.
            State::Committing | State::Starting => {
                self.finish(Outcome::Doubt {
                    detail: format!("target QEMU failed after Commit was accepted: {detail}"),
                });
            }
            State::Running if self.absent_pages > 0 => self.finish(Outcome::Doubt {
                detail: format!("target QEMU failed while it lacked pages: {detail}"),
            }),
            // The guest was here and has ended; the source still has to be told.
            State::Running => tracing::info!(detail, "target QEMU has ended"),
            State::Waiting
            | State::Preparing
            | State::Receiving
            | State::Loading
            | State::Proving
            | State::Loaded
            | State::Rechecking
            | State::Refusing
            | State::Done => self.refuse(now, AbortCode::Qemu, detail),
        }
    }

    /// Before Commit is accepted: durable refusal, then QEMU ends.
    pub(super) fn refuse(&mut self, now: Instant, code: AbortCode, detail: String) {
        if self.owns_guest() || self.state == State::Refusing {
            return;
        }
        tracing::info!(state = ?self.state, detail, "attempt ends");
        let said_loaded = matches!(self.state, State::Loaded | State::Rechecking);
        self.refusal = said_loaded.then_some(Verdict::Refused);
        if self.refusal.is_none() {
            self.act(Action::Send(Frame::Abort {
                code,
                detail: detail.clone(),
            }));
        }
        self.outcome = Some(Outcome::Stayed {
            code,
            detail: detail.clone(),
        });
        self.enter(now, State::Refusing, None);
        self.act(Action::Journal(Mark::Refused(detail)));
    }

    fn end_refusal(&mut self) {
        self.act(Action::Quit);
        let outcome = self.outcome.clone().unwrap_or(Outcome::Stayed {
            code: AbortCode::Operator,
            detail: "refused".into(),
        });
        self.finish(outcome);
    }

    pub(super) fn timer(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            let detail = format!("no progress in {:?} within its limit", self.state);
            self.refuse(now, AbortCode::Link, detail);
        }
    }

    pub(super) fn finish(&mut self, outcome: Outcome) {
        self.act(Action::Done(outcome));
        self.state = State::Done;
        self.deadline = None;
    }
}
