//! The source's machine: from `Ready` to the outcome.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::rounds::Rounds;
use super::steering::Pass;
use super::{Action, Config, Input, Phase};
use crate::block::{LANES, Root};
use crate::session::{Hold, Outcome};
use crate::wire::{AbortCode, AttemptId, Frame, Verdict, Verify};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Waiting,
    Preparing,
    Layout,
    Precopy,
    /// Release was given (or QEMU stopped unasked); pages and device state come in.
    Stopping,
    /// Everything is captured; lanes drain, memory is proved.
    Draining,
    AwaitLoaded,
    Completing,
    Intent,
    Committed,
    Doubt,
    /// Post-copy: the guest is at the target, pages that it lacks are here.
    Holding,
    Settling,
    /// An abort is under way: waiting for the guest to run here again.
    Returning,
    Done,
}

/// What a failure means in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The guest stays at the source.
    BeforeIntent,
    /// Only the target's durable word decides.
    PastIntent,
    /// The outcome stands.
    Ending,
}

impl State {
    pub(super) fn stage(self) -> Stage {
        match self {
            State::Waiting
            | State::Preparing
            | State::Layout
            | State::Precopy
            | State::Stopping
            | State::Draining
            | State::AwaitLoaded
            | State::Completing => Stage::BeforeIntent,
            State::Intent | State::Committed | State::Doubt | State::Holding | State::Settling => {
                Stage::PastIntent
            }
            State::Returning | State::Done => Stage::Ending,
        }
    }
}

/// The machine. See the module's diagram.
#[derive(Debug)]
pub struct Source {
    pub(super) config: Config,
    pub(super) state: State,
    pub(super) pass: Pass,
    pub(super) actions: VecDeque<Action>,
    pub(super) verify: Verify,
    pub(super) rounds: Rounds,
    pub(super) barrier: u32,
    pub(super) tail: Option<(Vec<(Bytes, u32)>, u64)>,
    pub(super) ram_ended: bool,
    pub(super) is_relay: bool,
    pub(super) root: Option<Root>,
    /// Lanes are held at the stop: what is dirty then stays behind.
    pub(super) leaves_pages: bool,
    /// Pages that stayed behind, as of the last `Final`.
    pub(super) absent_pages: u64,
    /// Frames of pages that the target could not resolve.
    pub(super) missing_taken: u32,
    /// Those that came when the guest was stopped.
    pub(super) flushes_again: u32,
    pub(super) proof_begun: bool,
    pub(super) proved: bool,
    pub(super) stopped: bool,
    pub(super) stopped_unasked: bool,
    pub(super) resumed_since_stop: bool,
    pub(super) completed: bool,
    pub(super) shut_given: bool,
    pub(super) outcome: Option<Outcome>,
    /// The target has answered Commit with a durable no.
    pub(super) answered: Option<AttemptId>,
    pub(super) deadline: Option<Instant>,
}

/// The target answers each step within this, else the attempt ends (before Commit) or is in doubt.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(30);
/// The target prepares its QEMU and reads its replica, which takes longer with more memory.
pub(super) const LAYOUT_MAX: Duration = Duration::from_secs(90);
/// Frames of missing pages that are answered while the guest is stopped: in that round only deltas
/// can miss, each once.
const FLUSHES_AGAIN_MAX: u32 = 256;
/// Loading and proving take longer with more memory.
pub(super) const LOADED_MAX: Duration = Duration::from_secs(120);
/// While a stopped guest's last pages drain, the target applies something within this.
const DRAIN_SILENCE_MAX: Duration = Duration::from_secs(30);
/// QEMU stops within one 100 ms window of the release; a slow host may take longer.
pub(super) const STOP_MAX: Duration = Duration::from_secs(30);

