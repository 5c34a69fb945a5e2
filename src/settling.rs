//! Settles an attempt from the journal, with the other host or alone. The table of who may do what
//! is `transport::session::settle`; here it meets QEMU and the journal.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use qemu_glue::qmp::{Client, QmpError, RunState};
use transport::session::{Next, Side, settle};
use transport::wire::{AttemptId, Frame, Purpose, Role as WireRole, Verdict};

use crate::control::socket_path;
use crate::journal::{Entry, Journal, Role, Step, hex};
use crate::peer::{Door, Me, Peer, send_frame};
use crate::resumed::{self, Resumed};
use crate::state_dir::StateDir;

/// Between two questions to a side that does not know yet.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// The other side closes its journal within this.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A main loop that waits for a page does not answer; any other does within this.
const PROMPT_MAX: Duration = Duration::from_secs(2);

/// The guest runs at the target and may lack pages of the copy here.
const HOLDING: &str = "at the peer, and needs pages from here";

/// The operator's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    Here,
    There,
}

/// An attempt and its journal.
#[derive(Debug)]
pub(crate) struct Settling {
    journal: Journal,
    entry: Entry,
    state: StateDir,
}

/// Before a new `receive` of the VM: an attempt whose `receive` died before Commit is refused for good,
/// and its paused copy ends (S3).
pub(crate) async fn refuse_stale(journal: Journal, state: &StateDir) -> anyhow::Result<Journal> {
    let Some(entry) = journal.latest().cloned() else {
        return Ok(journal);
    };
    let mut settling = Settling::new(journal, entry, state.clone());
    let unsaid = matches!(
        settling.entry.step,
        Step::Started | Step::Refused { .. } | Step::NeverRan { .. }
    );
    if settling.entry.role == Role::Target && unsaid {
        settling.make_durable().await?;
    }
    Ok(settling.journal)
}

/// QEMU as the journal names it, if it still lives.
struct Qemu {
    qmp: Client,
    /// The monitor's connection was its `receive`'s, and QEMU keeps it.
    is_kept: bool,
}

