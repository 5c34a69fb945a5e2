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
enum State {
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
    config: Config,
    state: State,
    actions: VecDeque<Action>,
    tail: Vec<(Bytes, u32)>,
    tail_bytes: u64,
    last: Option<(Root, u32, u64)>,
    /// Barrier, root, and pages that did not resolve and have not come again.
    applied: Option<(u32, Root, u64)>,
    /// Digests that the source has announced.
    basis_ranges: usize,
    digests: Vec<[u8; 16]>,
    basis_awaited: bool,
    basis_agreed: Option<Bytes>,
    offer: Option<Offer>,
    /// Missing frames sent, and taken by the source at its last `Final`.
    missing_sent: u32,
    missing_taken: u32,
    /// Runs asked for again, over the whole attempt.
    missing_runs: u64,
    run_state: RunState,
    is_relay: bool,
    relay_loaded: bool,
    outcome: Option<Outcome>,
    refusal: Option<Verdict>,
    deadline: Option<Instant>,
}

/// The source answers each step within this.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// QEMU opens its incoming side, and this side's replica is read.
const PREPARE_MAX: Duration = Duration::from_secs(90);
/// Runs that may be asked for again in one attempt: a source whose references never resolve is
/// given up.
const MISSING_MAX: u64 = 1 << 20;
/// Loading and proving take longer with more memory.
const LOAD_MAX: Duration = Duration::from_secs(120);
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
                },
            ) => self.layout(now, (head, blocks), basis_ranges),
            (State::Preparing, Frame::Basis { digests }) => self.basis(now, &digests),
            // The driver answers questions; they end before the guest stops.
            (State::Receiving, Frame::Query { .. }) => {}
            (State::Waiting, Frame::Relay) => self.relay(now),
            // The driver has told the hook.
            (State::Receiving, Frame::Stopped) => {}
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
                },
            ) => {
                self.last = Some((root, barrier, tail_bytes));
                self.missing_taken = missing_taken;
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
            (State::Running, Frame::Settled { attempt }) if attempt == self.config.attempt => {
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

    fn layout(&mut self, now: Instant, memory: (Bytes, Vec<BlockSpec>), basis_ranges: u32) {
        if basis_ranges > BASIS_MAX_RANGES {
            let detail = format!("a basis of {basis_ranges} ranges");
            self.refuse(now, AbortCode::Protocol, detail);
            return;
        }
        self.basis_ranges = index(basis_ranges);
        self.enter(now, State::Preparing, Some(PREPARE_MAX));
        self.act(Action::Phase(Phase::Prepare));
        let (head, blocks) = memory;
        self.act(Action::PrepareVm { head, blocks });
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

    fn answer(&mut self, attempt: AttemptId) {
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
        if missing_pages > 0 || self.missing_taken != self.missing_sent {
            // They are asked for, and the source sends another `Final` for each that it takes.
            self.deadline = Some(now + ANSWER_MAX);
            return;
        }
        if root != mine {
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

    fn commit(&mut self, now: Instant, named: (AttemptId, u64, Root), run_state: RunState) {
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

    fn rechecked(&mut self, now: Instant, result: Result<(), String>) {
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

    fn journaled(&mut self, now: Instant, result: Result<(), String>) {
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

    fn vm_resumed(&mut self, now: Instant) {
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
        self.act(Action::Journal(Mark::Running));
        self.act(Action::Phase(Phase::Settle));
    }

    fn never_ran(&mut self, now: Instant, detail: String) {
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

    fn peer_lost(&mut self, now: Instant, detail: &str) {
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
    fn abort(&mut self, now: Instant, detail: String) {
        match self.state {
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

    fn vm_failed(&mut self, now: Instant, detail: String) {
        match self.state {
            // Whether `cont` ran before QEMU ended cannot be told any more.
            State::Committing | State::Starting => {
                self.finish(Outcome::Doubt {
                    detail: format!("target QEMU failed after Commit was accepted: {detail}"),
                });
            }
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
    fn refuse(&mut self, now: Instant, code: AbortCode, detail: String) {
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

    fn timer(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            let detail = format!("no progress in {:?} within its limit", self.state);
            self.refuse(now, AbortCode::Link, detail);
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        self.act(Action::Done(outcome));
        self.state = State::Done;
        self.deadline = None;
    }

    fn enter(&mut self, now: Instant, state: State, limit: Option<Duration>) {
        tracing::debug!(from = ?self.state, to = ?state, "target");
        self.state = state;
        self.deadline = limit.map(|limit| now + limit);
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }
}