impl Source {
    /// A machine that waits for the target's `Ready`.
    #[must_use]
    pub fn new(now: Instant, config: Config) -> Source {
        Source {
            state: State::Waiting,
            pass: Pass::Open,
            actions: VecDeque::new(),
            verify: Verify::Full,
            rounds: Rounds::new(config.policy),
            barrier: 0,
            tail: None,
            ram_ended: false,
            is_relay: false,
            root: None,
            leaves_pages: false,
            absent_pages: 0,
            missing_taken: 0,
            flushes_again: 0,
            proof_begun: false,
            proved: false,
            stopped: false,
            stopped_unasked: false,
            resumed_since_stop: false,
            completed: false,
            shut_given: false,
            outcome: None,
            answered: None,
            deadline: Some(now + ANSWER_MAX),
            config,
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
            Input::Reconnected => self.reconnected(now),
            Input::VmStopped => self.vm_stopped(now),
            Input::VmResumed => self.vm_resumed(now),
            Input::VmMigration(status) => self.vm_migration(now, status),
            Input::PassStarted => self.pass_started(now),
            Input::VmGone(detail) => self.vm_gone(now, &detail),
            Input::Head {
                head,
                blocks,
                basis,
            } => self.head(now, (head, blocks), &basis),
            Input::Relay => self.relay(now),
            Input::Relayed { bytes } => self.relayed(now, bytes),
            Input::PassDrained { pages } => self.pass_drained(pages),
            Input::RamEnd => self.ram_end(now),
            Input::Tail {
                pieces,
                total_bytes,
            } => {
                self.tail = Some((pieces, total_bytes));
                self.captured(now);
            }
            Input::CaptureFailed(detail) => self.fail(now, AbortCode::Qemu, detail),
            Input::Sample(sample) => self.sampled(now, sample),
            Input::Marked {
                barrier,
                root,
                absent_pages,
            } => self.marked(now, barrier, (root, absent_pages)),
            Input::Proved(Ok(())) => {
                self.proved = true;
                self.finish_pages(now);
            }
            Input::Proved(Err(detail)) => self.fail(now, AbortCode::Memory, detail),
            Input::Journaled(result) => self.journaled(now, result),
            Input::VmCommandFailed(detail) => self.fail(now, AbortCode::Qemu, detail),
            Input::Abort(detail) => self.fail(now, AbortCode::Operator, detail),
            Input::Downtime(downtime) => self.rounds.policy.downtime = downtime,
            Input::WhenStuck(when_stuck) => self.rounds.policy.when_stuck = when_stuck,
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

    /// Applied lane bytes, as the target acknowledged them.
    #[must_use]
    pub fn applied_bytes(&self) -> u64 {
        self.rounds.applied_bytes()
    }

    /// Latest estimate of applied bytes per second.
    #[must_use]
    pub fn rate_bytes_per_s(&self) -> f64 {
        self.rounds.rate_bytes_per_s()
    }

    /// Mean lane bytes per page that was sent with content lately.
    #[must_use]
    pub fn page_cost_bytes(&self) -> f64 {
        self.rounds.page_cost_bytes()
    }

    /// Distinct pages per second that the guest dirties; `None` before two syncs.
    #[must_use]
    pub fn dirty_pages_per_s(&self) -> Option<f64> {
        self.rounds.dirty_pages_per_s()
    }

    /// Stop to run, if the stop were asked for now.
    #[must_use]
    pub fn predicted_stop(&self, now: Instant) -> Option<Duration> {
        self.rounds.predicted_stop(now)
    }

    /// Shortest stop that was in sight, once pre-copy does not get on any more.
    #[must_use]
    pub fn stuck_at(&self, now: Instant) -> Option<Duration> {
        (self.state == State::Precopy)
            .then(|| self.rounds.stuck_at(now))
            .flatten()
    }

    /// How much the guest's processors are slowed, in percent.
    #[must_use]
    pub fn throttle_percent(&self) -> u8 {
        self.rounds.throttle_percent()
    }

    /// Whether the target has said that the guest runs there.
    #[must_use]
    pub fn has_arrived(&self) -> bool {
        self.outcome == Some(Outcome::Arrived)
    }

    /// Whether Commit may have left: from here an operator's abort is refused.
    #[must_use]
    pub fn is_past_intent(&self) -> bool {
        self.state.stage() == Stage::PastIntent
    }

    fn frame(&mut self, now: Instant, frame: Frame) {
        match (self.state, frame) {
            (State::Waiting, Frame::Ready { verify, nonce, .. }) => self.ready(now, verify, nonce),
            (State::Layout, Frame::LayoutTaken { .. }) if self.is_relay => self.open_relay(now),
            (State::Layout, Frame::LayoutTaken { basis, offer }) => {
                self.rounds.can_post_copy = offer.post_copy && self.config.post_copy;
                self.act(Action::OpenLanes { basis, offer });
                self.precopy(now);
            }
            // The driver has taken the answers, and marked what is missing.
            (_, Frame::Known { .. }) => {}
            (
                State::Precopy | State::Stopping | State::Draining | State::AwaitLoaded,
                Frame::Missing { .. },
            ) => self.missing(now),
            (state, frame) if self.is_of_post_copy(state, &frame) => {
                self.post_copy_frame(now, &frame);
            }
            (_, Frame::Progress { applied_bytes }) => self.progress(now, applied_bytes),
            // Barriers pace nothing yet: the final one is implied by Loaded.
            (
                State::Precopy | State::Stopping | State::Draining | State::AwaitLoaded,
                Frame::Applied { .. },
            ) => {}
            (State::AwaitLoaded, Frame::Loaded { root }) => self.loaded(now, root),
            (State::Committed | State::Doubt, Frame::Running) => self.arrived(now),
            (
                State::Committed | State::Doubt,
                Frame::Answer {
                    attempt, verdict, ..
                },
            ) if attempt == self.config.attempt => {
                self.verdict(now, verdict);
            }
            (
                _,
                Frame::Answer {
                    verdict: Verdict::Refused | Verdict::NeverRan,
                    ..
                },
            ) => {
                self.fail(
                    now,
                    AbortCode::Qemu,
                    "the target refused before Commit".into(),
                );
            }
            // Whoever asks gets what this side knows; the journal is behind it.
            (_, Frame::Ask { attempt, .. }) => self.answer(attempt),
            // Commit has not left: nothing that is said here answers it.
            (State::Intent, _) => {}
            (State::Settling, Frame::Settled { .. }) => self.finish(),
            (State::Settling, _) => {}
            (State::Committed | State::Doubt, Frame::Abort { detail, .. }) => {
                self.doubt(now, &format!("after Commit the target said: {detail}"));
            }
            (State::Returning, _) => {}
            (_, Frame::Abort { code, detail }) => {
                self.fail(now, code, format!("the target gave up: {detail}"));
            }
            (state, frame) => {
                let detail = format!("frame {} does not fit {state:?}", frame.name());
                if self.is_past_intent() {
                    self.doubt(now, &detail);
                } else {
                    self.fail(now, AbortCode::Protocol, detail);
                }
            }
        }
    }

    fn progress(&mut self, now: Instant, applied_bytes: [u64; LANES]) {
        let total = applied_bytes
            .iter()
            .fold(0_u64, |sum, lane| sum.saturating_add(*lane));
        let before = self.rounds.applied_bytes();
        self.rounds.progress(now, total);
        // The guest is stopped: silence is bounded, a slow link is not.
        if self.state == State::Draining && self.rounds.applied_bytes() > before {
            self.deadline = Some(now + DRAIN_SILENCE_MAX);
        }
    }

    fn vm_stopped(&mut self, now: Instant) {
        self.stopped = true;
        self.resumed_since_stop = false;
        // Under starvation QEMU decides the stop: its own and an operator's look alike.
        let unasked = self.config.hold == Hold::SwitchoverAck;
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "a stopped guest is expected in all later states"
        )]
        match self.state {
            State::Stopping => {
                if self.leaves_pages {
                    self.act(Action::HoldLanes);
                }
                self.announce_stop();
            }
            State::Waiting => self.stopped_unasked = true,
            State::Preparing | State::Layout => self.stopped_unasked |= unasked,
            State::Precopy => {
                // So is QEMU's own stop in a relay, where it decides too; all that is left then
                // crosses the link first.
                self.stopped_unasked = unasked && !self.is_relay;
                let limit = (!self.is_relay).then_some(STOP_MAX);
                self.enter(now, State::Stopping, limit);
                self.announce_stop();
            }
            _ => {}
        }
    }

