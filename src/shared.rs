//! Content that this host holds outside the guest's memory and may name to this peer: questions come
//! in bulk, answers are read and hashed again before they are given (S13).

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::mpsc;
use transport::block::PAGE_SIZE;
use transport::quic::Fingerprint;
use transport::store::ContentIndex;
use transport::wire::Frame;

use crate::command::content::open_index;
use crate::state_dir::StateDir;

/// An index that takes longer to build is there for the next migration.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// Question frames that may wait: a source has fewer under way.
const WAITING_MAX: usize = 8;

/// The open index of one peer.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    index: Arc<ContentIndex>,
    /// Numbers that were given in answers: no other one may be named (S14).
    given: Arc<RwLock<HashSet<u32>>>,
}

impl Shared {
    /// Opens it beside the caller; `None` when nothing is shared or it takes too long.
    pub(crate) async fn open(state: StateDir, peer: Fingerprint, key: [u8; 32]) -> Option<Shared> {
        let opening = tokio::task::spawn_blocking(move || open_index(&state, peer, &key));
        match tokio::time::timeout(OPEN_MAX, opening).await {
            Ok(Ok(Ok(index))) if index.known_pages() > 0 => Some(Shared {
                index: Arc::new(index),
                given: Arc::default(),
            }),
            Ok(Ok(Ok(_))) => None,
            Ok(Ok(Err(error))) => {
                tracing::warn!("shared images are not used: {error:#}");
                None
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "shared images are not used");
                None
            }
            Err(_) => {
                tracing::warn!(
                    "the index of shared images is not ready: not used in this migration"
                );
                None
            }
        }
    }

    /// Reads a page by a number that was given for it.
    pub(crate) fn read(&self, number: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let given = self.given.read().unwrap_or_else(PoisonError::into_inner);
        if !given.contains(&number) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.index.read(number, into)
    }

    /// Looks each prefix up and notes what is given away.
    fn answer(&self, prefixes: &[[u8; 8]]) -> Vec<Option<u32>> {
        let numbers: Vec<_> = prefixes
            .iter()
            .map(|prefix| self.index.lookup(prefix))
            .collect();
        let mut given = self.given.write().unwrap_or_else(PoisonError::into_inner);
        given.extend(numbers.iter().flatten());
        numbers
    }

    /// Pages that can be named.
    pub(crate) fn known_pages(&self) -> u32 {
        u32::try_from(self.index.known_pages()).unwrap_or(u32::MAX)
    }
}

/// Answers questions on a thread of its own, in their order.
#[derive(Debug)]
pub(crate) struct Answering {
    questions: std::sync::mpsc::SyncSender<(u32, Vec<[u8; 8]>)>,
    /// Questions that the peer may still ask.
    left: u64,
}

impl Answering {
    /// Starts; answers come out of the receiver. A source asks for each page once at most.
    pub(crate) fn start(
        shared: &Shared,
        pages_total: u64,
    ) -> io::Result<(Answering, mpsc::Receiver<Frame>)> {
        let (questions, asked) = std::sync::mpsc::sync_channel(WAITING_MAX);
        let (answers, answered) = mpsc::channel(WAITING_MAX);
        let shared = shared.clone();
        std::thread::Builder::new()
            .name("answers".into())
            .spawn(move || {
                while let Ok((first, prefixes)) = asked.recv() {
                    let prefixes: Vec<[u8; 8]> = prefixes;
                    let numbers = shared.answer(&prefixes);
                    if answers
                        .blocking_send(Frame::Known { first, numbers })
                        .is_err()
                    {
                        return;
                    }
                }
            })?;
        let answering = Answering {
            questions,
            left: pages_total,
        };
        Ok((answering, answered))
    }

    /// Takes one frame of questions; false when the peer asks more than it may (S14).
    pub(crate) fn ask(&mut self, first: u32, prefixes: &[[u8; 8]]) -> bool {
        let Some(left) = self.left.checked_sub(prefixes.len() as u64) else {
            return false;
        };
        self.left = left;
        self.questions.try_send((first, prefixes.to_vec())).is_ok()
    }
}
