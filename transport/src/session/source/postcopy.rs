//! The source's half of post-copy: the guest runs at the target, its last pages are here (S11).
//!
//! ```text
//! Precopy -stuck-> Stopping: lanes held -> Draining: marks, Absent.., Final -> AwaitLoaded: Urgent
//!   Loaded -> lanes go on -> Committed -Running-> Holding -AllPages-> Settling
//!                                       link lost: Ask, the target says what it lacks
//! ```
//!
//! The driver answers `Wanted` and starts anew from `Absent`; here is only who may say what when.

use std::time::Instant;

use super::machine::{Source, State};
use super::{Action, Mark, Phase};
use crate::session::Outcome;
use crate::wire::{Frame, Verdict};

impl Source {
    /// Whether a frame belongs to post-copy, and may come in this state.
    pub(super) fn is_of_post_copy(&self, state: State, frame: &Frame) -> bool {
        let is_loading = matches!(
            state,
            State::Draining
                | State::AwaitLoaded
                | State::Completing
                | State::Intent
                | State::Committed
                | State::Doubt
                | State::Holding
        );
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "all other frames have their own rules"
        )]
        match frame {
            Frame::Wanted { .. } => self.absent_pages > 0 && is_loading,
            Frame::Absent { .. } | Frame::AllPages => state == State::Holding,
            Frame::Answer { .. } | Frame::Abort { .. } => state == State::Holding,
            _ => false,
        }
    }

    pub(super) fn post_copy_frame(&mut self, now: Instant, frame: &Frame) {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the driver does what the other frames ask for"
        )]
        match frame {
            Frame::AllPages => {
                self.absent_pages = 0;
                self.arrived(now);
            }
            Frame::Answer { verdict, .. } if *verdict != Verdict::Running => {
                tracing::warn!(?verdict, "the target has the guest and does not say so");
            }
            Frame::Abort { detail, .. } => {
                tracing::warn!(
                    detail,
                    "the target wants to give up, after the guest ran there"
                );
            }
            _ => {}
        }
    }

    /// The guest is the target's; this QEMU stays as it is until the target has every page.
    pub(super) fn hold_pages(&mut self, now: Instant) {
        if self.state == State::Holding {
            return;
        }
        self.enter(now, State::Holding, None);
        self.act(Action::Phase(Phase::PostCopy));
        self.act(Action::Journal(Mark::Holding));
    }

    /// Pages may be read from elsewhere; if not, the guest at the target waits for ever.
    pub(super) fn memory_gone(&mut self, now: Instant, detail: &str) {
        if self.state == State::Holding && self.absent_pages > 0 {
            tracing::error!(
                detail,
                "source QEMU has ended while the guest at the target lacks pages of it"
            );
            self.outcome = Some(Outcome::Doubt {
                detail: format!("source QEMU ended before the target had every page: {detail}"),
            });
            self.enter(now, State::Holding, None);
            self.finish();
        }
    }
}
