//! The target's machine: from `Ready` to the outcome.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Action, Config, Input, Mark, Phase};
use crate::block::{BlockSpec, PageRun, Root, index};
use crate::session::Outcome;
use crate::wire::limits::{BASIS_MAX_RANGES, MISSING_MAX_RUNS, TAIL_MAX_BYTES};
use crate::wire::{AbortCode, AttemptId, Frame, Offer, RunState, Verdict, Verify};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Waiting,
    Preparing,
    Receiving,
    Loading,
    Proving,
    Loaded,
    Rechecking,
    Committing,
    Starting,
    Running,
    /// `Refused` or `NeverRan` is being written.
    Refusing,
    Done,
}

/// The machine. See the diagram in [`session`](crate::session).
#[derive(Debug)]
pub struct Target {
    pub(super) config: Config,
    pub(super) state: State,
    pub(super) actions: VecDeque<Action>,
    pub(super) tail: Vec<(Bytes, u32)>,
    pub(super) tail_bytes: u64,
    pub(super) last: Option<(Root, u32, u64)>,
    /// Barrier, root, and pages that did not resolve and have not come again.
    pub(super) applied: Option<(u32, Root, u64)>,
    /// Pages that the source keeps back, as of its last `Final`; 0 once QEMU has every page.
    pub(super) absent_pages: u64,
    /// They are being left out of the ledger.
    pub(super) leaving_out: bool,
    /// Digests that the source has announced.
    pub(super) basis_ranges: usize,
    pub(super) digests: Vec<[u8; 16]>,
    pub(super) basis_awaited: bool,
    pub(super) basis_agreed: Option<Bytes>,
    pub(super) offer: Option<Offer>,
    /// Missing frames sent, and taken by the source at its last `Final`.
    pub(super) missing_sent: u32,
    pub(super) missing_taken: u32,
    /// Runs asked for again, over the whole attempt.
    pub(super) missing_runs: u64,
    pub(super) run_state: RunState,
    pub(super) is_relay: bool,
    pub(super) relay_loaded: bool,
    pub(super) outcome: Option<Outcome>,
    pub(super) refusal: Option<Verdict>,
    pub(super) deadline: Option<Instant>,
}

/// The source answers each step within this.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(30);
/// QEMU opens its incoming side, and this side's replica is read.
const PREPARE_MAX: Duration = Duration::from_secs(90);
/// Runs that may be asked for again in one attempt: a source whose references never resolve is
/// given up.
const MISSING_MAX: u64 = 1 << 20;
/// Loading and proving take longer with more memory.
pub(super) const LOAD_MAX: Duration = Duration::from_secs(120);
/// From Loaded to Commit: the source proves its memory and writes its journal.
const COMMIT_MAX: Duration = Duration::from_secs(120);

impl Target {
    /// A machine that has told the source that it is ready.
    #[must_use]
    pub fn new(now: Instant, config: Config) -> Target {
        let ready = Frame::Ready {
            verify: config.verify,
            qemu: config.qemu.clone(),
            nonce: config.nonce,
        };
        Target {
            config,
            state: State::Waiting,
            actions: VecDeque::from([Action::Send(ready)]),
            tail: Vec::new(),
            tail_bytes: 0,
            last: None,
            applied: None,
            absent_pages: 0,
            leaving_out: false,
            basis_ranges: 0,
            digests: Vec::new(),
            basis_awaited: false,
            basis_agreed: None,
            offer: None,
            missing_sent: 0,
            missing_taken: 0,
            missing_runs: 0,
            run_state: RunState::Paused,
            is_relay: false,
            relay_loaded: false,
            outcome: None,
            refusal: None,
            deadline: Some(now + ANSWER_MAX),
        }
    }