impl Qemu {
    /// False when its main loop waits for a page.
    async fn answers(&self) -> anyhow::Result<bool> {
        match self.qmp.with_timeout(PROMPT_MAX).query_status().await {
            Ok(_) => Ok(true),
            Err(QmpError::Timeout { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Others may use the monitor again.
    async fn release(&self) -> anyhow::Result<()> {
        if self.is_kept {
            self.qmp.release().await?;
        }
        Ok(())
    }
}

impl Settling {
    pub(crate) fn new(journal: Journal, entry: Entry, state: StateDir) -> Settling {
        Settling {
            journal,
            entry,
            state,
        }
    }

    /// Without contact: what the journal alone decides, or the operator's word. Returns where the
    /// guest is, `None` when only the other host can say.
    pub(crate) async fn alone(
        &mut self,
        word: Option<Word>,
        other_is_dead: bool,
    ) -> anyhow::Result<Option<&'static str>> {
        let step = self.entry.step.clone();
        let own = match (&step, self.entry.role) {
            (Step::Started, Role::Source) | (Step::SettledHere { .. }, _) => Word::Here,
            (Step::Committed { blocks, .. }, _) if !blocks.is_empty() => bail!(
                "the guest here may lack pages that only the other host has: use --listen or --to"
            ),
            (Step::Committed { .. } | Step::Running, _) => Word::Here,
            (Step::Started, Role::Target)
            | (Step::Refused { .. } | Step::NeverRan { .. } | Step::SettledThere { .. }, _) => {
                Word::There
            }
            (Step::Intent { .. }, _) => return self.in_doubt(word, other_is_dead).await,
            (Step::Filling { .. }, _) => bail!(
                "the guest runs here and lacks pages that only the other host has: use --listen or --to"
            ),
            (Step::Holding { .. }, _) => return self.stop_holding(word, other_is_dead).await,
        };
        if let (Step::Committed { .. }, Some(Word::There), true) = (&step, word, other_is_dead)
            && self.qemu().await?.is_none()
        {
            // Nobody can tell whether it ran before its QEMU ended: the operator decides.
            return self.give_up("the operator's word").await.map(Some);
        }
        if let Some(word) = word
            && word != own
        {
            bail!(
                "the journal proves that the guest is {} ({}): refused",
                if own == Word::Here {
                    "here"
                } else {
                    "at the peer"
                },
                step.name()
            );
        }
        match own {
            // The guest ran here, and its QEMU has ended since.
            Word::Here if step == Step::Running && self.qemu().await?.is_none() => {
                self.append(Step::SettledHere {
                    reason: "its QEMU has ended".into(),
                })?;
                Ok(Some("here, and its QEMU has ended"))
            }
            Word::Here => self.keep("settled by the journal").await.map(Some),
            Word::There => self.give_up("settled by the journal").await.map(Some),
        }
    }

    /// Intent is written: Commit may have been sent.
    async fn in_doubt(
        &mut self,
        word: Option<Word>,
        other_is_dead: bool,
    ) -> anyhow::Result<Option<&'static str>> {
        match word {
            None => Ok(None),
            Some(Word::There) => {
                ensure!(
                    other_is_dead,
                    "the target has not said that the guest runs there: use --listen or --to, or add \
                     --i-know-the-other-is-dead to give the copy here up"
                );
                self.give_up("the operator's word").await.map(Some)
            }
            Some(Word::Here) => {
                ensure!(
                    other_is_dead,
                    "the target may run the guest: use --listen or --to, or add \
                     --i-know-the-other-is-dead when its copy can never run again"
                );
                self.entry.epoch += 1;
                self.keep("the operator's word").await.map(Some)
            }
        }
    }

    /// The guest runs at the peer and lacks pages that are here.
    async fn stop_holding(
        &mut self,
        word: Option<Word>,
        other_is_dead: bool,
    ) -> anyhow::Result<Option<&'static str>> {
        ensure!(
            word == Some(Word::There) && other_is_dead,
            "the guest runs at the peer and needs pages of the copy here: use --listen or --to, or \
             --there --i-know-the-other-is-dead to throw them away"
        );
        self.give_up("the operator's word").await.map(Some)
    }

    /// With the other host: the source asks, the target answers, both close their journals.
    pub(crate) async fn with_peer(
        &mut self,
        door: &Door,
        me: &Me,
        purpose: Purpose,
    ) -> anyhow::Result<Option<&'static str>> {
        if self.entry.role == Role::Target {
            self.make_durable().await?;
        }
        let fresh = match self.entry.step.clone() {
            Step::Filling { blocks } => self.fill(door, me, &blocks).await?,
            Step::Committed { blocks, .. } if !blocks.is_empty() => {
                self.fill(door, me, &blocks).await?
            }
            Step::Holding { blocks } => return self.hold(door, me, &blocks).await.map(Some),
            Step::Started
            | Step::Intent { .. }
            | Step::Committed { .. }
            | Step::Refused { .. }
            | Step::NeverRan { .. }
            | Step::Running
            | Step::SettledHere { .. }
            | Step::SettledThere { .. } => None,
        };
        if let Some(mut peer) = fresh {
            let place = self.answer(&mut peer, me.attempt).await?;
            let left = tokio::time::timeout(ANSWER_MAX, peer.sender.finish()).await;
            tracing::debug!(acknowledged = left.is_ok(), "dialogue ended");
            return Ok(Some(place));
        }
        let mut peer = door.meet(me, purpose).await?;
        let place = match self.entry.role {
            Role::Source => match self.ask(&mut peer, me.attempt).await? {
                Some(HOLDING) => {
                    drop(peer);
                    let Step::Holding { blocks } = self.entry.step.clone() else {
                        return Ok(None);
                    };
                    return self.hold(door, me, &blocks).await.map(Some);
                }
                place => place,
            },
            Role::Target => Some(self.answer(&mut peer, me.attempt).await?),
        };
        let left = tokio::time::timeout(ANSWER_MAX, peer.sender.finish()).await;
        tracing::debug!(acknowledged = left.is_ok(), "dialogue ended");
        Ok(place)
    }

    /// The guest runs here and lacks pages: they are brought first.
    async fn fill(
        &mut self,
        door: &Door,
        me: &Me,
        blocks: &[(String, u32)],
    ) -> anyhow::Result<Option<Peer>> {
        let qemu = self.qemu().await?;
        let qemu = qemu.context("QEMU has ended, and with it the guest that lacked pages")?;
        let mut is_told = matches!(self.entry.step, Step::Filling { .. });
        if !is_told && qemu.answers().await? {
            self.run(&qemu).await?;
            let blocks = blocks.to_vec();
            self.append(Step::Filling { blocks })?;
            is_told = true;
        }
        let socket = socket_path(&self.state, &self.entry.vm, "incoming")?;
        let resumed = Resumed::new(&qemu.qmp, door, me, blocks)?;
        let peer = resumed::fill(&resumed, &socket).await?;
        if !is_told {
            self.run(&qemu).await?;
        }
        qemu.release().await?;
        self.append(Step::Running)?;
        Ok(peer)
    }

