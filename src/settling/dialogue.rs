//! With the other host: missing pages first, then the source asks, the target answers, and both
//! close their journals.

use std::time::Duration;

use anyhow::{Context, bail};
use transport::session::{Next, Side, settle};
use transport::wire::{AttemptId, Frame, Purpose, Role as WireRole, Verdict};

use super::{ANSWER_MAX, Settling};
use crate::control::socket_path;
use crate::journal::{Entry, Role, Step, hex};
use crate::peer::{Door, Me, Peer, send_frame};
use crate::resumed::{self, Resumed};

/// Between two questions to a side that does not know yet.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// The guest runs at the target and may lack pages of the copy here.
const HOLDING: &str = "at the peer, and needs pages from here";

impl Settling {
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
            Step::Committed { blocks, .. } if self.lacks_pages() => {
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
}

async fn settled(peer: &mut Peer) -> Result<(), String> {
    loop {
        if let Frame::Settled { .. } = peer.inbox.next().await? {
            return Ok(());
        }
    }
}