    /// Takes one input; drain [`poll_action`](Self::poll_action) afterwards.
    pub fn handle(&mut self, now: Instant, input: Input) {
        if self.state == State::Done {
            return;
        }
        match input {
            Input::Frame(frame) => self.frame(now, frame),
            Input::PeerLost(detail) => self.peer_lost(now, &detail),
            Input::VmPrepared { offer } => {
                self.offer = Some(offer);
                self.layout_taken(now);
            }
            Input::BasisAgreed { basis } => {
                self.basis_agreed = Some(basis);
                self.layout_taken(now);
            }
            Input::Missing(runs) => self.missing(now, &runs),
            Input::VmFailed(detail) => self.vm_failed(now, detail),
            Input::Applied {
                barrier,
                root,
                missing_pages,
            } => self.barrier_applied(now, (barrier, root, missing_pages)),
            Input::LaneFailed(detail) => self.refuse(now, AbortCode::Protocol, detail),
            Input::VmLoaded => self.vm_loaded(now),
            Input::LeftOut(root) => self.left_out(now, root),
            Input::AllPages => self.all_pages(),
            Input::VmResumed => self.vm_resumed(now),
            Input::Rechecked(result) => self.rechecked(now, result),
            Input::Proved(result) => self.proved(now, result),
            Input::Journaled(result) => self.journaled(now, result),
            Input::NeverRan(detail) => self.never_ran(now, detail),
            Input::Abort(detail) => self.abort(now, detail),
            Input::Timer => self.timer(now),
        }
    }

    /// Next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call with [`Input::Timer`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether Commit was accepted: the guest is this side's.
    #[must_use]
    pub fn owns_guest(&self) -> bool {
        match self.state {
            State::Committing | State::Starting | State::Running => true,
            State::Waiting
            | State::Preparing
            | State::Receiving
            | State::Loading
            | State::Proving
            | State::Loaded
            | State::Rechecking
            | State::Refusing
            | State::Done => false,
        }
    }

    fn frame(&mut self, now: Instant, frame: Frame) {
        match (self.state, frame) {
            (
                State::Waiting,
                Frame::Layout {
                    head,
                    blocks,
                    basis_ranges,
                    post_copy,
                },
            ) => self.layout(now, (head, blocks), (basis_ranges, post_copy)),
            (State::Preparing, Frame::Basis { digests }) => self.basis(now, &digests),
            // The driver answers questions, which end before the guest stops, and has told the hook.
            (State::Receiving, Frame::Query { .. } | Frame::Stopped) => {}
            (State::Waiting, Frame::Relay) => self.relay(now),
            (State::Receiving, Frame::Tail { data, raw_len }) => {
                self.tail_piece(now, data, raw_len)
            }
            (
                State::Receiving,
                Frame::Final {
                    root,
                    barrier,
                    tail_bytes,
                    missing_taken,
                    absent_pages,
                },
            ) => {
                self.last = Some((root, barrier, tail_bytes));
                self.missing_taken = missing_taken;
                self.absent_pages = absent_pages;
                if self.is_relay {
                    self.relay_complete(now);
                } else {
                    self.pages_complete(now);
                }
            }
            (
                State::Loaded,
                Frame::Commit {
                    attempt,
                    target_incarnation,
                    root,
                    run_state,
                },
            ) => {
                self.commit(now, (attempt, target_incarnation, root), run_state);
            }
            (State::Running, Frame::Ask { attempt, epoch, .. })
                if attempt == self.config.attempt && epoch > self.config.epoch =>
            {
                self.give_way(attempt);
            }
            (_, Frame::Ask { attempt, .. }) => self.answer(attempt),
            (state, frame) if self.is_of_post_copy(state, &frame) => {}
            (State::Running, Frame::Settled { attempt })
                if attempt == self.config.attempt && self.absent_pages == 0 =>
            {
                self.act(Action::Send(Frame::Settled { attempt }));
                self.act(Action::Journal(Mark::Settled));
                self.finish(Outcome::Arrived);
            }
            // A duplicate of an accepted Commit, or anything else after it, changes nothing.
            (State::Rechecking | State::Committing | State::Starting | State::Running, _) => {}
            (State::Refusing, _) => {}
            (_, Frame::Abort { code, detail }) => {
                self.refuse(now, code, format!("the source gave up: {detail}"));
            }
            (state, frame) => {
                let detail = format!("frame {} does not fit {state:?}", frame.name());
                self.refuse(now, AbortCode::Protocol, detail);
            }
        }
    }

