//! The QEMU that the journal names: found again, run, paused or ended.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use qemu_glue::qmp::{Client, QmpError, RunState};

use super::{ANSWER_MAX, Settling};
use crate::journal::Step;

/// A main loop that waits for a page does not answer; any other does within this.
const PROMPT_MAX: Duration = Duration::from_secs(2);

/// QEMU as the journal names it, if it still lives.
pub(super) struct Qemu {
    pub(super) qmp: Client,
    /// The monitor's connection was its `receive`'s, and QEMU keeps it.
    is_kept: bool,
}

impl Qemu {
    /// False when its main loop waits for a page.
    pub(super) async fn answers(&self) -> anyhow::Result<bool> {
        match self.qmp.with_timeout(PROMPT_MAX).query_status().await {
            Ok(_) => Ok(true),
            Err(QmpError::Timeout { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Others may use the monitor again.
    pub(super) async fn release(&self) -> anyhow::Result<()> {
        if self.is_kept {
            self.qmp.release().await?;
        }
        Ok(())
    }
}

impl Settling {
    /// The guest is to run here while pages of it are at the source.
    pub(super) fn lacks_pages(&self) -> bool {
        matches!(&self.entry.step, Step::Committed { blocks, .. } if !blocks.is_empty())
    }

    /// The QEMU of the attempt; never another process under the same pid or path (S2).
    pub(super) async fn qemu(&self) -> anyhow::Result<Option<Qemu>> {
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

    pub(super) async fn run_here(&mut self) -> anyhow::Result<()> {
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

    pub(super) async fn run(&self, qemu: &Qemu) -> anyhow::Result<()> {
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
                match qemu.qmp.cont().await {
                    // It waits for a page, then it runs (S3).
                    Err(QmpError::Timeout { .. }) if self.lacks_pages() => Ok(()),
                    told => told.context("QEMU does not run the guest"),
                }
            }
            other => bail!("QEMU is {other}: look at it by hand"),
        }
    }

    /// The other side won an epoch: what runs here is paused, never killed.
    pub(super) async fn pause(&mut self) -> anyhow::Result<&'static str> {
        if let Some(qemu) = self.qemu().await? {
            qemu.qmp.stop().await?;
        }
        Ok("at the peer; the copy here is paused, look at it and end it by hand")
    }

    pub(super) async fn end_qemu(&mut self) -> anyhow::Result<()> {
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
}
