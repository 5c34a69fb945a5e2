//! What this host has kept of the VM from earlier trips with this peer: its replica, read and hashed
//! again before anything in it is named (S13, S14).

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;
use transport::block::{Layout, Replica, Root};
use transport::quic::Fingerprint;
use transport::quic::driver::Basis;
use transport::session::Outcome;
use transport::store::{Checkpoints, Opening, RangeHashes, ReplicaFile, Role, Settled};
use transport::wire::AttemptId;

use crate::journal::{hex, now_s};
use crate::state_dir::StateDir;

/// Whose replica, and for what.
#[derive(Debug, Clone)]
pub(crate) struct Whose {
    pub(crate) state: StateDir,
    pub(crate) vm: String,
    pub(crate) peer: Fingerprint,
    pub(crate) role: Role,
    pub(crate) attempt: AttemptId,
}

/// The open replica; this process alone has it.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) replica: Arc<ReplicaFile>,
}

impl Kept {
    /// Opens or begins it. An attempt does without when that fails: nothing is known then, and
    /// nothing kept.
    pub(crate) fn open(whose: &Whose, layout: &Arc<Layout>) -> Option<Kept> {
        let opening = Opening {
            vm: whose.vm.clone(),
            peer: whose.peer,
            role: whose.role,
            attempt: hex(&whose.attempt.0),
            now_s: now_s(),
        };
        match Checkpoints::new(whose.state.path()).open(&opening, layout) {
            Ok(replica) => Some(Kept {
                replica: Arc::new(replica),
            }),
            Err(error) => {
                let error = anyhow::Error::from(error);
                tracing::warn!("no checkpoint in this attempt: {error:#}");
                None
            }
        }
    }

    /// Hashes it beside the caller, on all cores.
    pub(crate) fn hash(&self, key: [u8; 32]) -> JoinHandle<Option<Arc<RangeHashes>>> {
        let replica = self.replica.clone();
        tokio::task::spawn_blocking(move || {
            let threads = std::thread::available_parallelism().map_or(2, usize::from);
            match replica.hash_ranges(&key, threads) {
                Ok(hashes) => Some(Arc::new(hashes)),
                Err(error) => {
                    tracing::warn!(%error, "the checkpoint cannot be read");
                    None
                }
            }
        })
    }

    /// The ranges that both sides hold; `None` for none.
    pub(crate) fn basis(&self, ranges: Bytes, hashes: &Arc<RangeHashes>) -> Option<Basis> {
        (!ranges.is_empty()).then(|| Basis {
            ranges,
            hashes: hashes.clone(),
            replica: self.replica.clone() as Arc<dyn Replica>,
        })
    }

    /// Notes the end of the attempt, with the root that both sides agreed on when the guest arrived; what
    /// was written stays, however it ended.
    pub(crate) fn settle(&self, outcome: &Outcome, root: Option<Root>) {
        let settled = Settled {
            root: root.filter(|_| *outcome == Outcome::Arrived),
            now_s: now_s(),
        };
        if let Err(error) = self.replica.settle(&settled) {
            tracing::warn!(%error, "the checkpoint's notes are not written");
        }
    }
}
