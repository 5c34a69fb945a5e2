//! The target's loop: waits for whatever comes next and gives it to the machine.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use qemu_glue::qmp::{Event, EventKind, EventReceiver, MigrationStatus};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::block::Layout;
use transport::quic::driver::{LaneFault, TargetLanes, Workers};
use transport::session::Outcome;
use transport::session::target::{Action, Config, Input, Target};
use transport::store::RangeHashes;
use transport::wire::Frame;

use super::Options;
use super::postcopy::{PostCopy, checkpoint_root, urgent_failed};
use crate::control::{Command, Request};
use crate::feed::{Fed, Feeder};
use crate::hook::{Hook, HookPhase};
use crate::journal::{Entry, Journal};
use crate::kept::Kept;
use crate::mapped::TargetMemory;
use crate::peer::{Door, Me, Peer, next_frame, send_frame};
use crate::progress::{Progress, Snapshot};
use crate::shared::{Answering, Shared};
use crate::signals::Signals;
use crate::tally::Tally;
use crate::vm::Vm;
use crate::waiting::{next, now, sleep_until};

/// How often the source hears what is applied: the flight's budget follows it.
const TICK: Duration = Duration::from_millis(20);
/// How often the link is measured and the operator sees a line.
const SHOW_TICKS: u32 = 13;
/// Results of started work that may wait.
const INPUTS_MAX: usize = 64;

/// What `run` hands over.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) options: Options,
    pub(super) vm: Vm,
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

/// One attempt at the target.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) options: Options,
    pub(super) vm: Vm,
    pub(super) machine: Target,
    pub(super) me: Me,
    pub(super) door: Arc<Door>,
    pub(super) peer: Option<Peer>,
    pub(super) peer_name: String,
    pub(super) peer_incarnation: u64,
    pub(super) secret: [u8; 32],
    pub(super) journal: Arc<Mutex<Journal>>,
    pub(super) entry: Entry,
    pub(super) layout: Option<Arc<Layout>>,
    pub(super) nonce: [u8; 16],
    pub(super) memory: Option<Arc<TargetMemory>>,
    pub(super) kept: Option<Kept>,
    pub(super) opening: Option<JoinHandle<Option<Shared>>>,
    pub(super) shared: Option<Shared>,
    pub(super) answering: Option<Answering>,
    pub(super) answers: Option<mpsc::Receiver<Frame>>,
    pub(super) hashing: Option<JoinHandle<Option<Arc<RangeHashes>>>>,
    pub(super) hashes: Option<Arc<RangeHashes>>,
    pub(super) agreed: Option<mpsc::Receiver<(Bytes, Option<Arc<RangeHashes>>)>>,
    pub(super) workers: Workers,
    pub(super) lanes: Option<TargetLanes>,
    pub(super) lane_faults: Option<mpsc::Receiver<LaneFault>>,
    pub(super) feeder: Option<Feeder>,
    pub(super) post_copy: Option<PostCopy>,
    pub(super) fed: Option<mpsc::Receiver<Fed>>,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) returned: Option<mpsc::Receiver<Peer>>,
    pub(super) tally: Tally,
    pub(super) progress: Progress,
    hook: Hook,
    hook_calls: Vec<JoinHandle<()>>,
    events: EventReceiver,
    requests: mpsc::Receiver<Request>,
    signals: Signals,
    results: mpsc::Receiver<Input>,
    ticks: u32,
    pub(super) told_bytes: u64,
    resumed_ms: Option<u64>,
    told_stopped: bool,
    outcome: Option<Outcome>,
}

