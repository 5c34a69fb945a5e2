//! The directory of a run: made at its start, locked while its process lives.

use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};

use super::sysctl;

const LOCK: &str = "lock";
/// In a directory that its user asked to keep.
pub(super) const KEPT: &str = "kept";

/// The directory of this run. Its lock tells other runs that it is alive.
#[derive(Debug)]
pub(super) struct RunDir {
    id: String,
    path: PathBuf,
    /// Held until this process ends; the kernel then lets go, whatever the end was.
    lock: File,
}

impl RunDir {
    /// Removes what dead runs left, and makes a new directory.
    pub(super) fn create() -> anyhow::Result<Self> {
        let base = base();
        make_private(&base)?;
        // Two runs that start at once must not sweep each other's half-made directory.
        let starting = File::create(base.join("starting"))?;
        flock(&starting, FlockOperation::LockExclusive).context("wait for another start")?;
        sweep(&base)?;
        let id = random_id()?;
        let path = base.join(&id);
        make_private(&path)?;
        let lock = File::create(path.join(LOCK)).context("make the run's lock")?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).context("lock the run")?;
        Ok(Self { id, path, lock })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A second holder of the lock: it counts as held until both are closed.
    pub(super) fn share_lock(&self) -> anyhow::Result<File> {
        self.lock.try_clone().context("share the run's lock")
    }

    /// The directory of a host, made on first use.
    pub(super) fn host(&self, role: &str) -> anyhow::Result<PathBuf> {
        let path = self.path.join(role);
        make_private(&path)?;
        Ok(path)
    }
}

/// Where the directories of all runs are. Not below /tmp, which hosts replace.
pub(super) fn base() -> PathBuf {
    match std::env::var_os("SCALEAWAY_LAB_DIR") {
        Some(dir) => dir.into(),
        None => "/var/tmp/scaleaway-lab".into(),
    }
}

/// Removes the directory of a dead run, and what only the last run may remove.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    if !path.join(KEPT).exists() && path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// If no run but `own` is left, takes back what runs changed on the machine, and the base directory.
pub(super) fn leave(base: &Path, own: &Path) -> anyhow::Result<()> {
    let starting = File::create(base.join("starting"))?;
    flock(&starting, FlockOperation::LockExclusive).context("wait for a start")?;
    if runs(base)?.iter().any(|run| run != own && is_alive(run)) {
        return Ok(());
    }
    sysctl::restore(base)?;
    if runs(base)?.is_empty() {
        fs::remove_file(base.join("starting"))?;
        fs::remove_dir(base).context("remove the lab's directory")?;
    }
    Ok(())
}

fn sweep(base: &Path) -> anyhow::Result<()> {
    for run in runs(base)? {
        if !is_alive(&run) {
            remove(&run)?;
        }
    }
    Ok(())
}

fn runs(base: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(base).context("list the lab's runs")? {
        let path = entry?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    Ok(found)
}

/// A run is alive while its process, or the one that cleans up after it, holds the lock.
fn is_alive(run: &Path) -> bool {
    File::open(run.join(LOCK))
        .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err())
}

fn make_private(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("make {}", path.display()))
}

fn random_id() -> anyhow::Result<String> {
    let mut bytes = [0; 3];
    File::open("/dev/urandom")?
        .read_exact(&mut bytes)
        .context("read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
