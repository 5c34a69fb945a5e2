//! The source's loop: waits for whatever comes next and gives it to the machine.
//!
//! ```text
//! peer frames, QEMU, capture -> inputs   \
//! operator, signals          -> operator  -> machine -> act
//! every 20 ms                -> looks    /          '-> end, with the outcome
//! ```

mod end;
mod inputs;
mod looks;
mod operator;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use qemu_glue::qmp::EventReceiver;
use tokio::sync::{Notify, mpsc};
use transport::block::AbsentPages;
use transport::quic::driver::{LaneEvent, Questions, SourceLanes, Workers};
use transport::session::source::{Action, Config, Input, Source};
use transport::session::{Outcome, WhenStuck};
use transport::store::RangeHashes;
use transport::wire::{Frame, RunState};

use super::Options;
use super::act::{VmCommand, run_commands};
use super::left::Left;
use super::memory::Memory;
use super::opening::Opened;
use super::postcopy::Urgents;
use crate::capture::{Capture, Captured, Image};
use crate::control::Request;
use crate::hook::{Hook, HookPhase};
use crate::journal::{Entry, Journal};
use crate::kept::Kept;
use crate::peer::{Door, Me, Peer, next_frame};
use crate::progress::Progress;
use crate::relay::Spool;
use crate::signals::Signals;
use crate::tally::Tally;
use crate::trace::Trace;
use crate::vm::{SourceState, Vm};
use crate::waiting::{next, now, sleep_until};

/// How often the machine sees a sample and the operator a new line.
const TICK: Duration = Duration::from_millis(20);

/// Results of started work that may wait.
const INPUTS_MAX: usize = 64;

/// Monitor commands that may wait.
const COMMANDS_MAX: usize = 64;

/// What `run` hands over.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) options: Options,
    pub(super) vm: Vm,
    pub(super) prepared: SourceState,
    pub(super) events: EventReceiver,
    pub(super) journal: Journal,
    pub(super) entry: Entry,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) signals: Signals,
    pub(super) me: Me,
    pub(super) door: Door,
    pub(super) peer: Peer,
    pub(super) hook: Hook,
}

/// One attempt at the source.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) options: Options,
    pub(super) vm: Vm,
    pub(super) state: SourceState,
    pub(super) machine: Source,
    pub(super) me: Me,
    pub(super) door: Arc<Door>,
    pub(super) peer: Option<Peer>,
    pub(super) peer_name: String,
    memory: Memory,
    pub(super) secret: [u8; 32],
    pub(super) journal: Arc<Mutex<Journal>>,
    pub(super) entry: Entry,
    pub(super) hook: Hook,
    pub(super) hook_calls: Vec<tokio::task::JoinHandle<()>>,
    pub(super) capture: Option<Arc<Capture>>,
    pub(super) captured: Option<mpsc::Receiver<Captured>>,
    pub(super) image: Option<Image>,
    /// Keys what this side proves of its replica.
    pub(super) nonce: [u8; 16],
    pub(super) opened: Option<mpsc::Receiver<Opened>>,
    pub(super) kept: Option<Kept>,
    pub(super) hashes: Option<Arc<RangeHashes>>,
    pub(super) questions: Option<Questions>,
    pub(super) queries: Option<mpsc::Receiver<Frame>>,
    pub(super) spool: Option<Arc<Spool>>,
    pub(super) era: u32,
    pub(super) pass_pages: u64,
    pub(super) wake: Arc<Notify>,
    /// Post-copy: lanes are held at the stop; pages that stay behind; who answers faults.
    pub(super) holds_lanes: bool,
    pub(super) left_behind: u64,
    pub(super) faults: u64,
    pub(super) urgents: Option<Urgents>,
    pub(super) lacking: Option<AbsentPages>,
    pub(super) workers: Workers,
    pub(super) lanes: Option<SourceLanes>,
    pub(super) lane_events: Option<mpsc::Receiver<LaneEvent>>,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) vm_commands: mpsc::Sender<VmCommand>,
    pub(super) reconnected: Option<mpsc::Receiver<Peer>>,
    pub(super) left: Left,
    pub(super) tally: Tally,
    pub(super) progress: Progress,
    pub(super) trace: Trace,
    events: EventReceiver,
    requests: mpsc::Receiver<Request>,
    signals: Signals,
    results: mpsc::Receiver<Input>,
    ticks: u32,
    link_rtt: Duration,
    pub(super) link_bytes_per_s: u64,
    outcome: Option<Outcome>,
}