impl Driver {
    /// The machine is ready; QEMU is untouched.
    pub(super) fn new(start: Start) -> anyhow::Result<Driver> {
        let now = now();
        let nonce = crate::peer::random();
        let opening = Shared::open(
            start.options.state.clone(),
            start.peer.connection.peer(),
            start.peer.secret,
        );
        let config = Config {
            attempt: start.peer.agreed.attempt,
            incarnation: start.me.incarnation,
            verify: start.options.verify,
            qemu: start.vm.version().to_string(),
            stay_paused: start.options.stay_paused,
            epoch: start.entry.epoch,
            nonce,
        };
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let (inputs, results) = mpsc::channel(INPUTS_MAX);
        let me = Me {
            attempt: start.peer.agreed.attempt,
            ..start.me
        };
        Ok(Driver {
            machine: Target::new(now, config),
            secret: start.peer.secret,
            peer_name: start.peer.name.clone(),
            peer_incarnation: start.peer.agreed.peer_incarnation,
            peer: Some(start.peer),
            me,
            door: Arc::new(start.door),
            journal: Arc::new(Mutex::new(start.journal)),
            entry: start.entry,
            layout: None,
            nonce,
            memory: None,
            kept: None,
            opening: Some(tokio::spawn(opening)),
            shared: None,
            answering: None,
            answers: None,
            hashing: None,
            hashes: None,
            agreed: None,
            workers: Workers::start(cores)?,
            lanes: None,
            lane_faults: None,
            feeder: None,
            post_copy: None,
            resumed_ms: None,
            fed: None,
            inputs,
            returned: None,
            tally: Tally::new(now),
            progress: Progress::new(start.options.json),
            hook: start.hook,
            hook_calls: Vec::new(),
            options: start.options,
            vm: start.vm,
            events: start.events,
            requests: start.requests,
            signals: start.signals,
            results,
            ticks: 0,
            told_bytes: 0,
            told_stopped: false,
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
        if self.machine.owns_guest() && self.door.listens() {
            self.await_peer();
        }
        tokio::select! {
            frame = next_frame(&mut self.peer) => match frame {
                Ok(frame) => {
                    self.post_copy_frame(&frame);
                    self.frame(frame);
                }
                Err(detail) => {
                    self.peer = None;
                    self.machine.handle(now(), Input::PeerLost(detail));
                }
            },
            event = self.events.next() => self.vm_event(event),
            fed = next(&mut self.fed) => self.fed(fed).await,
            detail = urgent_failed(&mut self.post_copy) => {
                self.machine.handle(now(), Input::LaneFailed(detail));
            }
            fault = next(&mut self.lane_faults) => self.lane_fault(fault).await,
            answer = next(&mut self.answers) => self.send(answer).await,
            (basis, hashes) = next(&mut self.agreed) => {
                self.agreed = None;
                self.hashes = hashes;
                self.machine.handle(now(), Input::BasisAgreed { basis });
            }
            result = self.results.recv() => if let Some(input) = result {
                self.machine.handle(now(), input);
            },
            peer = next(&mut self.returned) => {
                self.returned = None;
                self.peer = Some(peer);
            },
            Some(request) = self.requests.recv() => self.request(request),
            () = self.signals.next() => {
                self.machine.handle(now(), Input::Abort("interrupted by the operator".into()));
            }
            _ = ticker.tick() => self.tick().await,
            () = sleep_until(timeout) => self.machine.handle(now(), Input::Timer),
        }
    }

    async fn lane_fault(&mut self, fault: LaneFault) {
        if self.peer.is_some() {
            let input = match fault {
                LaneFault::Missing(runs) => Input::Missing(runs),
                LaneFault::Urgent(urgent) => return self.urgent(urgent).await,
                LaneFault::Failed(detail) => Input::LaneFailed(detail),
            };
            self.machine.handle(now(), input);
        }
    }

    fn frame(&mut self, frame: Frame) {
        if let Frame::Query { first, prefixes } = &frame
            && !self
                .answering
                .as_mut()
                .is_some_and(|answering| answering.ask(*first, prefixes))
        {
            let detail = "the source asks for more than there is to know".into();
            self.machine.handle(now(), Input::LaneFailed(detail));
            return;
        }
        if let Frame::Commit { .. } = frame {
            crate::fault::point("target-before-committed");
        }
        if frame == Frame::Stopped && !self.told_stopped {
            self.told_stopped = true;
            self.call_hook(HookPhase::Stopped);
        }
        self.machine.handle(now(), Input::Frame(frame));
    }

    fn vm_event(&mut self, event: Option<Event>) {
        let kind = event.map(|event| event.kind);
        let input = match kind {
            Some(EventKind::Resume) => {
                let elapsed = self.tally.elapsed_ms(now());
                self.resumed_ms.get_or_insert(elapsed);
                self.call_hook(HookPhase::Running);
                Input::VmResumed
            }
            Some(EventKind::Migration {
                status: MigrationStatus::Failed,
            }) => Input::VmFailed("target QEMU could not load the guest".into()),
            Some(EventKind::MonitorClosed { reason }) => {
                Input::VmFailed(format!("target QEMU is gone: {reason}"))
            }
            None => Input::VmFailed("target QEMU's monitor is closed".into()),
            Some(_) => return,
        };
        self.machine.handle(now(), input);
    }

    async fn fed(&mut self, fed: Fed) {
        match fed {
            Fed::Barrier(barrier) => {
                // What missed before the mark is told before the mark is.
                while let Some(fault) = self
                    .lane_faults
                    .as_mut()
                    .and_then(|found| found.try_recv().ok())
                {
                    self.lane_fault(fault).await;
                }
                let Some(lanes) = &self.lanes else { return };
                let root = lanes.root();
                self.tally.root = Some(root);
                self.machine.handle(
                    now(),
                    Input::Applied {
                        barrier,
                        root,
                        missing_pages: lanes.missing_pages(),
                    },
                );
            }
            Fed::Listening => self.check_loaded(),
            Fed::Wanted {
                block,
                start,
                length,
            } => self.wanted(block, start, length).await,
            Fed::Loaded if self.is_filling() => self.check_filled(),
            // SHUT(0) is QEMU's word; `completed` and `paused` are read before it counts.
            Fed::Loaded => self.check_loaded(),
            Fed::Failed(detail) => self.machine.handle(now(), Input::VmFailed(detail)),
        }
    }

    fn request(&mut self, request: Request) {
        let answer = match request.command {
            Command::Status => serde_json::to_value(self.snapshot()).unwrap_or_default(),
            Command::Set(_) => serde_json::json!({
                "ok": false, "error": "set this at the source: it leads the transfer"
            }),
            Command::Abort if self.machine.owns_guest() => serde_json::json!({
                "ok": false, "error": "Commit is accepted: the guest is this side's"
            }),
            Command::Abort => {
                self.machine
                    .handle(now(), Input::Abort("aborted by the operator".into()));
                serde_json::json!({"ok": true})
            }
        };
        if request.answer.send(answer).is_err() {
            tracing::debug!("who asked is gone");
        }
    }

    /// Tells the source what is applied, whenever it has changed.
    async fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        if let (Some(feeder), Some(peer)) = (&self.feeder, &mut self.peer) {
            let applied_bytes = feeder.applied_bytes();
            let total = applied_bytes.iter().sum();
            if total != self.told_bytes {
                self.told_bytes = total;
                let frame = Frame::Progress { applied_bytes };
                if let Err(error) = send_frame(&mut peer.sender, &frame).await {
                    tracing::debug!(%error, "progress not sent");
                }
            }
        }
        if self.ticks.is_multiple_of(SHOW_TICKS) {
            if let Some(peer) = &self.peer {
                self.tally.sample(peer.connection.link_sample());
            }
            self.show(false);
        }
    }

    pub(super) fn show(&mut self, at_once: bool) {
        let mut snapshot = self.snapshot();
        self.progress.show(now(), &mut snapshot, at_once);
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            phase: self.tally.phases.current(),
            round: 0,
            left_pages: self.post_copy.as_ref().map(|post| post.absent.left()),
            faults: self.post_copy.as_ref().map(|post| post.faults.count()),
            left_bytes: None,
            done_bytes: self.told_bytes,
            rate_bps: None,
            eta_s: None,
            elapsed_ms: self.tally.elapsed_ms(now()),
            percent: 0,
            stuck_needs_ms: None,
            throttle_percent: 0,
        }
    }

