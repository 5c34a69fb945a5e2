//! The source's half of the handover: from `Loaded` to the outcome, and every way out before the
//! point of no return (S1, S2).

use std::time::{Duration, Instant};

use super::machine::{ANSWER_MAX, Source, Stage, State};
use super::{Action, Mark, Phase};
use crate::block::Root;
use crate::session::{Outcome, VmMigration};
use crate::wire::{AbortCode, Frame, RunState, Verdict};

/// How often a doubtful source asks again.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the source waits for the target's `Settled` after Running.
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// How long a failed attempt waits for QEMU to say that the guest is back.
const RETURN_MAX: Duration = Duration::from_secs(30);

impl Source {
    pub(super) fn finish_pages(&mut self, now: Instant) {
        if self.state == State::Completing && !self.shut_given {
            self.complete(now);
        }
    }

    pub(super) fn loaded(&mut self, now: Instant, root: Root) {
        if self.root != Some(root) {
            self.fail(
                now,
                AbortCode::Memory,
                "the target's ledger root differs".into(),
            );
            return;
        }
        self.enter(now, State::Completing, Some(ANSWER_MAX));
        self.act(Action::Phase(Phase::Complete));
        if self.absent_pages > 0 {
            self.act(Action::Push);
        }
        if self.proved {
            self.complete(now);
        }
    }

    /// Loaded and proved: SHUT(0) lets source QEMU complete (S1).
    pub(super) fn complete(&mut self, now: Instant) {
        self.shut_given = true;
        self.act(Action::Shut);
        self.completed_check(now);
    }

    pub(super) fn vm_migration(&mut self, now: Instant, status: VmMigration) {
        match status {
            VmMigration::Other => {}
            VmMigration::Completed => {
                self.completed = true;
                if self.state == State::Returning && self.shut_given {
                    self.give_back();
                } else {
                    self.completed_check(now);
                }
            }
            VmMigration::Failed(detail) => {
                self.fail(
                    now,
                    AbortCode::Qemu,
                    format!("source QEMU's migration ended: {detail}"),
                );
                // After SHUT(0) QEMU may have stayed paused.
                if self.state == State::Returning && self.shut_given && !self.completed {
                    self.completed = true;
                    self.give_back();
                }
            }
        }
    }

    /// `completed` and `postmigrate` are seen, and no RESUME since STOP: only then intent.
    pub(super) fn completed_check(&mut self, now: Instant) {
        if self.state != State::Completing || !self.completed || !self.shut_given {
            return;
        }
        let Some(root) = self.root else { return };
        if self.resumed_since_stop {
            self.fail(
                now,
                AbortCode::Qemu,
                "the guest resumed during handover".into(),
            );
            return;
        }
        self.enter(now, State::Intent, None);
        self.act(Action::Journal(Mark::Intent {
            target_incarnation: self.config.target_incarnation,
            root,
            run_state: self.commit_run_state(),
        }));
    }

    /// A guest that stopped by itself (operator, suspend, I/O error) is not run by the move.
    pub(super) fn commit_run_state(&self) -> RunState {
        if self.stopped_unasked {
            RunState::Paused
        } else {
            self.config.run_state
        }
    }

    pub(super) fn journaled(&mut self, now: Instant, result: Result<(), String>) {
        match (self.state, result) {
            // Commit has not left, and the guest runs here.
            (State::Intent, Ok(())) if self.resumed_since_stop => {
                self.state = State::Completing;
                let detail = "the guest resumed during handover".into();
                self.fail(now, AbortCode::Qemu, detail);
            }
            (State::Intent, Ok(())) => {
                let Some(root) = self.root else { return };
                self.enter(now, State::Committed, Some(ANSWER_MAX));
                self.act(Action::Phase(Phase::Commit));
                self.act(Action::Send(Frame::Commit {
                    attempt: self.config.attempt,
                    target_incarnation: self.config.target_incarnation,
                    root,
                    run_state: self.commit_run_state(),
                }));
            }
            // A failed intent write: this process never sends Commit (S2).
            (State::Intent, Err(detail)) => {
                self.state = State::Completing;
                self.fail(now, AbortCode::Resources, format!("journal: {detail}"));
            }
            (_, Ok(())) => {}
            (_, Err(detail)) => tracing::warn!(detail, "journal entry not durable"),
        }
    }

    pub(super) fn vm_resumed(&mut self, now: Instant) {
        self.resumed_since_stop = true;
        match (self.state.stage(), self.state) {
            (_, State::Returning) => self.finish(),
            // A pause and resume by the operator while pages flow is no end of the attempt.
            (_, State::Waiting | State::Preparing | State::Layout | State::Precopy) => {
                self.stopped_unasked = false;
                self.config.run_state = RunState::Running;
            }
            (Stage::BeforeIntent, _) => {
                self.fail(
                    now,
                    AbortCode::Qemu,
                    "the guest resumed during handover".into(),
                );
            }
            (_, State::Intent) => tracing::warn!("the guest runs here: Commit will not leave"),
            (Stage::PastIntent | Stage::Ending, _) => {
                tracing::error!("the source's guest resumed after intent");
            }
        }
    }

    pub(super) fn vm_gone(&mut self, now: Instant, detail: &str) {
        match self.state.stage() {
            Stage::BeforeIntent => {
                self.fail(
                    now,
                    AbortCode::Qemu,
                    format!("source QEMU is gone: {detail}"),
                );
                self.finish();
            }
            // From intent on a dead source QEMU changes nothing, but for the pages that it holds.
            Stage::PastIntent => self.memory_gone(now, detail),
            Stage::Ending => self.finish(),
        }
    }

