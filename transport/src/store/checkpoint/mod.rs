//! Checkpoints: the replicas of a host, one for each VM and peer.
//!
//! ```text
//! STATE_DIR/checkpoints/limits.json                     budget and age limit, if set
//! STATE_DIR/checkpoints/HASH_OF_VM/KEY_OF_PEER/         0700, locked (flock) while in use
//!     image                                             0600, see `replica`
//!     meta.json                                         0600, see `meta`
//! ```
//!
//! A checkpoint belongs to a VM and to the key of the peer that it travelled with (S14): the path is
//! made of both, so there is no way to name another peer's. What is evicted is overwritten first.

mod limits;
mod meta;
mod peek;
mod wipe;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, OFlags};

pub use limits::Limits;
pub use meta::{Meta, Role, State};

use super::replica::ReplicaFile;
use crate::block::{Layout, Root};
use crate::quic::Fingerprint;

const IMAGE: &str = "image";
const META: &str = "meta.json";
/// Tries to lock a folder that another process is just removing.
const LOCK_TRIES_MAX: usize = 8;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Another attempt works with it.
    #[error("another attempt is using the checkpoint {}", .0.display())]
    LocalInUse(PathBuf),
    /// The file system said no.
    #[error("checkpoint {}", folder.display())]
    LocalFile {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// What it said.
        #[source]
        cause: io::Error,
    },
}

/// All checkpoints of a state dir.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
}

/// Which checkpoint, and what for.
#[derive(Debug, Clone)]
pub struct Opening {
    /// The VM: its UUID or given name.
    pub vm: String,
    /// The peer's key.
    pub peer: Fingerprint,
    /// What this host is in the attempt.
    pub role: Role,
    /// The attempt, in hex.
    pub attempt: String,
    /// Seconds since 1970.
    pub now_s: u64,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy)]
pub struct Settled {
    /// Root of the ledger, where one was agreed on.
    pub root: Option<Root>,
    /// Seconds since 1970.
    pub now_s: u64,
}

/// A checkpoint as it lies there.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its folder.
    pub folder: PathBuf,
    /// What is noted about it; `None` when that cannot be read.
    pub meta: Option<Meta>,
    /// Bytes on disk.
    pub bytes: u64,
}

impl Stored {
    fn used_s(&self) -> u64 {
        self.meta.as_ref().map_or(0, |meta| meta.used_s)
    }
}

impl Checkpoints {
    /// The checkpoints of a state dir; nothing is made yet.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join("checkpoints"),
        }
    }

    /// Takes the replica of a VM and peer, as it is or empty, for this process alone. What is too
    /// old or beyond the budget is evicted ahead.
    ///
    /// # Errors
    /// When another attempt has it, or the disk fails; an attempt can do without.
    pub fn open(
        &self,
        opening: &Opening,
        layout: &Arc<Layout>,
    ) -> Result<ReplicaFile, CheckpointError> {
        let folder = self.folder_of(&opening.vm, opening.peer);
        let failed = |cause| CheckpointError::LocalFile {
            folder: folder.clone(),
            cause,
        };
        let lock = lock_or_make(&folder)?;
        self.prune(opening.now_s).map_err(failed)?;
        let begun = Meta::begin(opening, layout);
        let meta = match Meta::load(&folder.join(META)) {
            Some(kept) if kept.is_same_image(&begun) => begun.created_at(kept.created_s),
            Some(_) | None => {
                wipe::remove_image(&folder.join(IMAGE)).map_err(failed)?;
                begun
            }
        };
        meta.save(&folder.join(META)).map_err(failed)?;
        let image = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0))
            .open(folder.join(IMAGE))
            .map_err(failed)?;
        let place = Place {
            folder: folder.clone(),
            _lock: lock,
            meta: Mutex::new(meta),
            all: self.clone(),
        };
        ReplicaFile::new(image, layout, place).map_err(failed)
    }

    /// Every checkpoint, least recently used first.
    ///
    /// # Errors
    /// What the file system says.
    pub fn list(&self) -> io::Result<Vec<Stored>> {
        let mut found = Vec::new();
        for vm in folders(&self.folder)? {
            for folder in folders(&vm)? {
                let meta = Meta::load(&folder.join(META));
                let bytes = allocated_bytes(&folder.join(IMAGE));
                found.push(Stored {
                    folder,
                    meta,
                    bytes,
                });
            }
        }
        found.sort_by(|a, b| (a.used_s(), &a.folder).cmp(&(b.used_s(), &b.folder)));
        Ok(found)
    }

    /// Wipes and removes one checkpoint.
    ///
    /// # Errors
    /// When an attempt is using it, or the disk fails.
    pub fn remove(&self, stored: &Stored) -> Result<(), CheckpointError> {
        let folder = &stored.folder;
        let lock = lock(folder)?.ok_or_else(|| CheckpointError::LocalInUse(folder.clone()))?;
        let removed = wipe::remove_folder(folder);
        drop(lock);
        removed.map_err(|cause| CheckpointError::LocalFile {
            folder: folder.clone(),
            cause,
        })
    }

    /// Evicts what is older than the age limit or unreadable, then the least recently used until
    /// the rest is within the budget. What is in use stays. Returns what was evicted.
    ///
    /// # Errors
    /// What the file system says; a checkpoint that cannot be removed is passed over.
    pub fn prune(&self, now_s: u64) -> io::Result<Vec<Stored>> {
        let limits = Limits::load(&self.folder);
        let oldest_s = now_s.saturating_sub(limits.age_max_s);
        let (old, mut young): (Vec<_>, Vec<_>) = self
            .list()?
            .into_iter()
            .partition(|stored| stored.used_s() < oldest_s || stored.meta.is_none());
        let mut evicted = Vec::new();
        for stored in old {
            match self.evict(&stored) {
                true => evicted.push(stored),
                false => young.push(stored),
            }
        }
        evicted.extend(self.shrink(young, &limits)?);
        Ok(evicted)
    }

    /// Bytes on disk and the budget for them.
    ///
    /// # Errors
    /// What the file system says.
    pub fn usage(&self) -> io::Result<Usage> {
        let held = self.list()?.iter().map(|stored| stored.bytes).sum();
        let budget = Limits::load(&self.folder).budget(&self.folder, held)?;
        Ok(Usage { held, budget })
    }

    /// Replaces the limits.
    ///
    /// # Errors
    /// What the file system says.
    pub fn set_limits(&self, limits: &Limits) -> io::Result<()> {
        make_private(&self.folder)?;
        limits.save(&self.folder)
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        Limits::load(&self.folder)
    }

    /// Evicts the least recently used of `stored` until the sum is within the budget.
    fn shrink(&self, stored: Vec<Stored>, limits: &Limits) -> io::Result<Vec<Stored>> {
        let mut held: u64 = stored.iter().map(|stored| stored.bytes).sum();
        let mut evicted = Vec::new();
        if stored.is_empty() {
            return Ok(evicted);
        }
        let budget = limits.budget(&self.folder, held)?;
        for stored in stored {
            if held <= budget {
                break;
            }
            if stored.bytes > 0 && self.evict(&stored) {
                held -= stored.bytes;
                evicted.push(stored);
            }
        }
        Ok(evicted)
    }

    fn evict(&self, stored: &Stored) -> bool {
        match self.remove(stored) {
            Ok(()) => true,
            Err(CheckpointError::LocalInUse(_)) => false,
            Err(error @ CheckpointError::LocalFile { .. }) => {
                tracing::warn!(folder = %stored.folder.display(), %error, "checkpoint stays");
                false
            }
        }
    }

    fn folder_of(&self, vm: &str, peer: Fingerprint) -> PathBuf {
        let vm = blake3::derive_key("scaleaway/1 checkpoint folder", vm.as_bytes());
        let vm: String = vm[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(vm).join(peer.to_hex())
    }
}

