//! Does what the source's machine says.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use qemu_glue::stream::return_path::Message;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use transport::block::{Contents, CopyIndex, KnownTable, LEVEL_DEFAULT, Layout};
use transport::quic::LaneSender;
use transport::quic::driver::{Held, LaneSettings, Questions, SourceLanes};
use transport::session::source::{Action, Input, Mark, Phase};
use transport::session::{Outcome, VmMigration};
use transport::wire::{Frame, Offer, RunState, Verify};

use super::driver::Driver;
use crate::capture::Capture;
use crate::control::socket_path;
use crate::fault;
use crate::journal::{Step, block_list, hex};
use crate::mapped;
use crate::peer::{meet_again, send_frame};
use crate::prove;
use crate::relay::Spool;
use crate::shaping::lane_bytes_per_s;
use crate::vm::Vm;
use crate::waiting::now;

/// QEMU connects to the capture socket within this after `migrate`.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Question frames that may wait for the control stream.
const QUERIES_MAX: usize = 2;
/// The last control frames may take this long to be acknowledged.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

impl Driver {
    /// Does one action. What takes long is started and answers with an input.
    pub(super) async fn act(&mut self, action: Action) {
        match action {
            Action::Send(frame) => self.send(frame).await,
            Action::StartCapture { nonce } => {
                self.nonce = nonce;
                if let Err(error) = self.start_capture().await {
                    self.tell(Input::CaptureFailed(format!("{error:#}")));
                }
            }
            Action::OpenLanes { basis, offer } => {
                if let Err(error) = self.open_lanes(basis, offer).await {
                    self.tell(Input::CaptureFailed(format!("{error:#}")));
                }
            }
            steering @ (Action::TriggerPass
            | Action::OpenPass
            | Action::HoldPass
            | Action::Pace(_)
            | Action::Arm
            | Action::Disarm
            | Action::Acknowledge
            | Action::Throttle(_)
            | Action::Release
            | Action::ReleaseToQemu) => self.steer(&steering),
            Action::OpenRelay => {
                if let Err(error) = self.open_relay().await {
                    self.tell(Input::CaptureFailed(format!("{error:#}")));
                }
            }
            Action::FlushLanes { barrier } => {
                self.order_pages();
                if let Some(lanes) = &self.lanes {
                    lanes.flush(barrier);
                }
            }
            Action::HoldLanes => {
                self.holds_lanes = true;
                if let Some(lanes) = &self.lanes {
                    lanes.hold();
                }
            }
            Action::Push => {
                if let Some(lanes) = &self.lanes {
                    lanes.resume();
                }
            }
            Action::Prove(verify) => self.prove(verify),
            Action::Shut => self.shut(),
            Action::CloseCapture => {
                if let Some(capture) = &self.capture {
                    capture.close();
                }
            }
            Action::Continue => self.command(VmCommand::Continue),
            Action::Journal(mark) => self.write_journal(&mark),
            Action::Reconnect => self.reconnect(),
            Action::Retire => self.retire().await,
            Action::Phase(phase) => {
                self.tally.phases.enter(now(), phase_name(phase));
                self.show(true);
            }
            Action::Round(round) => {
                self.tally.round(&round);
                self.trace_event("round");
            }
            Action::Done(_) => {}
        }
    }

