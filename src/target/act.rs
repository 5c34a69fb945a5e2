//! Does what the target's machine says.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use qemu_glue::qmp::QmpError;
use tokio::sync::mpsc;
use transport::block::{AbsentPages, BlockSpec, Layout};
use transport::quic::Connection;
use transport::quic::driver::{TargetLanes, Workers, agree};
use transport::session::target::{Action, Input, Mark, Phase};
use transport::store::Role;
use transport::wire::{Frame, Offer, RunState, Verify};

use super::driver::Driver;
use super::postcopy::{PostCopy, sinks};
use crate::control::socket_path;
use crate::fault;
use crate::feed::{Elsewhere, FeedSink, Feeder, Filling};
use crate::journal::{Step, block_list, hex};
use crate::kept::{Kept, Whose};
use crate::mapped::{self, TargetMemory};
use crate::peer::{meet_again, send_frame};
use crate::prove;
use crate::shared::Answering;
use crate::vm::Vm;
use crate::waiting::now;

/// The last control frames may take this long to be acknowledged.
const FAREWELL_MAX: Duration = Duration::from_secs(5);
/// A `cont` whose reply was lost counts as executed; QEMU is asked this often whether it runs.
const ASK_INTERVAL: Duration = Duration::from_millis(200);

impl Driver {
    /// Does one action. What takes long is started and answers with an input.
    pub(super) async fn act(&mut self, action: Action) {
        match action {
            Action::Send(frame) => self.send(frame).await,
            Action::PrepareVm {
                head,
                blocks,
                post_copy,
            } => {
                let prepared = self.prepare_vm(&head, blocks, post_copy).await;
                self.tell(match prepared {
                    Ok(offer) => Input::VmPrepared { offer },
                    Err(error) => Input::VmFailed(format!("{error:#}")),
                });
            }
            Action::PrepareRelay => {
                let prepared = self.prepare_relay().await;
                self.tell(match prepared {
                    Ok(()) => Input::VmPrepared {
                        offer: Offer::default(),
                    },
                    Err(error) => Input::VmFailed(format!("{error:#}")),
                });
            }
            Action::AgreeBasis { digests } => self.agree_basis(digests),
            Action::AcceptLanes { basis } => self.accept_lanes(basis),
            Action::AcceptRelay => self.accept_relay(),
            Action::FeedTail(pieces) => self.feed_tail(pieces),
            Action::LeaveOut { pages } => self.leave_out(pages),
            Action::FeedPackage(pieces) => self.feed_package(pieces),
            Action::TellAbsent => self.tell_absent().await,
            Action::Prove(verify) => self.prove(verify),
            Action::Recheck => {
                let checked = self.vm.check_loaded(self.is_filling()).await;
                self.tell(Input::Rechecked(checked));
            }
            Action::Journal(mark) => self.write_journal(&mark),
            Action::Continue => self.run_guest(),
            Action::Pause => {
                if let Err(error) = self.vm.qmp.stop().await {
                    tracing::error!(%error, "the guest here could not be paused");
                }
            }
            Action::Quit => self.quit().await,
            Action::AwaitPeer => self.await_peer(),
            Action::Phase(phase) => {
                self.tally.phases.enter(now(), phase_name(phase));
                self.show(true);
            }
            Action::Done(_) => {}
        }
    }

    pub(super) async fn send(&mut self, frame: Frame) {
        if matches!(frame, Frame::Loaded { .. }) {
            fault::point("target-before-loaded");
        }
        let Some(peer) = &mut self.peer else { return };
        if let Err(error) = send_frame(&mut peer.sender, &frame).await {
            tracing::debug!(%error, frame = frame.name(), "not sent");
        }
        if let Frame::Loaded { .. } = frame {
            fault::point_once_sent("target-after-loaded").await;
        }
        if frame == Frame::Running {
            fault::point_once_sent("target-after-running").await;
        }
    }