/// How much checkpoints take and may take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// On disk.
    pub held: u64,
    /// Allowed.
    pub budget: u64,
}

/// A checkpoint's folder, locked while this lives.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    _lock: File,
    meta: Mutex<Meta>,
    all: Checkpoints,
}

impl Place {
    pub(super) fn settle(&self, settled: &Settled) -> io::Result<()> {
        let mut meta = self.meta.lock().unwrap_or_else(PoisonError::into_inner);
        meta.settle(settled);
        meta.save(&self.folder.join(META))
    }

    /// Evicts others when all together are beyond the budget; an error when that is not enough.
    pub(super) fn make_room(&self) -> io::Result<()> {
        let limits = Limits::load(&self.all.folder);
        let stored = self.all.list()?;
        let held: u64 = stored.iter().map(|stored| stored.bytes).sum();
        let budget = limits.budget(&self.all.folder, held)?;
        if held <= budget {
            return Ok(());
        }
        let evicted = self.all.shrink(stored, &limits)?;
        let freed: u64 = evicted.iter().map(|stored| stored.bytes).sum();
        if held - freed > budget {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("checkpoints hold {held} bytes; the budget is {budget}"),
            ));
        }
        Ok(())
    }
}

fn lock_or_make(folder: &Path) -> Result<File, CheckpointError> {
    for _ in 0..LOCK_TRIES_MAX {
        make_private(folder).map_err(|cause| CheckpointError::LocalFile {
            folder: folder.into(),
            cause,
        })?;
        if let Some(lock) = lock(folder)? {
            return Ok(lock);
        }
    }
    Err(CheckpointError::LocalInUse(folder.into()))
}

/// Locks a folder; `None` when it was removed meanwhile.
fn lock(folder: &Path) -> Result<Option<File>, CheckpointError> {
    let failed = |cause| CheckpointError::LocalFile {
        folder: folder.into(),
        cause,
    };
    let held = match File::open(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    match rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(CheckpointError::LocalInUse(folder.into()));
        }
        Err(error) => return Err(failed(error.into())),
    }
    let inode = held.metadata().map_err(failed)?.ino();
    let is_there = fs::metadata(folder).is_ok_and(|found| found.ino() == inode);
    Ok(is_there.then_some(held))
}

fn make_private(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// The folders in a folder, sorted; none when it is not there.
fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn allocated_bytes(image: &Path) -> u64 {
    fs::metadata(image).map_or(0, |found| found.blocks() * 512)
}

#[cfg(test)]
mod tests;
