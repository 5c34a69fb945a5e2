//! The target's agent: does what its machine says, with modelled surroundings.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use transport::block::{Layout, PAGE_SIZE, PageHasher, Root};
use transport::session::target::{Action, Config, Input, Target};
use transport::wire::{Frame, FrameReader, Offer, Role, tail};

use crate::content::{self, KEY};
use crate::faults::variant;
use crate::journal::Step;
use crate::lanes::TargetLanes;
use crate::net::{CONTROL, Way, encoded};
use crate::plan::Plan;
use crate::world::{ATTEMPT, Event, Life, SOURCE_INCARNATION, TARGET_INCARNATION, World};

/// The target's agent.
#[derive(Debug)]
pub(crate) struct TargetEnd {
    pub(crate) machine: Target,
    pub(crate) life: Life,
    pub(crate) has_peer: bool,
    pub(crate) wants_peer: bool,
    pub(crate) reader: FrameReader,
    pub(crate) lanes: Option<TargetLanes>,
    /// The last Commit that came, for a fault that repeats it.
    pub(crate) last_commit: Option<Frame>,
    /// Bytes of a relayed stream that make no whole record yet.
    pub(crate) relayed: BytesMut,
    relays: bool,
    layout: Option<Arc<Layout>>,
    /// Root that both ledgers had when the last barrier was applied.
    pub(crate) root: Option<Root>,
    told_bytes: u64,
}

impl TargetEnd {
    pub(crate) fn new(now: Instant, plan: &Plan) -> TargetEnd {
        let config = Config {
            attempt: ATTEMPT,
            incarnation: TARGET_INCARNATION,
            verify: plan.verify,
            qemu: "10.0.2".into(),
            stay_paused: plan.stay_paused,
            epoch: 0,
            nonce: [2; 16],
        };
        TargetEnd {
            machine: Target::new(now, config),
            life: Life::Live,
            has_peer: true,
            wants_peer: false,
            reader: FrameReader::new(),
            lanes: None,
            last_commit: None,
            relayed: BytesMut::new(),
            relays: false,
            layout: None,
            root: None,
            told_bytes: 0,
        }
    }
}

impl World {
    pub(crate) fn target_input(&mut self, input: Input) {
        if self.target.life == Life::Live {
            self.note(format_args!("target <- {input:?}"));
            self.target.machine.handle(self.instant(), input);
        }
    }

    /// Does the machine's actions; false when there was none.
    pub(crate) fn target_drain(&mut self) -> bool {
        let mut moved = false;
        while self.target.life == Life::Live
            && let Some(action) = self.target.machine.poll_action()
        {
            moved = true;
            let name = action_name(&action);
            self.note(format_args!("target does {action:?}"));
            self.at_action(Role::Target, &name, true);
            if self.target.life != Life::Live {
                break;
            }
            self.target_act(action);
            self.at_action(Role::Target, &name, false);
        }
        moved
    }

