//! The target's half of post-copy: the guest runs while its last pages come (S11).
//!
//! ```text
//! Receiving -Final with absent pages-> left out of the ledger, roots equal -> Loading: QEMU discards
//!   them, loads devices, may already ask -> Proving -> Loaded ==Commit==> .. Starting -> Running
//!   Running: Wanted.., Urgent, lanes; link lost: Absent on the next one -AllPages-> as ever
//! ```

use std::time::Instant;

use super::machine::{LOAD_MAX, State, Target};
use super::{Action, Mark, Phase};
use crate::block::Root;
use crate::wire::{AbortCode, Frame};

impl Target {
    /// Frames that the driver deals with, in the states in which they may come.
    pub(super) fn is_of_post_copy(&self, state: State, frame: &Frame) -> bool {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "all other frames have their own rules"
        )]
        match frame {
            Frame::Absent { .. } => state == State::Receiving && self.can_post_copy(),
            _ => false,
        }
    }

    fn can_post_copy(&self) -> bool {
        self.offer.is_some_and(|offer| offer.post_copy)
    }

    /// The barrier is applied, and all pages behind it are named.
    pub(super) fn leave_out(&mut self, now: Instant) {
        if !self.can_post_copy() {
            let detail = "the source keeps pages back that were not offered to come later";
            self.refuse(now, AbortCode::Protocol, detail.into());
        } else if !self.leaving_out {
            self.leaving_out = true;
            let pages = self.absent_pages;
            self.act(Action::LeaveOut { pages });
        }
    }

    pub(super) fn left_out(&mut self, now: Instant, mine: Result<Root, String>) {
        let Some((root, _, tail_bytes)) = self.last else {
            return;
        };
        if self.state != State::Receiving {
            return;
        }
        match mine {
            Err(detail) => self.refuse(now, AbortCode::Protocol, detail),
            Ok(mine) if mine != root => {
                self.refuse(now, AbortCode::Memory, "ledger roots differ".into());
            }
            Ok(_) if tail_bytes != self.tail_bytes => {
                let detail = "device state is incomplete";
                self.refuse(now, AbortCode::Protocol, detail.into());
            }
            Ok(_) => {
                self.enter(now, State::Loading, Some(LOAD_MAX));
                self.act(Action::Phase(Phase::Load));
                let tail = std::mem::take(&mut self.tail);
                self.act(Action::FeedPackage(tail));
            }
        }
    }

    /// QEMU has every page; before Commit that changes nothing yet.
    pub(super) fn all_pages(&mut self) {
        self.absent_pages = 0;
        if self.state == State::Running {
            self.act(Action::Journal(Mark::Running));
            self.act(Action::Phase(Phase::Settle));
            self.act(Action::Send(Frame::AllPages));
        }
    }

    /// The source came back: what does it still hold that is needed here?
    pub(super) fn tell_pages(&mut self) {
        if self.absent_pages > 0 {
            self.act(Action::TellAbsent);
        } else if self.leaving_out {
            self.act(Action::Send(Frame::AllPages));
        }
    }
}