    pub(super) fn peer_lost(&mut self, now: Instant, detail: &str) {
        match (self.state.stage(), self.state) {
            (Stage::BeforeIntent, _) => {
                self.fail(
                    now,
                    AbortCode::Link,
                    format!("link to the target lost: {detail}"),
                );
            }
            (Stage::PastIntent, State::Settling) => self.finish(),
            (Stage::PastIntent, State::Holding) => self.act(Action::Reconnect),
            // While intent is being written nothing is sent: the answer sends Commit into
            // nothing, then asks.
            (Stage::PastIntent, State::Intent) | (Stage::Ending, _) => {}
            (Stage::PastIntent, _) => self.doubt(now, detail),
        }
    }

    pub(super) fn doubt(&mut self, now: Instant, detail: &str) {
        self.outcome = Some(Outcome::Doubt {
            detail: detail.to_owned(),
        });
        self.enter(now, State::Doubt, Some(ASK_INTERVAL));
        self.act(Action::Reconnect);
    }

    pub(super) fn reconnected(&mut self, now: Instant) {
        if matches!(self.state, State::Doubt | State::Holding) {
            if self.state == State::Doubt {
                self.enter(now, State::Doubt, Some(ANSWER_MAX));
            }
            self.act(Action::Send(Frame::Ask {
                attempt: self.config.attempt,
                verdict: Verdict::Unknown,
                epoch: self.config.epoch,
            }));
        }
    }

    pub(super) fn verdict(&mut self, now: Instant, verdict: Verdict) {
        match verdict {
            Verdict::Running => self.arrived(now),
            // Durable words of the target that it will never run: the guest is ours again (S2).
            Verdict::Refused | Verdict::NeverRan => {
                self.outcome = Some(Outcome::Stayed {
                    code: AbortCode::Qemu,
                    detail: format!("the target answered {verdict:?} to Commit"),
                });
                self.answered = Some(self.config.attempt);
                self.enter(now, State::Returning, Some(RETURN_MAX));
                self.give_back();
            }
            // It is on its way to running, or it does not know: ask again.
            Verdict::Committed | Verdict::Unknown | Verdict::Stayed => {
                self.enter(now, State::Doubt, Some(ASK_INTERVAL));
            }
        }
    }

    /// The guest is the target's, and so is every page of it.
    pub(super) fn arrived(&mut self, now: Instant) {
        if self.absent_pages > 0 {
            self.hold_pages(now);
            return;
        }
        self.outcome = Some(Outcome::Arrived);
        self.enter(now, State::Settling, Some(SETTLE_MAX));
        self.act(Action::Phase(Phase::Settle));
        self.act(Action::Journal(Mark::Settled(Outcome::Arrived)));
        self.act(Action::Send(Frame::Settled {
            attempt: self.config.attempt,
        }));
        self.act(Action::Retire);
    }

    /// Before the point of no return: the guest stays at, or goes back to, the source.
    pub(super) fn fail(&mut self, now: Instant, code: AbortCode, detail: String) {
        if self.state.stage() != Stage::BeforeIntent {
            return;
        }
        tracing::info!(state = ?self.state, detail, "attempt ends, guest stays");
        let captured = self.state != State::Waiting;
        self.act(Action::Send(Frame::Abort {
            code,
            detail: detail.clone(),
        }));
        self.outcome = Some(Outcome::Stayed { code, detail });
        self.enter(now, State::Returning, Some(RETURN_MAX));
        if !captured {
            self.finish();
        } else if self.shut_given {
            self.give_back();
        } else {
            self.act(Action::CloseCapture);
            // QEMU does not resume a guest that was stopped before its end of the stream.
            if !self.is_stopped() || self.commit_run_state() == RunState::Paused {
                self.finish();
            }
        }
    }

    /// SHUT(0) was given: only `cont` brings the guest back, and QEMU takes it in `postmigrate`,
    /// not on the way there.
    pub(super) fn give_back(&mut self) {
        if self.commit_run_state() == RunState::Paused || self.resumed_since_stop {
            self.finish();
        } else if self.completed {
            self.act(Action::Continue);
        }
    }

    pub(super) fn timer(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match (self.state.stage(), self.state) {
            (_, State::Committed) => self.doubt(now, "the target did not answer Commit"),
            (_, State::Doubt) => self.doubt(now, "the target does not answer"),
            (_, State::Settling) => self.finish(),
            (_, State::Returning) => {
                tracing::error!("QEMU did not say that the guest runs again");
                self.finish();
            }
            (Stage::BeforeIntent, state) => {
                let detail = format!("no progress in {state:?} within its limit");
                self.fail(now, AbortCode::Link, detail);
            }
            (Stage::PastIntent | Stage::Ending, _) => {}
        }
    }

    pub(super) fn finish(&mut self) {
        if self.state == State::Done {
            return;
        }
        let outcome = self.outcome.clone().unwrap_or(Outcome::Stayed {
            code: AbortCode::Operator,
            detail: "ended before it began".into(),
        });
        if outcome != Outcome::Arrived {
            self.act(Action::Journal(Mark::Settled(outcome.clone())));
        }
        if let (Some(attempt), Outcome::Stayed { .. }) = (self.answered, &outcome) {
            // Who gave its durable word may rest.
            self.act(Action::Send(Frame::Settled { attempt }));
        }
        self.act(Action::Done(outcome));
        self.state = State::Done;
        self.deadline = None;
    }
}