    /// A STOP came and no RESUME since.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped && !self.resumed_since_stop
    }

    pub(super) fn announce_stop(&mut self) {
        self.act(Action::Phase(Phase::Stop));
        self.act(Action::Send(Frame::Stopped));
    }

    fn ram_end(&mut self, now: Instant) {
        self.ram_ended = true;
        if self.state == State::Precopy {
            // A paused guest gives no STOP event: its stream simply ends.
            self.enter(now, State::Stopping, Some(STOP_MAX));
            self.act(Action::Phase(Phase::Stop));
        }
    }

    /// All of RAM and the device state are here: drain, prove, tell.
    pub(super) fn captured(&mut self, now: Instant) {
        if self.state != State::Stopping || !self.ram_ended {
            return;
        }
        let Some((pieces, _)) = &self.tail else {
            return;
        };
        let frames: Vec<Frame> = pieces
            .iter()
            .map(|(data, raw_len)| Frame::Tail {
                data: data.clone(),
                raw_len: *raw_len,
            })
            .collect();
        self.actions.extend(frames.into_iter().map(Action::Send));
        self.flush(now);
    }

    fn flush(&mut self, now: Instant) {
        self.enter(now, State::Draining, Some(DRAIN_SILENCE_MAX));
        self.barrier += 1;
        self.act(Action::FlushLanes {
            barrier: self.barrier,
        });
    }

    /// Pages that the target could not resolve go once more; a new `Final` replaces the one before.
    fn missing(&mut self, now: Instant) {
        self.missing_taken = self.missing_taken.saturating_add(1);
        if !matches!(self.state, State::Draining | State::AwaitLoaded) {
            return;
        }
        // The guest is stopped: a target that never has enough must not keep it so.
        self.flushes_again += 1;
        if self.flushes_again > FLUSHES_AGAIN_MAX {
            let detail = "the target misses pages again and again";
            self.fail(now, AbortCode::Protocol, detail.into());
            return;
        }
        self.root = None;
        self.flush(now);
    }

    fn marked(&mut self, now: Instant, barrier: u32, left: (Root, u64)) {
        if self.state != State::Draining || barrier != self.barrier {
            return;
        }
        let (root, absent_pages) = left;
        self.root = Some(root);
        self.absent_pages = absent_pages;
        let tail_bytes = self.tail.as_ref().map_or(0, |(_, total)| *total);
        self.act(Action::Send(Frame::Final {
            root,
            barrier,
            tail_bytes,
            missing_taken: self.missing_taken,
            absent_pages,
        }));
        // The target loads while this side proves its own memory.
        if !self.proof_begun {
            self.proof_begun = true;
            self.act(Action::Prove(self.verify));
        }
        self.enter(now, State::AwaitLoaded, Some(LOADED_MAX));
        self.act(Action::Phase(Phase::Load));
    }

    pub(super) fn enter(&mut self, now: Instant, state: State, limit: Option<Duration>) {
        tracing::debug!(from = ?self.state, to = ?state, "source");
        self.state = state;
        self.deadline = limit.map(|limit| now + limit);
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }
}