    pub(super) fn call_hook(&mut self, phase: HookPhase) {
        self.hook_calls.extend(self.hook.call(phase));
    }

    async fn finish(mut self, outcome: Outcome) -> anyhow::Result<Outcome> {
        let ended = now();
        self.progress.finish();
        match outcome {
            Outcome::Arrived => {}
            Outcome::Stayed { .. } | Outcome::Doubt { .. } => self.call_hook(HookPhase::Failed),
        }
        self.leave().await;
        if let Some(kept) = self.kept.take() {
            let root = checkpoint_root(self.tally.root, self.post_copy.as_ref());
            kept.settle(&outcome, root);
        }
        for call in self.hook_calls.drain(..) {
            crate::hook::finish(Some(call)).await;
        }
        self.door.close().await;
        if let Some(post_copy) = self.post_copy.as_ref().filter(|post| post.is_fed) {
            let report = post_copy.faults.report(post_copy.pages, self.resumed_ms);
            self.tally.post_copy = Some(report);
        }
        let report = self.tally.report(
            ended,
            "target",
            self.me.vm.clone(),
            self.peer_name,
            &outcome,
        );
        crate::report::write(&report, self.options.report.as_deref())?;
        if self.options.json {
            crate::progress::say(&serde_json::to_string(&report)?);
        }
        Ok(outcome)
    }
}