    /// What QEMU is asked to do during pre-copy.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "only called with what steers QEMU"
    )]
    fn steer(&mut self, action: &Action) {
        match action {
            Action::TriggerPass => self.command(VmCommand::TriggerPass),
            Action::OpenPass => {
                if let Some(capture) = &self.capture {
                    self.era += 1;
                    self.command(VmCommand::OpenPass(capture.clone()));
                }
            }
            Action::HoldPass => self.command(VmCommand::HoldPass),
            Action::Pace(rate) => self.command(VmCommand::Pace(*rate)),
            Action::Arm => {
                self.trace_event("arm");
                if let Some(capture) = &self.capture {
                    capture.set_armed(true);
                    self.command(VmCommand::Arm);
                }
            }
            Action::Disarm => {
                self.trace_event("disarm");
                if let Some(capture) = &self.capture {
                    capture.set_armed(false);
                    self.era += 1;
                    self.pass_pages = 0;
                    self.command(VmCommand::OpenPass(capture.clone()));
                }
            }
            Action::Acknowledge => self.acknowledge(),
            Action::Throttle(percent) => self.command(VmCommand::Throttle(*percent)),
            Action::Release => {
                if let Some(capture) = &self.capture {
                    self.command(VmCommand::Release(capture.clone()));
                }
            }
            Action::ReleaseToQemu => {
                if let Some(capture) = &self.capture {
                    self.command(VmCommand::ReleaseToQemu(capture.clone()));
                }
            }
            other => tracing::error!(?other, "does not steer QEMU"),
        }
    }

    pub(super) async fn send(&mut self, frame: Frame) {
        let commits = matches!(frame, Frame::Commit { .. });
        if commits {
            fault::point("source-after-intent");
        }
        let Some(peer) = &mut self.peer else { return };
        if let Err(error) = send_frame(&mut peer.sender, &frame).await {
            tracing::debug!(%error, frame = frame.name(), "not sent");
        }
        if commits {
            fault::point_once_sent("source-after-commit").await;
        }
    }

    /// Listens, lets QEMU connect, starts the reading thread.
    async fn start_capture(&mut self) -> anyhow::Result<()> {
        let path = socket_path(&self.options.state, &self.me.vm, "capture")?;
        let listener = listen(&path)?;
        let downtime = self.options.policy.downtime;
        let shared = mapped::look(&self.vm, self.options.mapped).await;
        let reads_ram = shared.is_some();
        let started = self.vm.start_capture(&path, self.state.hold, downtime);
        let accepted = tokio::time::timeout(CONNECT_MAX, listener.accept());
        let (started, accepted) = tokio::join!(started, accepted);
        std::fs::remove_file(&path)?;
        started.context("QEMU cannot start its migration")?;
        let (socket, _) = accepted.context("QEMU did not connect to the capture socket")??;
        let socket = socket.into_std()?;
        socket.set_nonblocking(false)?;
        let state = self.options.state.path().to_owned();
        let (capture, captured) = Capture::start(socket, state, shared, self.wake.clone())?;
        self.capture = Some(Arc::new(capture));
        self.captured = Some(captured);
        // From here on QEMU refuses to change it.
        if reads_ram && mapped::xbzrle_is_on(&self.vm).await? {
            bail!("xbzrle was switched on as the migration began: it excludes reading guest RAM");
        }
        Ok(())
    }

    pub(super) async fn open_lanes(&mut self, basis: Bytes, offer: Offer) -> anyhow::Result<()> {
        let (Some(peer), Some(image)) = (&self.peer, &self.image) else {
            return Ok(());
        };
        let senders = peer.connection.open_lanes().await?;
        let mut settings = LaneSettings {
            incarnation: self.me.incarnation,
            key: self.secret,
            level: self.options.level.unwrap_or(LEVEL_DEFAULT),
            level_max: self.options.budget.level_max,
            disable: self.options.disable,
        };
        self.tally.level(settings.level);
        // What the target cannot read it cannot patch.
        settings.disable.delta |= !offer.readable;
        let contents: Arc<dyn Contents> = image.memory.clone();
        let held = self.held(&image.layout, basis, offer);
        if let Some(known) = &held.known {
            let (frames, queries) = mpsc::channel(QUERIES_MAX);
            let questions = Questions::start(&image.dirty, &contents, &self.secret, known, frames)?;
            self.questions = Some(questions);
            self.queries = Some(queries);
        }
        let (lanes, events) = SourceLanes::start(
            senders,
            &image.dirty,
            &contents,
            held,
            &settings,
            self.workers.clone(),
            self.wake.clone(),
        )?;
        // Before the first page. The congestion controller knows the cap too, but on a path of less
        // than a millisecond its least window is more than that.
        lanes.set_rate_max(self.options.shaping.rate_max().map(lane_bytes_per_s));
        self.lanes = Some(lanes);
        self.lane_events = Some(events);
        Ok(())
    }

    /// What the lanes may refer to, as far as the operator has not switched it off.
    fn held(&self, layout: &Arc<Layout>, basis: Bytes, offer: Offer) -> Held {
        let disable = self.options.disable;
        let basis = match (&self.kept, &self.hashes) {
            (Some(kept), Some(hashes)) => kept.basis(basis, hashes),
            _ => None,
        };
        if let Some(basis) = &basis {
            let (agreed, all) = (basis.agreed().count(), layout.ranges_total());
            tracing::info!("the target holds {agreed} of {all} ranges from an earlier trip");
        }
        let budget = self.options.budget;
        let known_max = u64::from(offer.known_pages).min(layout.pages_total());
        let known_max = usize::try_from(known_max)
            .unwrap_or(usize::MAX)
            .min(budget.known_entries);
        Held {
            replica: self.kept.as_ref().map(|kept| kept.replica.clone() as _),
            basis,
            copies: (offer.readable && !disable.copy)
                .then(|| Arc::new(CopyIndex::new(layout, budget.copies_bytes))),
            known: (known_max > 0 && !disable.known).then(|| Arc::new(KnownTable::new(known_max))),
        }
    }

    /// Lane 0 carries QEMU's own bytes; the others stay empty.
    async fn open_relay(&mut self) -> anyhow::Result<()> {
        let (Some(peer), Some(spool)) = (&self.peer, self.spool.clone()) else {
            return Ok(());
        };
        let lanes = peer.connection.open_lanes().await?;
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let input = match relay_bytes(lanes, &spool).await {
                Ok(bytes) => Input::Relayed { bytes },
                Err(error) => Input::CaptureFailed(format!("relay: {error:#}")),
            };
            give(&inputs, input).await;
        });
        Ok(())
    }

    /// An armed QEMU stops the guest at once: no monitor command stands between.
    fn acknowledge(&mut self) {
        let Some(capture) = &self.capture else { return };
        if let Err(error) = capture.answer(&Message::SwitchoverAck) {
            self.tell(Input::CaptureFailed(format!("QEMU's return path: {error}")));
        }
    }

    /// SHUT(0), then `completed` and `postmigrate` are read back (S1).
    fn shut(&mut self) {
        let Some(capture) = &self.capture else { return };
        if let Err(error) = capture.answer(&Message::Shut(0)) {
            self.tell(Input::CaptureFailed(format!("QEMU's return path: {error}")));
            return;
        }
        fault::point("source-after-shut");
        let (vm, inputs) = (self.vm.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let status = match vm.wait_postmigrate().await {
                Ok(()) => VmMigration::Completed,
                Err(detail) => VmMigration::Failed(detail),
            };
            give(&inputs, Input::VmMigration(status)).await;
        });
    }

    fn prove(&mut self, verify: Verify) {
        let (Some(image), Some(lanes)) = (&self.image, &self.lanes) else {
            return;
        };
        let (vm, inputs, layout) = (self.vm.clone(), self.inputs.clone(), image.layout.clone());
        let announced = lanes.for_each_announced();
        let (key, attempt) = (self.secret, self.me.attempt);
        tokio::spawn(async move {
            let proved = prove::prove(&vm, &layout, &key, verify, attempt, announced).await;
            let proved = proved.map_err(|error| format!("source memory: {error:#}"));
            give(&inputs, Input::Proved(proved)).await;
        });
    }

    fn write_journal(&mut self, mark: &Mark) {
        let step = match mark {
            Mark::Intent {
                target_incarnation,
                root,
                run_state,
            } => {
                fault::point("source-before-intent");
                self.entry.paused = *run_state == RunState::Paused;
                Step::Intent {
                    root: hex(&root.0),
                    target_incarnation: *target_incarnation,
                    blocks: self.blocks_if(self.left_behind > 0),
                }
            }
            Mark::Holding => Step::Holding {
                blocks: self.blocks_if(true),
            },
            Mark::Settled(Outcome::Arrived) => Step::SettledThere {
                reason: "arrived".into(),
            },
            Mark::Settled(Outcome::Stayed { detail, .. }) => Step::SettledHere {
                reason: detail.clone(),
            },
            Mark::Settled(Outcome::Doubt { .. }) => return,
        };
        let (journal, inputs) = (self.journal.clone(), self.inputs.clone());
        let entry = self.entry.then(step);
        tokio::task::spawn_blocking(move || {
            let written = journal
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .append(&entry);
            let written = written.map_err(|error| error.to_string());
            if inputs.blocking_send(Input::Journaled(written)).is_err() {
                tracing::debug!("the session has ended");
            }
        });
    }

    /// What a later process must know of the image, if pages stay behind.
    fn blocks_if(&self, stay_behind: bool) -> Vec<(String, u32)> {
        match &self.image {
            Some(image) if stay_behind => block_list(&image.layout),
            Some(_) | None => Vec::new(),
        }
    }

    /// Brings a connection for the status dialogue, unless one is up or under way.
    fn reconnect(&mut self) {
        if self.peer.is_some() {
            self.tell(Input::Reconnected);
        }
        // A listener goes on listening: the caller that it has may be dead without a word.
        let has_caller = self.peer.is_some() && !self.door.listens();
        if has_caller || self.reconnected.is_some() {
            return;
        }
        self.reconnected = Some(meet_again(&self.door, &self.me));
    }

    /// The guest is the target's: this QEMU has done its work.
    async fn retire(&mut self) {
        if self.options.keep_source {
            return;
        }
        if let Err(error) = self.vm.quit().await {
            tracing::warn!("source QEMU: {error:#}");
        }
        fault::point("source-after-retire");
    }

    /// Closes the connection so that nothing sent is lost.
    pub(super) async fn leave(&mut self) {
        self.lanes
            .take()
            .inspect(|lanes| self.tally.stats = lanes.counters().stats);
        if let Some(peer) = self.peer.take() {
            let left = tokio::time::timeout(FAREWELL_MAX, peer.sender.finish()).await;
            tracing::debug!(acknowledged = left.is_ok(), "control stream ended");
            peer.connection
                .close(transport::quic::CloseCode::Done, "done");
        }
    }

    /// Hands a monitor command to the task that runs them in order, beside this loop: after a stop
    /// QEMU's monitor may be busy for as long as it writes.
    fn command(&mut self, command: VmCommand) {
        if self.vm_commands.try_send(command).is_err() {
            self.tell(Input::VmCommandFailed(
                "QEMU's monitor takes no more commands".into(),
            ));
        }
    }

    fn tell(&mut self, input: Input) {
        self.machine.handle(now(), input);
    }
}