    /// Compares machine and memory, stops target QEMU, connects to its incoming socket, feeds the
    /// head. The one connection to that socket: a probe would end QEMU.
    async fn prepare_vm(
        &mut self,
        head: &Bytes,
        blocks: Vec<BlockSpec>,
        post_copy: bool,
    ) -> anyhow::Result<Offer> {
        let layout = Arc::new(Layout::new(blocks)?);
        self.tally.pages_total = Some(layout.pages_total());
        let path = socket_path(&self.options.state, &self.me.vm, "incoming")?;
        self.open_kept(&layout).await;
        let post_copy = self
            .vm
            .prepare_target(head, layout.blocks(), &path, post_copy)
            .await?;
        let post_copy = post_copy && self.keep_monitor().await;
        let socket = UnixStream::connect(&path)?;
        let (feeder, fed) = Feeder::start(socket, head, layout.blocks(), post_copy)?;
        // QEMU must see every page that comes late: then all of them go through its stream (S11).
        let shared = match post_copy {
            true => None,
            false => mapped::look(&self.vm, self.options.mapped).await,
        };
        self.memory = TargetMemory::open(&layout, shared).await?;
        let memory = self.memory.as_ref();
        self.tally.mapped = memory.is_some_and(|memory| memory.is_main_shared());
        if post_copy {
            let elsewhere = Elsewhere {
                replica: self.kept.as_ref().map(|kept| kept.replica.clone() as _),
                ..Elsewhere::default()
            };
            let sink = feeder.sink(0, elsewhere);
            let filling = Filling {
                absent: Arc::new(AbsentPages::new(layout.clone())),
                faults: Arc::default(),
            };
            self.post_copy = Some(PostCopy::start(&layout, sink, self.secret, filling)?);
        }
        self.layout = Some(layout);
        self.feeder = Some(feeder);
        self.fed = Some(fed);
        Ok(Offer {
            post_copy,
            readable: self.kept.is_some() || self.tally.mapped,
            known_pages: self.open_shared().await?,
        })
    }

    /// Whoever comes after this process must reach a QEMU whose main loop waits for a page.
    async fn keep_monitor(&self) -> bool {
        let kept = self.vm.keep_monitor().await;
        if let Err(error) = &kept {
            tracing::warn!("no post-copy: {error:#}");
        }
        kept.is_ok()
    }

    /// Waits for the index of shared images; returns how many pages it can name.
    async fn open_shared(&mut self) -> anyhow::Result<u32> {
        let Some(opening) = self.opening.take() else {
            return Ok(0);
        };
        self.shared = opening.await.ok().flatten();
        let (Some(shared), Some(layout)) = (&self.shared, &self.layout) else {
            return Ok(0);
        };
        let (answering, answers) = Answering::start(shared, layout.pages_total())?;
        self.answering = Some(answering);
        self.answers = Some(answers);
        Ok(shared.known_pages())
    }

    /// Opens what this side has kept and hashes it beside this loop.
    async fn open_kept(&mut self, layout: &Arc<Layout>) {
        let Some(peer) = &self.peer else { return };
        let whose = Whose {
            state: self.options.state.clone(),
            vm: self.me.vm.clone(),
            peer: peer.connection.peer(),
            role: Role::Target,
            attempt: self.me.attempt,
        };
        let layout = layout.clone();
        let opened = tokio::task::spawn_blocking(move || Kept::open(&whose, &layout)).await;
        self.kept = opened.ok().flatten();
        self.hashing = self.kept.as_ref().map(|kept| kept.hash(self.secret));
    }

    /// Compares the source's digests with this side's, once these are there.
    fn agree_basis(&mut self, digests: Vec<[u8; 16]>) {
        let (found, agreed) = mpsc::channel(1);
        self.agreed = Some(agreed);
        let (hashing, nonce, key) = (self.hashing.take(), self.nonce, self.secret);
        tokio::spawn(async move {
            let hashes = match hashing {
                Some(hashing) => hashing.await.ok().flatten(),
                None => None,
            };
            let basis = hashes
                .as_ref()
                .map_or(Bytes::new(), |mine| agree(mine, &digests, &nonce, &key));
            if found.send((basis, hashes)).await.is_err() {
                tracing::debug!("the session has ended");
            }
        });
    }

    /// The relayed stream brings head and block list itself.
    async fn prepare_relay(&mut self) -> anyhow::Result<()> {
        tracing::warn!("the source relays QEMU's stream byte for byte: memory is not proved");
        let path = socket_path(&self.options.state, &self.me.vm, "incoming")?;
        self.vm.open_incoming(&path).await?;
        let (feeder, fed) = Feeder::start_relay(UnixStream::connect(&path)?)?;
        self.feeder = Some(feeder);
        self.fed = Some(fed);
        Ok(())
    }

    fn accept_relay(&mut self) {
        let (Some(peer), Some(feeder)) = (&self.peer, &self.feeder) else {
            return;
        };
        let (connection, sink) = (
            peer.connection.clone(),
            feeder.sink(0, Elsewhere::default()),
        );
        let (workers, inputs) = (self.workers.clone(), self.inputs.clone());
        tokio::spawn(async move {
            if let Err(error) = take_relay(&connection, sink, &workers).await {
                give(&inputs, Input::LaneFailed(format!("relay: {error:#}"))).await;
            }
        });
    }