impl Driver {
    /// The machine is ready; nothing is started yet.
    pub(super) fn new(start: Start) -> anyhow::Result<Driver> {
        let now = now();
        let config = config(&start);
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let (inputs, results) = mpsc::channel(INPUTS_MAX);
        let (vm_commands, commands) = mpsc::channel(COMMANDS_MAX);
        tokio::spawn(run_commands(
            start.vm.clone(),
            start.options.policy.downtime,
            commands,
            inputs.clone(),
        ));
        let memory = Memory::recall(&start.options.state, &start.me.vm, &start.peer);
        let mut tally = Tally::new(now);
        tally.predicted = memory.predicted();
        Ok(Driver {
            machine: Source::new(now, config),
            state: start.prepared,
            secret: start.peer.secret,
            peer_name: start.peer.name.clone(),
            memory,
            peer: Some(start.peer),
            me: start.me,
            door: Arc::new(start.door),
            journal: Arc::new(Mutex::new(start.journal)),
            entry: start.entry,
            hook: start.hook,
            hook_calls: Vec::new(),
            capture: None,
            captured: None,
            image: None,
            nonce: [0; 16],
            opened: None,
            kept: None,
            hashes: None,
            questions: None,
            queries: None,
            spool: None,
            era: 0,
            pass_pages: 0,
            wake: Arc::new(Notify::new()),
            holds_lanes: false,
            left_behind: 0,
            faults: 0,
            urgents: None,
            lacking: None,
            workers: Workers::start(cores)?,
            lanes: None,
            lane_events: None,
            inputs,
            vm_commands,
            reconnected: None,
            left: Left::new(),
            tally,
            progress: Progress::new(start.options.json),
            trace: Trace::create(start.options.trace.as_deref())?,
            options: start.options,
            vm: start.vm,
            events: start.events,
            requests: start.requests,
            signals: start.signals,
            results,
            ticks: 0,
            link_rtt: Duration::ZERO,
            link_bytes_per_s: 0,
            outcome: None,
        })
    }

    /// Runs the session to its outcome and writes the report.
    pub(super) async fn run(mut self) -> anyhow::Result<Outcome> {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let outcome = loop {
            while let Some(action) = self.machine.poll_action() {
                if let Action::Done(outcome) = action {
                    self.outcome = Some(outcome);
                    break;
                }
                self.act(action).await;
            }
            if let Some(outcome) = self.outcome.take() {
                break outcome;
            }
            self.wait(&mut ticker).await;
        };
        self.finish(outcome).await
    }

    /// Waits for one thing and handles it.
    async fn wait(&mut self, ticker: &mut tokio::time::Interval) {
        let timeout = self.machine.poll_timeout();
        tokio::select! {
            frame = next_frame(&mut self.peer) => match frame {
                Ok(frame) => {
                    self.post_copy_frame(&frame).await;
                    self.frame(frame);
                }
                Err(detail) => {
                    self.peer = None;
                    self.machine.handle(now(), Input::PeerLost(detail));
                }
            },
            event = self.events.next() => self.vm_event(event),
            captured = next(&mut self.captured) => self.captured(captured),
            opened = next(&mut self.opened) => self.opened(opened),
            query = next(&mut self.queries) => self.send(query).await,
            event = next(&mut self.lane_events) => match event {
                LaneEvent::Marked { barrier, root } => self.marked(barrier, root).await,
                LaneEvent::Failed(detail) => {
                    self.machine.handle(now(), Input::CaptureFailed(detail));
                }
            },
            result = self.results.recv() => if let Some(input) = result {
                self.machine.handle(now(), input);
            },
            peer = next(&mut self.reconnected) => {
                self.reconnected = None;
                self.peer = Some(peer);
                self.machine.handle(now(), Input::Reconnected);
            },
            Some(request) = self.requests.recv() => self.request(request),
            () = self.signals.next() => self.interrupted(),
            _ = ticker.tick() => self.tick(),
            () = sleep_until(timeout) => self.machine.handle(now(), Input::Timer),
        }
    }

    pub(super) fn call_hook(&mut self, phase: HookPhase) {
        self.hook_calls.extend(self.hook.call(phase));
    }
}

/// What the machine must know of this move.
fn config(start: &Start) -> Config {
    let run_state = if start.prepared.was_running {
        RunState::Running
    } else {
        RunState::Paused
    };
    Config {
        attempt: start.peer.agreed.attempt,
        target_incarnation: start.peer.agreed.peer_incarnation,
        hold: start.prepared.hold,
        run_state,
        policy: start.options.policy,
        post_copy: start.options.policy.when_stuck == WhenStuck::PostCopy,
        epoch: start.entry.epoch,
    }
}