    fn target_act(&mut self, action: Action) {
        if let Action::Done(outcome) = action {
            self.target.life = Life::Ended(outcome);
            if std::mem::take(&mut self.target.has_peer) {
                self.net.close(Way::ToSource);
            }
            self.target_gone();
            return;
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "what is left is asserted")]
        match action {
            Action::Send(frame) => self.target_send(&frame),
            Action::PrepareVm { blocks, .. } => {
                let layout = Layout::new(blocks).expect("the source's own blocks");
                self.target.layout = Some(Arc::new(layout));
                self.prepare_target();
            }
            Action::PrepareRelay => self.prepare_target(),
            Action::AcceptRelay => self.target.relays = true,
            Action::AcceptLanes { .. } => {
                let layout = self.target.layout.as_ref().expect("PrepareVm came first");
                self.target.lanes = Some(TargetLanes::new(layout, SOURCE_INCARNATION));
            }
            Action::FeedTail(pieces) => self.feed_tail(&pieces),
            Action::Prove(_) => self.target_prove(),
            Action::Recheck => {
                let qemu = &self.target_qemu;
                let sound = qemu.is_alive && qemu.is_loaded && !qemu.is_running;
                let checked = if sound && !self.recheck_fails {
                    Ok(())
                } else {
                    Err("target QEMU is not paused and completed".into())
                };
                let delay = self.about_ms(1);
                self.after(delay, Event::Target(Input::Rechecked(checked)));
            }
            Action::Journal(mark) => {
                let step = Step::of_target(&mark, self.plan.stay_paused);
                self.write_journal(Role::Target, step);
            }
            Action::Continue => {
                assert!(
                    self.journals[1].has(|step| matches!(step, Step::Committed { .. })),
                    "cont before Commit is durable"
                );
                let delay = self.about_ms(2);
                self.after(delay, Event::TargetCont);
            }
            Action::Quit => self.target_qemu.quit(),
            Action::AwaitPeer => self.target.wants_peer = true,
            other => assert!(
                matches!(other, Action::Phase(_)),
                "{other:?} is no part of a modelled session"
            ),
        }
    }

    fn prepare_target(&mut self) {
        let input = if self.target_qemu.is_alive {
            Input::VmPrepared {
                offer: Offer::default(),
            }
        } else {
            Input::VmFailed("QEMU is gone".into())
        };
        let delay = self.about_ms(10);
        self.after(delay, Event::Target(input));
    }

    /// What the end of the process means for target QEMU: a load that is under way fails.
    pub(crate) fn target_gone(&mut self) {
        if !self.target_qemu.is_loaded {
            self.target_qemu.quit();
        }
    }

    pub(crate) fn target_send(&mut self, frame: &Frame) {
        if self.target.has_peer {
            self.net.send(Way::ToSource, CONTROL, encoded(frame));
        }
    }

    pub(crate) fn target_control(&mut self, bytes: &[u8]) {
        if !self.target.has_peer {
            return;
        }
        self.target.reader.push(bytes);
        while let Some(frame) = self.target.reader.next_frame().expect("our own frames") {
            if matches!(frame, Frame::Commit { .. }) {
                self.check_commit();
                self.target.last_commit = Some(frame.clone());
            }
            if self.target.life == Life::Resolving {
                self.target_resolver(&frame);
            } else {
                self.target_input(Input::Frame(frame));
                self.target_drain();
            }
        }
    }

    pub(crate) fn target_lane(&mut self, lane: usize, bytes: &Bytes) {
        if self.target.life != Life::Live || !self.target.has_peer {
            return;
        }
        if self.target.relays {
            return self.relayed_bytes(bytes);
        }
        let Some(lanes) = &mut self.target.lanes else {
            panic!("lane bytes before the layout was taken");
        };
        match lanes.push(lane, bytes, &mut self.target_qemu) {
            Ok((reached, missing)) => {
                let layout = self.target.layout.as_ref().expect("PrepareVm came first");
                let root = lanes.root(layout);
                let missing_pages = lanes.missing_pages(layout);
                if !missing.is_empty() {
                    self.target_input(Input::Missing(missing));
                }
                let Some(barrier) = reached else { return };
                self.target.root = Some(root);
                let delay = self.about_ms(1);
                self.after(
                    delay,
                    Event::Target(Input::Applied {
                        barrier,
                        root,
                        missing_pages,
                    }),
                );
            }
            Err(detail) => self.target_input(Input::LaneFailed(detail)),
        }
    }

    fn feed_tail(&mut self, pieces: &[(Bytes, u32)]) {
        for (data, raw_len) in pieces {
            let piece = tail::unpack(data, *raw_len).expect("the source's own pieces");
            assert!(!piece.is_empty(), "device state has bytes");
        }
        let delay = self.about_ms(15);
        self.after(delay, Event::TargetLoaded);
    }

    pub(crate) fn target_loaded(&mut self) {
        if self.target.life != Life::Live || !self.target_qemu.is_alive {
            return;
        }
        if self.plan.load_fails {
            self.target_qemu.quit();
            self.target_input(Input::VmFailed("target QEMU could not load".into()));
        } else {
            self.target_qemu.is_loaded = true;
            self.target_input(Input::VmLoaded);
        }
    }

    pub(crate) fn target_cont(&mut self) {
        match self.target_qemu.cont() {
            Ok(()) => {
                self.arrived_at = Some(self.now);
                self.target_input(Input::VmResumed);
            }
            Err(true) => {
                self.target_qemu.quit();
                self.target_input(Input::NeverRan("target QEMU refused to run".into()));
            }
            Err(false) => self.target_input(Input::VmFailed("target QEMU is gone".into())),
        }
    }

    fn target_prove(&mut self) {
        let (Some(layout), Some(lanes)) = (&self.target.layout, &self.target.lanes) else {
            return;
        };
        let hasher = PageHasher::new(&KEY);
        let mut page = [0; PAGE_SIZE];
        let differs = lanes.announced().find(|(at, hash)| {
            self.target_qemu
                .page_at(content::number(layout, *at), &mut page);
            hasher.hash(&page) != *hash
        });
        let proved = match differs {
            None => Ok(()),
            Some((at, _)) => Err(format!("target memory: {at:?} differs")),
        };
        let delay = self.about_ms(6);
        self.after(delay, Event::Target(Input::Proved(proved)));
    }

    pub(crate) fn target_tick(&mut self) {
        if self.target.life != Life::Live {
            return;
        }
        if let Some(lanes) = &self.target.lanes {
            let applied_bytes = lanes.applied_bytes;
            let total = applied_bytes.iter().sum();
            if total != self.target.told_bytes {
                self.target.told_bytes = total;
                self.target_send(&Frame::Progress { applied_bytes });
            }
        }
    }

    /// A process that was asked to send nothing more for this long is given up.
    pub(crate) fn idle_timeout(&mut self) -> Duration {
        Duration::from_millis(5000 + self.random.up_to(10_000))
    }
}

fn action_name(action: &Action) -> String {
    if let Action::Send(frame) = action {
        format!("Send {}", frame.name())
    } else if let Action::Journal(mark) = action {
        format!("Journal {}", variant(mark))
    } else {
        variant(action)
    }
}
