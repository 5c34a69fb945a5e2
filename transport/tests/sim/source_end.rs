//! The source's agent: does what its machine says, with modelled surroundings.

use std::time::{Duration, Instant};

use transport::block::{PAGE_SIZE, PageHasher, Root};
use transport::session::Policy;
use transport::session::source::{Action, Config, Input, Sample, Source};
use transport::wire::{Frame, FrameReader, Role, RunState};

use crate::capture::{Capture, Monitor};
use crate::content::{self, KEY};
use crate::faults::variant;
use crate::journal::Step;
use crate::lanes::{Image, SourceLanes};
use crate::net::{CONTROL, Way, encoded};
use crate::plan::Plan;
use crate::relay::Spool;
use crate::world::{ATTEMPT, Event, Life, SOURCE_INCARNATION, TARGET_INCARNATION, World};

/// Bytes in flight: two bandwidth-delay products, within these.
const BUDGET_MIN_BYTES: u64 = 768 << 10;
const BUDGET_MAX_BYTES: u64 = 24 << 20;

/// The source's agent.
#[derive(Debug)]
pub(crate) struct SourceEnd {
    pub(crate) machine: Source,
    pub(crate) life: Life,
    pub(crate) has_peer: bool,
    pub(crate) wants_peer: bool,
    pub(crate) reader: FrameReader,
    pub(crate) image: Option<Image>,
    pub(crate) lanes: Option<SourceLanes>,
    pub(crate) retired: bool,
    /// Root over the ledger as sent, when the last barrier was out.
    pub(crate) root: Option<Root>,
    pub(crate) capture: Capture,
    pub(crate) monitor: Monitor,
    pub(crate) spool: Spool,
    ticks: u32,
    link_is_known: bool,
}

impl SourceEnd {
    pub(crate) fn new(now: Instant, plan: &Plan) -> SourceEnd {
        let config = Config {
            attempt: ATTEMPT,
            target_incarnation: TARGET_INCARNATION,
            hold: plan.hold,
            run_state: if plan.was_running {
                RunState::Running
            } else {
                RunState::Paused
            },
            policy: Policy::new(plan.downtime),
            post_copy: false,
            epoch: 0,
        };
        SourceEnd {
            machine: Source::new(now, config),
            life: Life::Live,
            has_peer: true,
            wants_peer: false,
            reader: FrameReader::new(),
            image: None,
            lanes: None,
            retired: false,
            root: None,
            capture: Capture::default(),
            monitor: Monitor::default(),
            spool: Spool::default(),
            ticks: 0,
            link_is_known: false,
        }
    }
}

impl World {
    pub(crate) fn source_input(&mut self, input: Input) {
        if self.source.life == Life::Live {
            let quiet = matches!(
                input,
                Input::Sample(_) | Input::PassStarted | Input::Frame(Frame::Progress { .. })
            );
            if !quiet {
                self.note(format_args!("source <- {input:?}"));
            }
            self.source.machine.handle(self.instant(), input);
        }
    }

    /// Does the machine's actions; false when there was none.
    pub(crate) fn source_drain(&mut self) -> bool {
        let mut moved = false;
        while self.source.life == Life::Live
            && let Some(action) = self.source.machine.poll_action()
        {
            moved = true;
            let name = action_name(&action);
            self.note(format_args!("source does {action:?}"));
            self.at_action(Role::Source, &name, true);
            if self.source.life != Life::Live {
                break;
            }
            self.source_act(action);
            self.at_action(Role::Source, &name, false);
        }
        moved
    }

