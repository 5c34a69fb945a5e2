//! Settles an attempt from the journal, with the other host or alone. The table of who may do what
//! is `transport::session::settle`; here it meets QEMU and the journal.
//!
//! ```text
//! journal alone, or the operator's word -> alone    \
//! the other host's word, missing pages  -> dialogue  -> qemu (runs or ends here) -> journal
//! ```

mod alone;
mod dialogue;
mod qemu;

use std::time::Duration;

use anyhow::Context;

use crate::journal::{Entry, Journal, Role, Step};
use crate::state_dir::StateDir;

/// The other side closes its journal within this.
const ANSWER_MAX: Duration = Duration::from_secs(10);

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

impl Settling {
    pub(crate) fn new(journal: Journal, entry: Entry, state: StateDir) -> Settling {
        Settling {
            journal,
            entry,
            state,
        }
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
            Step::Committed { .. } if !self.lacks_pages() => {
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

    fn append(&mut self, step: Step) -> anyhow::Result<()> {
        self.entry = self.entry.then(step);
        self.journal
            .append(&self.entry)
            .context("cannot write the journal")
    }
}
