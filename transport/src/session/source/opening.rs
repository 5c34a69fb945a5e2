//! The source's opening: from `Ready` to open lanes, or to a relay.

use std::time::Instant;

use bytes::Bytes;

use super::machine::{ANSWER_MAX, LAYOUT_MAX, LOADED_MAX, STOP_MAX, Source, State};
use super::{Action, Phase};
use crate::block::{BlockSpec, Root, length_u32};
use crate::wire::limits::BASIS_MAX_DIGESTS;
use crate::wire::{AttemptId, Frame, Verdict, Verify};

impl Source {
    pub(super) fn ready(&mut self, now: Instant, verify: Verify, nonce: [u8; 16]) {
        self.verify = verify;
        self.enter(now, State::Preparing, Some(LAYOUT_MAX));
        self.act(Action::Phase(Phase::Prepare));
        self.act(Action::StartCapture { nonce });
    }

    pub(super) fn answer(&mut self, attempt: AttemptId) {
        let verdict = if attempt == self.config.attempt && !self.is_past_intent() {
            Verdict::Stayed
        } else {
            Verdict::Unknown
        };
        self.act(Action::Send(Frame::Answer {
            attempt,
            verdict,
            epoch: self.config.epoch,
        }));
    }

    pub(super) fn head(
        &mut self,
        now: Instant,
        memory: (Bytes, Vec<BlockSpec>),
        basis: &[[u8; 16]],
    ) {
        if self.state == State::Preparing {
            self.enter(now, State::Layout, Some(LAYOUT_MAX));
            let (head, blocks) = memory;
            self.act(Action::Send(Frame::Layout {
                head,
                blocks,
                basis_ranges: length_u32(basis.len()),
                post_copy: self.config.post_copy,
            }));
            for digests in basis.chunks(BASIS_MAX_DIGESTS) {
                let digests = digests.to_vec();
                self.act(Action::Send(Frame::Basis { digests }));
            }
        }
    }

    /// Before the first page (S4): nothing of the stream has been told to the target.
    pub(super) fn relay(&mut self, now: Instant) {
        if self.state == State::Preparing {
            self.is_relay = true;
            // Nothing is known of pages: neither a ledger nor a proof can be had.
            self.proved = true;
            self.enter(now, State::Layout, Some(ANSWER_MAX));
            self.act(Action::Send(Frame::Relay));
        }
    }

    pub(super) fn open_relay(&mut self, now: Instant) {
        self.act(Action::OpenRelay);
        self.act(Action::ReleaseToQemu);
        if self.is_stopped() {
            self.enter(now, State::Stopping, None);
            self.announce_stop();
        } else {
            self.enter(now, State::Precopy, None);
            self.act(Action::Phase(Phase::Precopy));
        }
    }

    pub(super) fn relayed(&mut self, now: Instant, bytes: u64) {
        if matches!(self.state, State::Precopy | State::Stopping) {
            let root = Root([0; 32]);
            self.root = Some(root);
            self.act(Action::Send(Frame::Final {
                root,
                barrier: 0,
                tail_bytes: bytes,
                missing_taken: 0,
                absent_pages: 0,
            }));
            self.enter(now, State::AwaitLoaded, Some(LOADED_MAX));
            self.act(Action::Phase(Phase::Load));
        }
    }

    pub(super) fn precopy(&mut self, now: Instant) {
        self.rounds.begin(now);
        if self.is_stopped() || self.ram_ended {
            self.enter(now, State::Stopping, Some(STOP_MAX));
            if self.is_stopped() {
                self.announce_stop();
            } else {
                self.act(Action::Phase(Phase::Stop));
            }
            self.captured(now);
        } else {
            self.enter(now, State::Precopy, None);
            self.act(Action::Phase(Phase::Precopy));
        }
    }
}