    fn source_act(&mut self, action: Action) {
        if let Some(commands) = self.vm_commands(&action) {
            commands
                .into_iter()
                .for_each(|command| self.command(command));
            return;
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "what is left is asserted")]
        match action {
            Action::Send(frame) => self.source_send(&frame),
            Action::OpenLanes { .. } => {
                let image = self.source.image.as_ref().expect("the head came first");
                let lanes = SourceLanes::open(&image.layout, SOURCE_INCARNATION, &mut self.net);
                self.source.lanes = Some(lanes);
            }
            Action::OpenRelay => self.source.spool.is_open = true,
            Action::FlushLanes { barrier } => {
                if let Some(lanes) = &mut self.source.lanes {
                    lanes.last_round = true;
                    lanes.barrier = barrier;
                }
            }
            Action::Prove(_) => self.source_prove(),
            Action::Shut => self.after(Duration::from_micros(100), Event::Shut),
            Action::CloseCapture => {
                self.source.capture.is_open = false;
                self.after(Duration::from_micros(500), Event::CaptureClosed);
                let told = Input::CaptureFailed("QEMU closed its stream".into());
                self.after(Duration::from_millis(1), Event::Source(told));
            }
            Action::Journal(mark) => {
                if let Some(step) = Step::of_source(&mark) {
                    self.write_journal(Role::Source, step);
                }
            }
            Action::Reconnect => {
                if self.source.has_peer {
                    self.source_input(Input::Reconnected);
                } else {
                    self.source.wants_peer = true;
                }
            }
            Action::Retire => {
                assert!(!self.source_qemu.is_running, "a running guest is retired");
                self.source.retired = true;
                self.source_qemu.quit();
            }
            Action::Done(outcome) => {
                self.source.life = Life::Ended(outcome);
                self.source_leaves();
            }
            other => assert!(
                matches!(other, Action::Phase(_) | Action::Round(_)),
                "{other:?} is no part of a modelled session"
            ),
        }
    }

    /// The process ends in order: what it said goes out, QEMU's socket closes.
    fn source_leaves(&mut self) {
        if std::mem::take(&mut self.source.has_peer) {
            self.net.close(Way::ToTarget);
        }
        self.source_gone();
    }

    /// What the end of the process means for source QEMU, ordered or not.
    pub(crate) fn source_gone(&mut self) {
        self.source.capture.is_open = false;
        self.source.lanes = None;
        self.source.monitor.commands.clear();
        self.after(Duration::from_micros(200), Event::CaptureClosed);
    }

    pub(crate) fn source_send(&mut self, frame: &Frame) {
        if self.source.has_peer {
            self.net.send(Way::ToTarget, CONTROL, encoded(frame));
        }
    }

    pub(crate) fn source_control(&mut self, bytes: &[u8]) {
        if !self.source.has_peer {
            return;
        }
        self.source.reader.push(bytes);
        while let Some(frame) = self.source.reader.next_frame().expect("our own frames") {
            if let (Frame::Progress { applied_bytes }, Some(lanes)) =
                (&frame, &mut self.source.lanes)
            {
                lanes.applied(*applied_bytes);
            }
            if let (Frame::Missing { runs }, Some(lanes), Some(image)) =
                (&frame, &mut self.source.lanes, &self.source.image)
            {
                lanes.missing(runs, image);
            }
            if self.source.life == Life::Resolving {
                self.source_resolver(&frame);
            } else {
                self.source_input(Input::Frame(frame));
                self.source_drain();
            }
        }
    }

    fn source_prove(&mut self) {
        let Some(lanes) = &self.source.lanes else {
            return;
        };
        let layout = content::layout(self.plan.ram_pages);
        let hasher = PageHasher::new(&KEY);
        let mut page = [0; PAGE_SIZE];
        let differs = lanes.announced().find(|(at, hash)| {
            let number = content::number(&layout, *at);
            content::content(number, self.source_qemu.memory[number], &mut page);
            hasher.hash(&page) != *hash
        });
        let proved = match differs {
            None => Ok(()),
            Some((at, _)) => Err(format!("source memory: {at:?} differs")),
        };
        let delay = self.about_ms(6);
        self.after(delay, Event::Source(Input::Proved(proved)));
    }

    pub(crate) fn source_tick(&mut self) {
        if self.source.life != Life::Live {
            return;
        }
        let rtt = 2 * self.plan.link.delay;
        self.source.ticks += 1;
        let (Some(image), Some(lanes)) = (&self.source.image, &mut self.source.lanes) else {
            return;
        };
        if self.source.ticks.is_multiple_of(5) && self.source.has_peer {
            self.source.link_is_known |= lanes.sent_bytes > 50_000;
            let rate = self.plan.link.rate_bps / 8;
            let rtt_us = u64::try_from(rtt.as_micros()).expect("a short time");
            let product = 2 * rate * rtt_us / 1_000_000;
            lanes.budget_bytes = product.clamp(BUDGET_MIN_BYTES, BUDGET_MAX_BYTES);
        }
        let known = self.source.link_is_known;
        let sample = Sample {
            backlog_pages: image.dirty.dirty_pages(),
            announced_pages: image.announced_pages,
            content_pages: lanes.content_pages,
            sent_bytes: lanes.sent_bytes,
            rtt,
            link_bytes_per_s: if known {
                self.plan.link.rate_bps / 9
            } else {
                0
            },
        };
        self.source_input(Input::Sample(sample));
    }

    pub(crate) fn pump_lanes(&mut self) {
        if self.source.life != Life::Live || !self.source.has_peer {
            return;
        }
        let (Some(image), Some(lanes)) = (&self.source.image, &mut self.source.lanes) else {
            return;
        };
        if let Some((barrier, root)) = lanes.pump(image, &mut self.net) {
            self.source.root = Some(root);
            self.source_input(Input::Marked {
                barrier,
                root,
                absent_pages: 0,
            });
            self.source_drain();
        }
    }
}

/// What a plan calls an action: its variant, and the frame's or the mark's.
fn action_name(action: &Action) -> String {
    if let Action::Send(frame) = action {
        format!("Send {}", frame.name())
    } else if let Action::Journal(mark) = action {
        format!("Journal {}", variant(mark))
    } else {
        variant(action)
    }
}