    /// The lanes come with the source's first bytes; waiting for them must not stop this loop.
    fn accept_lanes(&mut self, basis: Bytes) {
        let (Some(peer), Some(layout), Some(feeder)) = (&self.peer, &self.layout, &self.feeder)
        else {
            return;
        };
        let basis = match (&self.kept, &self.hashes) {
            (Some(kept), Some(hashes)) => kept.basis(basis, hashes),
            _ => None,
        };
        let elsewhere = Elsewhere {
            memory: self.memory.clone(),
            replica: self.kept.as_ref().map(|kept| kept.replica.clone() as _),
            shared: self.shared.clone(),
        };
        let started = TargetLanes::start(
            peer.connection.clone(),
            layout,
            &self.secret,
            self.peer_incarnation,
            &self.workers,
            basis,
            sinks(feeder, &elsewhere),
        );
        match started {
            Ok((lanes, faults)) => {
                self.lanes = Some(lanes);
                self.lane_faults = Some(faults);
            }
            Err(error) => self.tell(Input::LaneFailed(error.to_string())),
        }
    }

    fn feed_tail(&mut self, pieces: Vec<(Bytes, u32)>) {
        if let Some(memory) = &self.memory {
            memory.close();
        }
        let Some(feeder) = &self.feeder else { return };
        if let Err(error) = feeder.tail(pieces) {
            self.tell(Input::VmFailed(format!("{error:#}")));
        }
    }

    fn feed_package(&mut self, pieces: Vec<(Bytes, u32)>) {
        let (Some(feeder), Some(post_copy)) = (&self.feeder, &mut self.post_copy) else {
            return;
        };
        post_copy.is_fed = true;
        let filling = Filling {
            absent: post_copy.absent.clone(),
            faults: post_copy.faults.clone(),
        };
        if let Err(error) = feeder.package(pieces, filling) {
            self.tell(Input::VmFailed(format!("{error:#}")));
        }
    }

    /// The devices are loaded, or will be, while pages are lacking.
    pub(super) fn is_filling(&self) -> bool {
        self.post_copy
            .as_ref()
            .is_some_and(|post_copy| post_copy.is_fed)
    }

    /// QEMU has said SHUT(0) with every page: `completed` must follow.
    pub(super) fn check_filled(&self) {
        let (vm, inputs) = (self.vm.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let input = match vm.wait_filled().await {
                Ok(()) => {
                    release_monitor(&vm).await;
                    Input::AllPages
                }
                Err(detail) => Input::VmFailed(detail),
            };
            give(&inputs, input).await;
        });
    }

    /// QEMU has said SHUT(0), or that its devices are loaded: `completed` (but for lacking pages) and
    /// `paused` must follow.
    pub(super) fn check_loaded(&self) {
        let (vm, inputs) = (self.vm.clone(), self.inputs.clone());
        let (is_filling, keeps_monitor) = (self.is_filling(), self.post_copy.is_some());
        tokio::spawn(async move {
            let input = match vm.wait_loaded(is_filling).await {
                Ok(()) => {
                    if keeps_monitor && !is_filling {
                        release_monitor(&vm).await;
                    }
                    Input::VmLoaded
                }
                Err(detail) => Input::VmFailed(detail),
            };
            give(&inputs, input).await;
        });
    }

    fn prove(&mut self, verify: Verify) {
        let (Some(layout), Some(lanes)) = (&self.layout, &self.lanes) else {
            return;
        };
        let (vm, inputs, layout) = (self.vm.clone(), self.inputs.clone(), layout.clone());
        let announced = lanes.for_each_announced();
        let (key, attempt) = (self.secret, self.me.attempt);
        tokio::spawn(async move {
            let proved = prove::prove(&vm, &layout, &key, verify, attempt, announced).await;
            let proved = proved.map_err(|error| format!("target memory: {error:#}"));
            give(&inputs, Input::Proved(proved)).await;
        });
    }

    fn write_journal(&mut self, mark: &Mark) {
        let committed = matches!(mark, Mark::Committed { .. });
        let step = match mark {
            Mark::Committed { root, run_state } => {
                let asked = self.options.stay_paused;
                self.entry.paused = *run_state == RunState::Paused || asked;
                Step::Committed {
                    root: hex(&root.0),
                    blocks: self.blocks_if(self.is_filling()),
                }
            }
            Mark::Refused(reason) => Step::Refused {
                reason: reason.clone(),
            },
            Mark::NeverRan(reason) => Step::NeverRan {
                reason: reason.clone(),
            },
            Mark::Filling => Step::Filling {
                blocks: self.blocks_if(true),
            },
            Mark::Running => Step::Running,
            Mark::Settled => Step::SettledHere {
                reason: "arrived".into(),
            },
        };
        let (journal, inputs) = (self.journal.clone(), self.inputs.clone());
        let entry = self.entry.then(step);
        tokio::task::spawn_blocking(move || {
            let written = journal
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .append(&entry);
            if committed {
                fault::point("target-after-committed");
            }
            let written = written.map_err(|error| error.to_string());
            if inputs.blocking_send(Input::Journaled(written)).is_err() {
                tracing::debug!("the session has ended");
            }
        });
    }

    /// What a later process must know of the image, if pages are lacking.
    fn blocks_if(&self, are_lacking: bool) -> Vec<(String, u32)> {
        match &self.layout {
            Some(layout) if are_lacking => block_list(layout),
            Some(_) | None => Vec::new(),
        }
    }

    /// `cont`, once (S3). RESUME says that it worked; so does QEMU when asked.
    fn run_guest(&mut self) {
        let (vm, inputs) = (self.vm.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let input = continue_once(&vm).await;
            fault::point("target-after-cont");
            give(&inputs, input).await;
        });
    }

    /// No loaded, paused copy survives an abort (S3).
    async fn quit(&mut self) {
        if let Some(feeder) = &self.feeder {
            feeder.close();
        }
        if let Err(error) = self.vm.quit().await {
            tracing::error!("target QEMU: {error:#}");
        }
    }

    /// From Commit on the source may lose the link or die: it, or its `resolve`, comes again and asks.
    /// The newest caller counts, since an older one may be dead without a word.
    pub(super) fn await_peer(&mut self) {
        if self.returned.is_some() {
            return;
        }
        self.returned = Some(meet_again(&self.door, &self.me));
    }

    /// Closes the connection so that nothing sent is lost.
    pub(super) async fn leave(&mut self) {
        self.lanes = None;
        if let Some(peer) = self.peer.take() {
            let left = tokio::time::timeout(FAREWELL_MAX, peer.sender.finish()).await;
            tracing::debug!(acknowledged = left.is_ok(), "control stream ended");
            peer.connection
                .close(transport::quic::CloseCode::Done, "done");
        }
    }

    fn tell(&mut self, input: Input) {
        self.machine.handle(now(), input);
    }
}

