//! The source's loop: waits for whatever comes next and gives it to the machine.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use qemu_glue::qmp::{Event, EventKind, EventReceiver, MigrationStatus};
use tokio::sync::{Notify, mpsc};
use transport::block::{AbsentPages, BatchStats};
use transport::quic::driver::{LaneEvent, Questions, SourceLanes, Workers};
use transport::session::source::{Action, Config, Input, Sample, Source};
use transport::session::{Outcome, VmMigration, WhenStuck};
use transport::store::RangeHashes;
use transport::wire::{Frame, RunState};

use super::Options;
use super::act::{VmCommand, run_commands};
use super::memory::Memory;
use super::opening::Opened;
use super::postcopy::Urgents;
use crate::capture::{Capture, Captured, Image};
use crate::control::{Command, Request, Setting};
use crate::hook::{Hook, HookPhase};
use crate::journal::{Entry, Journal};
use crate::kept::Kept;
use crate::peer::{Door, Me, Peer, next_frame};
use crate::progress::Progress;
use crate::relay::Spool;
use crate::shaping;
use crate::signals::Signals;
use crate::tally::Tally;
use crate::trace::Trace;
use crate::vm::{SourceState, Vm};
use crate::waiting::{next, now, sleep_until};

/// How often the machine sees a sample and the operator a new line.
const TICK: Duration = Duration::from_millis(20);
/// How often the link is measured (it copies the congestion controller).
const LINK_TICKS: u32 = 12;
/// A period of the guest's writing, for the order of post-copy.
const HEAT_TICKS: u32 = 50;
/// How often a trace gets a line.
const TRACE_TICKS: u32 = 5;
/// Results of started work that may wait.
const INPUTS_MAX: usize = 64;
/// Monitor commands that may wait.
const COMMANDS_MAX: usize = 64;
/// Bytes in flight: two bandwidth-delay products, and room for the target's telling (20 ms) and
/// for batches that are being decoded.
const BUDGET_BASE_BYTES: u64 = 1 << 20;

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
    pub(super) urgent_frames: Option<mpsc::Receiver<Frame>>,
    pub(super) lacking: Option<AbsentPages>,
    pub(super) workers: Workers,
    pub(super) lanes: Option<SourceLanes>,
    pub(super) lane_events: Option<mpsc::Receiver<LaneEvent>>,
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) vm_commands: mpsc::Sender<VmCommand>,
    pub(super) reconnected: Option<mpsc::Receiver<Peer>>,
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
            urgent_frames: None,
            lacking: None,
            workers: Workers::start(cores)?,
            lanes: None,
            lane_events: None,
            inputs,
            vm_commands,
            reconnected: None,
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
            urgent = next(&mut self.urgent_frames) => self.send(urgent).await,
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

    fn frame(&mut self, frame: Frame) {
        if let (Frame::Known { first, numbers }, Some(questions)) = (&frame, &self.questions) {
            questions.answered(*first, numbers.clone());
        }
        if let (Frame::Missing { runs }, Some(lanes)) = (&frame, &self.lanes)
            && let Err(detail) = lanes.missing(runs)
        {
            self.machine.handle(now(), Input::CaptureFailed(detail));
            return;
        }
        if let (Frame::Progress { applied_bytes }, Some(lanes)) = (&frame, &self.lanes) {
            lanes.applied(*applied_bytes);
        }
        if let Frame::Loaded { .. } = frame {
            crate::fault::point("source-before-shut");
        }
        if frame == Frame::Running {
            self.tally.running(now());
            self.trace_event("running");
            crate::fault::point("source-before-retire");
        }
        self.machine.handle(now(), Input::Frame(frame));
    }

    fn vm_event(&mut self, event: Option<Event>) {
        let kind = event.map(|event| event.kind);
        let input = match kind {
            Some(EventKind::Stop) => {
                self.tally.stopped(now());
                self.trace_event("stopped");
                if let Some(capture) = &self.capture {
                    capture.guest_stopped();
                }
                self.begin_last_round();
                self.call_hook(HookPhase::Stopped);
                Input::VmStopped
            }
            Some(EventKind::Resume) => Input::VmResumed,
            Some(EventKind::MigrationPass { .. }) => Input::PassStarted,
            #[expect(clippy::wildcard_enum_match_arm, reason = "QEMU adds statuses")]
            Some(EventKind::Migration { status }) => match status {
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    Input::VmMigration(VmMigration::Failed(status.to_string()))
                }
                // `completed` alone authorises nothing: it is read again with `postmigrate`.
                _ => Input::VmMigration(VmMigration::Other),
            },
            Some(EventKind::MonitorClosed { reason }) => Input::VmGone(reason.to_string()),
            Some(EventKind::Shutdown { .. } | EventKind::Other { .. }) => return,
            None => Input::VmGone("its monitor is closed".into()),
        };
        self.machine.handle(now(), input);
    }

    fn captured(&mut self, captured: Captured) {
        let input = match captured {
            Captured::Head { head, image } => {
                self.tally.pages_total = Some(image.layout.pages_total());
                self.tally.mapped = image.memory.is_main_shared();
                self.opened = Some(self.open_kept(head, &image));
                self.image = Some(image);
                return;
            }
            Captured::Relay { spool } => {
                self.spool = Some(spool);
                Input::Relay
            }
            Captured::PassDrained { pages, era } => {
                // A small pass may be over before its era began; its pages count all the same.
                self.pass_pages += pages;
                if era != self.era {
                    return;
                }
                Input::PassDrained {
                    pages: std::mem::take(&mut self.pass_pages),
                }
            }
            Captured::RamEnd => Input::RamEnd,
            Captured::Tail {
                pieces,
                total_bytes,
            } => Input::Tail {
                pieces,
                total_bytes,
            },
            Captured::Failed(detail) => Input::CaptureFailed(detail),
        };
        self.machine.handle(now(), input);
    }

    /// The guest is stopped: nothing is asked any more, nothing refers to another batch (S10).
    fn begin_last_round(&mut self) {
        self.questions = None;
        self.queries = None;
        if let Some(lanes) = &self.lanes {
            lanes.begin_last_round();
        }
    }

    fn request(&mut self, request: Request) {
        let answer = match request.command {
            Command::Status => serde_json::to_value(self.snapshot()).unwrap_or_default(),
            Command::Set(setting) => self.set(&setting),
            Command::Abort if self.machine.is_past_intent() => serde_json::json!({
                "ok": false, "error": "the guest is being handed over: only the target decides"
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

    fn set(&mut self, setting: &Setting) -> serde_json::Value {
        if let Some(ms) = setting.downtime_ms {
            let downtime = Duration::from_millis(ms);
            self.machine.handle(now(), Input::Downtime(downtime));
        }
        if let Some(bps) = setting.max_bandwidth_bps {
            let cap = (bps > 0).then_some(bps);
            self.options.shaping.set_rate_max(cap);
            if let Some(lanes) = &self.lanes {
                lanes.set_rate_max(cap.map(shaping::lane_bytes_per_s));
            }
        }
        if let Some(ms) = setting.yield_ms {
            self.options.shaping.set_mode(shaping::mode(ms));
        }
        if let Some(name) = &setting.when_stuck {
            let when_stuck: WhenStuck = match name.parse() {
                Ok(when_stuck) => when_stuck,
                Err(error) => return serde_json::json!({"ok": false, "error": format!("{error}")}),
            };
            self.machine.handle(now(), Input::WhenStuck(when_stuck));
        }
        serde_json::json!({"ok": true})
    }

    fn interrupted(&mut self) {
        if self.machine.has_arrived() {
            self.outcome = Some(Outcome::Arrived);
        } else if self.machine.is_past_intent() {
            let detail = "interrupted before the target's answer";
            self.outcome = Some(Outcome::Doubt {
                detail: detail.into(),
            });
        } else {
            self.machine
                .handle(now(), Input::Abort("interrupted by the operator".into()));
        }
    }

    fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        if self.ticks.is_multiple_of(LINK_TICKS) {
            self.measure_link();
        }
        if self.ticks.is_multiple_of(HEAT_TICKS) {
            self.age_heat();
        }
        if let (Some(image), Some(lanes), Some(capture)) = (&self.image, &self.lanes, &self.capture)
        {
            let counters = lanes.counters();
            self.tally.stats = counters.stats;
            let sample = Sample {
                backlog_pages: image.dirty.dirty_pages(),
                announced_pages: capture.announced_pages(),
                content_pages: content_pages(&counters.stats),
                sent_bytes: counters.sent_bytes,
                rtt: self.link_rtt,
                link_bytes_per_s: self.link_bytes_per_s,
            };
            self.machine.handle(now(), Input::Sample(sample));
            if self.trace.is_on() && self.ticks.is_multiple_of(TRACE_TICKS) {
                self.trace(&sample);
            }
        }
        self.show(false);
    }

    fn measure_link(&mut self) {
        let Some(peer) = &self.peer else { return };
        let link = peer.connection.link_sample();
        self.link_rtt = link.rtt_min;
        self.tally.sample(link);
        let Some(lanes) = &self.lanes else { return };
        let rate = link.rate_bps.unwrap_or(0) / 8;
        self.link_bytes_per_s = rate;
        let rtt_us = u64::try_from(link.rtt.as_micros()).unwrap_or(u64::MAX);
        let product = rate.saturating_mul(rtt_us) / 1_000_000;
        lanes.set_budget((2 * product + BUDGET_BASE_BYTES).min(self.options.budget.flight_bytes));
        if self.options.level.is_none()
            && let Some(level) = lanes.adapt_level(rate)
        {
            tracing::debug!(level, "compression");
            self.tally.level(level);
        }
    }

    pub(super) fn call_hook(&mut self, phase: HookPhase) {
        self.hook_calls.extend(self.hook.call(phase));
    }

    async fn finish(mut self, outcome: Outcome) -> anyhow::Result<Outcome> {
        let ended = now();
        self.progress.finish();
        self.call_hook(match outcome {
            Outcome::Arrived => HookPhase::Running,
            Outcome::Stayed { .. } | Outcome::Doubt { .. } => HookPhase::Failed,
        });
        if let Outcome::Stayed { .. } = outcome
            && let Err(error) = self.vm.restore_source(&self.state).await
        {
            tracing::warn!(%error, "QEMU's migration settings could not be put back");
        }
        self.leave().await;
        if let Some(lanes) = &self.lanes {
            self.tally.stats = lanes.counters().stats;
        }
        if let Some(kept) = self.kept.take() {
            kept.settle(&outcome, self.tally.root);
        }
        self.tally.dirty_pages_per_s = self.machine.dirty_pages_per_s();
        for call in self.hook_calls.drain(..) {
            crate::hook::finish(Some(call)).await;
        }
        self.door.close().await;
        let report = self.tally.report(
            ended,
            "source",
            self.me.vm.clone(),
            self.peer_name,
            &outcome,
        );
        self.memory.keep(&self.options.state, &report);
        crate::report::write(&report, self.options.report.as_deref())?;
        if self.options.json {
            crate::progress::say(&serde_json::to_string(&report)?);
        }
        Ok(outcome)
    }
}

/// Pages that cost bytes.
fn content_pages(stats: &BatchStats) -> u64 {
    stats.copy.pages + stats.known.pages + stats.delta.pages + stats.literal.pages + stats.raw.pages
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