    fn layout(&mut self, now: Instant, memory: (Bytes, Vec<BlockSpec>), asked: (u32, bool)) {
        let (basis_ranges, post_copy) = asked;
        if basis_ranges > BASIS_MAX_RANGES {
            let detail = format!("a basis of {basis_ranges} ranges");
            self.refuse(now, AbortCode::Protocol, detail);
            return;
        }
        self.basis_ranges = index(basis_ranges);
        self.enter(now, State::Preparing, Some(PREPARE_MAX));
        self.act(Action::Phase(Phase::Prepare));
        let (head, blocks) = memory;
        self.act(Action::PrepareVm {
            head,
            blocks,
            post_copy,
        });
    }

    fn relay(&mut self, now: Instant) {
        if self.config.verify == Verify::Full {
            let detail = "the source must relay the stream, so memory cannot be proved in full: \
                          run `receive` with --verify sample to take it all the same";
            self.refuse(now, AbortCode::Incompatible, detail.into());
            return;
        }
        self.is_relay = true;
        self.enter(now, State::Preparing, Some(ANSWER_MAX));
        self.act(Action::Phase(Phase::Prepare));
        self.act(Action::PrepareRelay);
    }

    /// The source's operator has raised its epoch: what runs here is paused, never killed (S2).
    fn give_way(&mut self, attempt: AttemptId) {
        self.answer(attempt);
        self.act(Action::Pause);
        self.finish(Outcome::Doubt {
            detail: "the source's operator has given the guest to the source; the copy here is \
                     paused: look at it and end it by hand"
                .into(),
        });
    }

    pub(super) fn answer(&mut self, attempt: AttemptId) {
        let verdict = match self.state {
            _ if attempt != self.config.attempt => Verdict::Unknown,
            State::Running => Verdict::Running,
            State::Committing | State::Starting => Verdict::Committed,
            State::Waiting
            | State::Preparing
            | State::Receiving
            | State::Loading
            | State::Proving
            | State::Loaded
            | State::Rechecking
            | State::Refusing
            | State::Done => Verdict::Unknown,
        };
        let epoch = self.config.epoch;
        self.act(Action::Send(Frame::Answer {
            attempt,
            verdict,
            epoch,
        }));
        if verdict == Verdict::Running {
            self.tell_pages();
        }
    }

    /// Digests come in several frames; all of them are compared at once.
    fn basis(&mut self, now: Instant, digests: &[[u8; 16]]) {
        self.digests.extend_from_slice(digests);
        if digests.is_empty() || self.digests.len() > self.basis_ranges {
            self.refuse(
                now,
                AbortCode::Protocol,
                "digests that were not announced".into(),
            );
        } else if self.digests.len() == self.basis_ranges {
            let digests = std::mem::take(&mut self.digests);
            self.basis_ranges = 0;
            self.basis_awaited = true;
            self.act(Action::AgreeBasis { digests });
        }
    }

    /// QEMU is ready and both know what the other holds.
    fn layout_taken(&mut self, now: Instant) {
        let is_agreed =
            self.basis_ranges == 0 && (!self.basis_awaited || self.basis_agreed.is_some());
        if let (State::Preparing, true, Some(offer)) = (self.state, is_agreed, self.offer) {
            // Pre-copy takes as long as it takes; the link's own time-out watches it.
            self.enter(now, State::Receiving, None);
            let basis = self.basis_agreed.take().unwrap_or_default();
            self.act(if self.is_relay {
                Action::AcceptRelay
            } else {
                let basis = basis.clone();
                Action::AcceptLanes { basis }
            });
            self.act(Action::Send(Frame::LayoutTaken { basis, offer }));
            self.act(Action::Phase(Phase::Precopy));
        }
    }