/// Others may use the monitor again.
async fn release_monitor(vm: &Vm) {
    if let Err(error) = vm.qmp.release().await {
        tracing::warn!(%error, "QEMU keeps its monitor's connection: the monitor serves nobody else");
    }
}

/// Lane 0's bytes into target QEMU, in order, until the lane ends.
async fn take_relay(
    connection: &Connection,
    sink: FeedSink,
    workers: &Workers,
) -> anyhow::Result<()> {
    let mut lanes = connection.accept_lanes().await?.into_iter();
    let mut lane = lanes.next().context("no lane")?;
    while let Some(bytes) = lane.recv().await? {
        let sink = sink.clone();
        // QEMU's socket may be full: a worker waits, and QUIC's window does the rest.
        let fed = workers.run(0, move || sink.raw(bytes)).await;
        fed.context("a worker thread is gone")??;
    }
    Ok(())
}

/// Sends `cont` and finds out what became of it.
async fn continue_once(vm: &Vm) -> Input {
    let refused = match vm.qmp.cont().await {
        Ok(()) => return Input::VmResumed,
        Err(error) if error.may_have_run() => None,
        Err(error) => Some(error.to_string()),
    };
    if let Some(detail) = refused {
        // QEMU answered that it did not run the guest. Only its death makes that final.
        let stopped = vm
            .qmp
            .query_status()
            .await
            .is_ok_and(|status| !status.running);
        return match vm.quit().await {
            Ok(()) if stopped => Input::NeverRan(format!("target QEMU refused to run: {detail}")),
            Ok(()) | Err(_) => Input::VmFailed(format!("target QEMU: {detail}")),
        };
    }
    // Lost reply: it counts as executed until QEMU is proven dead.
    loop {
        tokio::time::sleep(ASK_INTERVAL).await;
        match vm.qmp.query_status().await {
            Ok(status) if status.running => return Input::VmResumed,
            // A main loop that waits for a page answers when it has it.
            Ok(_) | Err(QmpError::Timeout { .. }) => {}
            Err(error) => return Input::VmFailed(error.to_string()),
        }
    }
}

async fn give(inputs: &mpsc::Sender<Input>, input: Input) {
    if inputs.send(input).await.is_err() {
        tracing::debug!("the session has ended");
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Precopy => "precopy",
        Phase::Load => "load",
        Phase::Complete => "complete",
        Phase::Commit => "commit",
        Phase::PostCopy => "post-copy",
        Phase::Settle => "settle",
    }
}