/// Sends the spool over lane 0 and returns its length when the target's QUIC has it all.
async fn relay_bytes(lanes: Vec<LaneSender>, spool: &Spool) -> anyhow::Result<u64> {
    let mut lanes = lanes.into_iter();
    let mut lane = lanes.next().context("no lane")?;
    let mut total = 0;
    while let Some(piece) = spool.next().await? {
        let bytes = piece.len();
        lane.send(piece).await?;
        spool.sent(bytes);
        total += bytes as u64;
    }
    lane.finish().await?;
    Ok(total)
}

/// A step of steering source QEMU.
#[derive(Debug)]
pub(super) enum VmCommand {
    TriggerPass,
    /// Unlimited: what is read from here on, and only that, tells when the pass is over. Before,
    /// QEMU's rate limit makes empty sections with pages left.
    OpenPass(Arc<Capture>),
    HoldPass,
    Pace(u64),
    /// Unlimited, and whatever is left fits: it syncs without a pause.
    Arm,
    Throttle(u8),
    /// Unlimited, then the acknowledgement: QEMU stops the guest within its next 100 ms window.
    Release(Arc<Capture>),
    /// The same with the limit that the operator asked for: QEMU decides.
    ReleaseToQemu(Arc<Capture>),
    Continue,
}

/// Runs monitor commands in order until the session ends.
pub(super) async fn run_commands(
    vm: Vm,
    downtime: Duration,
    mut commands: mpsc::Receiver<VmCommand>,
    inputs: mpsc::Sender<Input>,
) {
    while let Some(command) = commands.recv().await {
        let done = match &command {
            VmCommand::TriggerPass => vm.trigger_pass().await,
            VmCommand::OpenPass(_) => vm.open_pass().await,
            VmCommand::HoldPass => vm.hold_pass().await,
            VmCommand::Pace(rate) => vm.pace(*rate).await,
            VmCommand::Arm | VmCommand::Release(_) => vm.release().await,
            VmCommand::Throttle(percent) => vm.throttle(*percent).await,
            VmCommand::ReleaseToQemu(_) => vm.release_to_qemu(downtime).await,
            VmCommand::Continue => vm.qmp.cont().await,
        };
        let followed = match (done, command) {
            (Err(error), _) => Err(Input::VmCommandFailed(error.to_string())),
            (Ok(()), VmCommand::OpenPass(capture)) => {
                capture.next_era();
                Ok(())
            }
            (Ok(()), VmCommand::Release(capture) | VmCommand::ReleaseToQemu(capture)) => capture
                .answer(&Message::SwitchoverAck)
                .map_err(|error| Input::CaptureFailed(format!("QEMU's return path: {error}"))),
            (Ok(()), _) => Ok(()),
        };
        if let Err(input) = followed {
            give(&inputs, input).await;
        }
    }
}

async fn give(inputs: &mpsc::Sender<Input>, input: Input) {
    if inputs.send(input).await.is_err() {
        tracing::debug!("the session has ended");
    }
}

/// A socket that only this user and root may connect to.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Precopy => "precopy",
        Phase::Stop => "stop",
        Phase::Load => "load",
        Phase::Complete => "complete",
        Phase::Commit => "commit",
        Phase::PostCopy => "post-copy",
        Phase::Settle => "settle",
    }
}