    /// References that did not resolve: the pages come again, and a new `Final` after them.
    fn missing(&mut self, now: Instant, runs: &[PageRun]) {
        if self.state != State::Receiving {
            return;
        }
        self.missing_runs += runs.len() as u64;
        if self.missing_runs > MISSING_MAX {
            let detail = "references of the source do not resolve again and again";
            self.refuse(now, AbortCode::Memory, detail.into());
            return;
        }
        for runs in runs.chunks(MISSING_MAX_RUNS) {
            let runs = runs.to_vec();
            self.missing_sent += 1;
            self.act(Action::Send(Frame::Missing { runs }));
        }
    }

    fn tail_piece(&mut self, now: Instant, data: Bytes, raw_len: u32) {
        self.tail_bytes = self.tail_bytes.saturating_add(u64::from(raw_len));
        if self.tail_bytes > TAIL_MAX_BYTES {
            self.refuse(
                now,
                AbortCode::Resources,
                "device state is over its limit".into(),
            );
            return;
        }
        self.tail.push((data, raw_len));
    }

    fn barrier_applied(&mut self, now: Instant, applied: (u32, Root, u64)) {
        if self.state == State::Receiving {
            let (barrier, ..) = applied;
            self.act(Action::Send(Frame::Applied { barrier }));
            self.applied = Some(applied);
            self.pages_complete(now);
        }
    }

    /// Final is here and its barrier is applied: roots are compared before device state is fed.
    fn pages_complete(&mut self, now: Instant) {
        let (Some((root, barrier, tail_bytes)), Some((applied, mine, missing_pages))) =
            (self.last, self.applied)
        else {
            return;
        };
        if barrier != applied {
            return;
        }
        if self.absent_pages == 0 && missing_pages > 0 || self.missing_taken != self.missing_sent {
            // They are asked for, and the source sends another `Final` for each that it takes.
            self.deadline = Some(now + ANSWER_MAX);
            return;
        }
        if self.absent_pages > 0 {
            self.leave_out(now);
        } else if root != mine {
            self.refuse(now, AbortCode::Memory, "ledger roots differ".into());
        } else if tail_bytes != self.tail_bytes {
            self.refuse(
                now,
                AbortCode::Protocol,
                "device state is incomplete".into(),
            );
        } else {
            self.enter(now, State::Loading, Some(LOAD_MAX));
            self.act(Action::Phase(Phase::Load));
            let tail = std::mem::take(&mut self.tail);
            self.act(Action::FeedTail(tail));
        }
    }

    /// All bytes of a relayed stream are out, and QEMU has loaded them: there is no ledger to prove.
    fn relay_complete(&mut self, now: Instant) {
        if let (true, Some((root, ..))) = (self.relay_loaded, self.last) {
            self.enter(now, State::Loaded, Some(COMMIT_MAX));
            self.act(Action::Send(Frame::Loaded { root }));
            self.act(Action::Phase(Phase::Complete));
        }
    }

    fn vm_loaded(&mut self, now: Instant) {
        if self.is_relay && self.state == State::Receiving {
            self.relay_loaded = true;
            self.relay_complete(now);
        }
        if self.state == State::Loading {
            self.enter(now, State::Proving, Some(LOAD_MAX));
            self.act(Action::Prove(self.config.verify));
        }
    }

    fn proved(&mut self, now: Instant, result: Result<(), String>) {
        match (self.state, result, self.last) {
            (State::Proving, Ok(()), Some((root, ..))) => {
                self.enter(now, State::Loaded, Some(COMMIT_MAX));
                self.act(Action::Send(Frame::Loaded { root }));
                self.act(Action::Phase(Phase::Complete));
            }
            (_, Ok(()), _) => {}
            (_, Err(detail), _) => self.refuse(now, AbortCode::Memory, detail),
        }
    }

    pub(super) fn enter(&mut self, now: Instant, state: State, limit: Option<Duration>) {
        tracing::debug!(from = ?self.state, to = ?state, "target");
        self.state = state;
        self.deadline = limit.map(|limit| now + limit);
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }
}