    /// The guest runs at the peer and lacks pages that are here: it gets them, then this copy ends.
    async fn hold(
        &mut self,
        door: &Door,
        me: &Me,
        blocks: &[(String, u32)],
    ) -> anyhow::Result<&'static str> {
        let qemu = self.qemu().await?;
        let qemu = qemu.context("source QEMU has ended, and with it pages that the guest lacks")?;
        let mut peer = resumed::hold(&Resumed::new(&qemu.qmp, door, me, blocks)?).await?;
        // A monitor takes one connection, and the end of QEMU needs it.
        drop(qemu);
        let place = self.give_up("the target has every page").await?;
        let attempt = me.attempt;
        send_frame(&mut peer.sender, &Frame::Settled { attempt }).await?;
        let closed = tokio::time::timeout(ANSWER_MAX, settled(&mut peer)).await;
        tracing::debug!(closed = closed.is_ok(), "the target's journal");
        let left = tokio::time::timeout(ANSWER_MAX, peer.sender.finish()).await;
        tracing::debug!(acknowledged = left.is_ok(), "dialogue ended");
        Ok(place)
    }

    /// A target that died on the way decides durably before it answers: an attempt without Commit
    /// is refused for good, an accepted one is run.
    async fn make_durable(&mut self) -> anyhow::Result<()> {
        match self.entry.step {
            Step::Started => {
                self.end_qemu().await?;
                self.append(Step::Refused {
                    reason: "its receive died before Commit".into(),
                })
            }
            Step::Committed { ref blocks, .. } if blocks.is_empty() => {
                if self.qemu().await?.is_some() {
                    self.run_here().await?;
                    self.append(Step::Running)?;
                }
                Ok(())
            }
            // Its receive may have died between the word and the end of QEMU: no copy survives (S3).
            Step::Refused { .. } | Step::NeverRan { .. } => self.end_qemu().await,
            Step::Intent { .. }
            | Step::Committed { .. }
            | Step::Filling { .. }
            | Step::Holding { .. }
            | Step::Running
            | Step::SettledHere { .. }
            | Step::SettledThere { .. } => Ok(()),
        }
    }

    async fn ask(
        &mut self,
        peer: &mut Peer,
        attempt: AttemptId,
    ) -> anyhow::Result<Option<&'static str>> {
        let mine = self.side(WireRole::Source);
        loop {
            let ask = Frame::Ask {
                attempt,
                verdict: mine.verdict,
                epoch: mine.epoch,
            };
            send_frame(&mut peer.sender, &ask).await?;
            let (verdict, epoch) = loop {
                #[expect(clippy::wildcard_enum_match_arm, reason = "late frames of the attempt")]
                match peer.inbox.next().await.map_err(anyhow::Error::msg)? {
                    Frame::Answer {
                        attempt: named,
                        verdict,
                        epoch,
                    } if named == attempt => {
                        break (verdict, epoch);
                    }
                    Frame::Abort { detail, .. } => bail!("the target said: {detail}"),
                    other => tracing::debug!(frame = other.name(), "while settling"),
                }
            };
            let place = match settle(mine, verdict, epoch) {
                Next::KeepHere | Next::RunHere => self.keep("the target's word").await?,
                Next::LeaveThere => {
                    if let Step::Intent { blocks, .. } = &self.entry.step
                        && !blocks.is_empty()
                    {
                        let blocks = blocks.clone();
                        self.append(Step::Holding { blocks })?;
                        return Ok(Some(HOLDING));
                    }
                    self.give_up("the target's word").await?
                }
                Next::PauseHere => self.pause().await?,
                Next::AskAgain => {
                    tracing::info!(?verdict, "the target does not know yet");
                    tokio::time::sleep(ASK_INTERVAL).await;
                    continue;
                }
            };
            send_frame(&mut peer.sender, &Frame::Settled { attempt }).await?;
            let closed = tokio::time::timeout(ANSWER_MAX, settled(peer)).await;
            tracing::debug!(closed = closed.is_ok(), "the target's journal");
            return Ok(Some(place));
        }
    }

    async fn answer(
        &mut self,
        peer: &mut Peer,
        attempt: AttemptId,
    ) -> anyhow::Result<&'static str> {
        loop {
            #[expect(clippy::wildcard_enum_match_arm, reason = "late frames of the attempt")]
            match peer.inbox.next().await.map_err(anyhow::Error::msg)? {
                Frame::Ask {
                    attempt: named,
                    verdict: theirs,
                    epoch: their_epoch,
                } => {
                    let mine = self.side(WireRole::Target);
                    let known = named == attempt;
                    // An older attempt's last word stands in the journal too.
                    let verdict = self
                        .journal
                        .find(&hex(&named.0))
                        .map_or(Verdict::Unknown, Entry::verdict);
                    if known && settle(mine, theirs, their_epoch) == Next::PauseHere {
                        self.pause().await?;
                        self.append(Step::SettledThere {
                            reason: "the source's operator has the guest; the copy here is paused"
                                .into(),
                        })?;
                    }
                    let epoch = mine.epoch;
                    let answer = Frame::Answer {
                        attempt: named,
                        verdict,
                        epoch,
                    };
                    send_frame(&mut peer.sender, &answer).await?;
                    // A source that holds pages waits for this word; any other does without it.
                    if verdict == Verdict::Running {
                        send_frame(&mut peer.sender, &Frame::AllPages).await?;
                    }
                }
                Frame::Settled { .. } => {
                    let runs_here = self.entry.verdict() == Verdict::Running;
                    if self.entry.step == Step::Running {
                        self.append(Step::SettledHere {
                            reason: "arrived".into(),
                        })?;
                    }
                    send_frame(&mut peer.sender, &Frame::Settled { attempt }).await?;
                    return Ok(if runs_here { "here" } else { "at the peer" });
                }
                Frame::Abort { detail, .. } => bail!("the source said: {detail}"),
                other => tracing::debug!(frame = other.name(), "while settling"),
            }
        }
    }

    fn side(&self, role: WireRole) -> Side {
        Side {
            role,
            verdict: self.entry.verdict(),
            epoch: self.entry.epoch,
        }
    }

    /// The guest is here: QEMU runs it if it ran before, the journal closes.
    async fn keep(&mut self, reason: &str) -> anyhow::Result<&'static str> {
        self.run_here().await?;
        self.append(Step::SettledHere {
            reason: reason.into(),
        })?;
        Ok("here")
    }

    /// The guest is at the peer: what is left of it here ends, the journal closes.
    async fn give_up(&mut self, reason: &str) -> anyhow::Result<&'static str> {
        self.end_qemu().await?;
        self.append(match self.entry.role {
            Role::Source => Step::SettledThere {
                reason: reason.into(),
            },
            Role::Target => Step::Refused {
                reason: reason.into(),
            },
        })?;
        Ok("at the peer")
    }

    /// The other side won an epoch: what runs here is paused, never killed.
    async fn pause(&mut self) -> anyhow::Result<&'static str> {
        if let Some(qemu) = self.qemu().await? {
            qemu.qmp.stop().await?;
        }
        Ok("at the peer; the copy here is paused, look at it and end it by hand")
    }

    async fn run_here(&mut self) -> anyhow::Result<()> {
        let Some(qemu) = self.qemu().await? else {
            bail!(
                "QEMU (pid {}) that had the guest is gone: nothing is left to run here. To run the \
                 source's copy again: `scaleaway resolve {} --there --i-know-the-other-is-dead` here, \
                 then with --here at the source",
                self.entry.qemu.pid,
                self.entry.vm
            );
        };
        self.run(&qemu).await?;
        qemu.release().await
    }

    async fn run(&self, qemu: &Qemu) -> anyhow::Result<()> {
        let paused_before = self.entry.paused;
        let state = qemu.qmp.query_status().await?.status;
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "any other state is for the operator"
        )]
        match state {
            RunState::Running => Ok(()),
            _ if paused_before => Ok(()),
            RunState::PostMigrate | RunState::Paused | RunState::PreLaunch => {
                qemu.qmp.cont().await.context("QEMU does not run the guest")
            }
            other => bail!("QEMU is {other}: look at it by hand"),
        }
    }

    async fn end_qemu(&mut self) -> anyhow::Result<()> {
        if let Some(qemu) = self.qemu().await? {
            qemu.qmp.quit().await?;
            let dead = self.entry.qemu.wait_dead(ANSWER_MAX).await?;
            ensure!(
                dead,
                "QEMU (pid {}) does not end: stop it by hand",
                self.entry.qemu.pid
            );
        }
        Ok(())
    }

    /// The QEMU of the attempt; never another process under the same pid or path (S2).
    async fn qemu(&self) -> anyhow::Result<Option<Qemu>> {
        if !self.entry.qemu.is_alive()? {
            return Ok(None);
        }
        let path = &self.entry.qmp;
        let kept = Client::take_back(&self.entry.qemu, path).unwrap_or_else(|error| {
            tracing::debug!(%error, "a new connection to the monitor");
            None
        });
        let is_kept = kept.is_some();
        let (qmp, _events) = match kept {
            Some(kept) => kept,
            None => Client::connect(path)
                .await
                .with_context(|| format!("QEMU lives, its monitor {}", path.display()))?,
        };
        ensure!(
            *qmp.peer_process() == self.entry.qemu,
            "the monitor {} belongs to another QEMU",
            self.entry.qmp.display()
        );
        Ok(Some(Qemu { qmp, is_kept }))
    }

    fn append(&mut self, step: Step) -> anyhow::Result<()> {
        self.entry = self.entry.then(step);
        self.journal
            .append(&self.entry)
            .context("cannot write the journal")
    }
}

async fn settled(peer: &mut Peer) -> Result<(), String> {
    loop {
        if let Frame::Settled { .. } = peer.inbox.next().await? {
            return Ok(());
        }
    }
}
