//! What this host durably knows of its VMs: one append-only file per VM in `STATE_DIR/journal`.
//!
//! A line is `CHECKSUM JSON\n`, checksum = first 16 hex digits of BLAKE3 over the JSON. Space is
//! preallocated and filled with zeros, so an append changes no metadata and one `fdatasync` makes it
//! durable; a torn last line fails its checksum and does not count. The file is locked while an
//! agent works on the VM.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qemu_glue::qmp::ProcessId;
use serde::{Deserialize, Serialize};
use transport::block::Layout;
use transport::wire::{self, Verdict};

use crate::peer::{Me, Peer};
use crate::state_dir::StateDir;
use crate::vm::Vm;

/// Bytes of a journal file; when they are used up the file is rewritten with its latest entry.
const FILE_BYTES: u64 = 256 * 1024;

/// Which role this host plays in an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    Source,
    Target,
}

/// What happened, in the order of docs/handover.md.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub(crate) enum Step {
    /// The attempt began; nothing is decided.
    Started,
    /// Source: Commit will be sent.
    Intent {
        root: String,
        target_incarnation: u64,
        /// The image, when pages of it stay behind for post-copy.
        #[serde(default)]
        blocks: Vec<(String, u32)>,
    },
    /// Target: Commit is accepted; `cont` may follow.
    Committed {
        root: String,
        /// The image, when pages of it are lacking.
        #[serde(default)]
        blocks: Vec<(String, u32)>,
    },
    /// Target: this attempt will never run here.
    Refused { reason: String },
    /// Target: its QEMU is dead and never ran the guest.
    NeverRan { reason: String },
    /// Target: the guest runs here, and pages of it are at the source.
    Filling { blocks: Vec<(String, u32)> },
    /// Source: the guest is at the target, and pages of it are here.
    Holding { blocks: Vec<(String, u32)> },
    /// Target: the guest runs here.
    Running,
    /// The guest is here.
    SettledHere { reason: String },
    /// The guest is at the peer.
    SettledThere { reason: String },
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) vm: String,
    pub(crate) attempt: String,
    pub(crate) role: Role,
    /// Fingerprint of the peer.
    pub(crate) peer: String,
    /// Of this attempt; raised by a `resolve` without contact.
    pub(crate) epoch: u64,
    /// Seconds since 1970, for people.
    pub(crate) at_s: u64,
    /// The monitor, so that `resolve` finds QEMU again.
    pub(crate) qmp: PathBuf,
    /// QEMU by pid, start time, boot id.
    pub(crate) qemu: ProcessId,
    /// The guest was paused before the move, and stays so.
    #[serde(default)]
    pub(crate) paused: bool,
    #[serde(flatten)]
    pub(crate) step: Step,
}

impl Step {
    /// Word for people and for `status --json`.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Step::Started => "started",
            Step::Intent { .. } => "intent",
            Step::Committed { .. } => "committed",
            Step::Refused { .. } => "refused",
            Step::NeverRan { .. } => "never-ran",
            Step::Filling { .. } => "filling",
            Step::Holding { .. } => "holding",
            Step::Running => "running",
            Step::SettledHere { .. } => "settled-here",
            Step::SettledThere { .. } => "settled-there",
        }
    }
}

impl Entry {
    /// What this entry proves to the other side.
    pub(crate) fn verdict(&self) -> Verdict {
        match (&self.step, self.role) {
            (Step::Intent { .. } | Step::Holding { .. }, _) => Verdict::Unknown,
            (Step::Filling { .. }, _) => Verdict::Running,
            (Step::Committed { .. }, _) => Verdict::Committed,
            (Step::Refused { .. }, _) => Verdict::Refused,
            (Step::NeverRan { .. }, _) => Verdict::NeverRan,
            (Step::Running, _) | (Step::SettledHere { .. }, Role::Target) => Verdict::Running,
            (Step::Started, Role::Source) | (Step::SettledHere { .. }, Role::Source) => {
                Verdict::Stayed
            }
            (Step::Started, Role::Target) => Verdict::Unknown,
            (Step::SettledThere { .. }, Role::Source) => Verdict::Unknown,
            (Step::SettledThere { .. }, Role::Target) => Verdict::Refused,
        }
    }

    /// Whether nothing is left to do for this attempt.
    pub(crate) fn is_settled(&self) -> bool {
        match self.step {
            Step::SettledHere { .. }
            | Step::SettledThere { .. }
            | Step::Refused { .. }
            | Step::NeverRan { .. }
            // The guest is here; the source may still come and ask.
            | Step::Running => true,
            Step::Started
            | Step::Intent { .. }
            | Step::Committed { .. }
            | Step::Filling { .. }
            | Step::Holding { .. } => false,
        }
    }
}

impl Entry {
    /// First entry of a new attempt.
    pub(crate) fn started(me: &Me, vm: &Vm, peer: &Peer, paused: bool) -> Entry {
        Entry {
            vm: me.vm.clone(),
            attempt: hex(&peer.agreed.attempt.0),
            role: match me.role {
                wire::Role::Source => Role::Source,
                wire::Role::Target => Role::Target,
            },
            peer: peer.connection.peer().to_string(),
            epoch: 0,
            at_s: now_s(),
            qmp: std::path::absolute(&vm.path).unwrap_or_else(|_| vm.path.clone()),
            qemu: vm.qmp.peer_process().clone(),
            paused,
            step: Step::Started,
        }
    }

    /// The next entry of the same attempt.
    pub(crate) fn then(&self, step: Step) -> Entry {
        Entry {
            at_s: now_s(),
            step,
            ..self.clone()
        }
    }
}

/// A new attempt must not begin while an older one may still decide where the guest is.
pub(crate) fn refuse_unsettled(journal: &Journal) -> anyhow::Result<()> {
    match journal.latest() {
        Some(latest) if !latest.is_settled() && latest.step != Step::Started => bail!(
            "an earlier move of VM {} is unsettled ({}): run `scaleaway resolve {}` first",
            latest.vm,
            latest.step.name(),
            latest.vm
        ),
        Some(_) | None => Ok(()),
    }
}

/// Block names and pages, so that a later process knows the image again.
pub(crate) fn block_list(layout: &Layout) -> Vec<(String, u32)> {
    let blocks = layout.blocks().iter();
    blocks
        .map(|block| (block.name.clone(), block.pages))
        .collect()
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "the edge where entries get their date for people"
)]
pub(crate) fn now_s() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A VM's journal, locked.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    /// Every entry of the file, oldest first; bounded by its size.
    entries: Vec<Entry>,
}

impl Journal {
    /// Opens (or makes) and locks the journal of a VM.
    pub(crate) fn open(state: &StateDir, vm: &str) -> anyhow::Result<Journal> {
        let folder = state.folder("journal")?;
        let path = folder.join(file_name(vm));
        let file = open_reserved(&path)
            .with_context(|| format!("cannot prepare the journal {}", path.display()))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |_| {
                anyhow::anyhow!(
                    "another scaleaway works on VM {vm}: wait for it, or see `scaleaway status`"
                )
            },
        )?;
        let (entries, end) = read_entries(&file)?;
        Ok(Journal {
            path,
            file,
            end,
            entries,
        })
    }

    /// The last durable entry.
    pub(crate) fn latest(&self) -> Option<&Entry> {
        self.entries.last()
    }

    /// The last durable entry of an attempt.
    pub(crate) fn find(&self, attempt: &str) -> Option<&Entry> {
        self.entries
            .iter()
            .rev()
            .find(|entry| entry.attempt == attempt)
    }

    /// Makes an entry durable.
    pub(crate) fn append(&mut self, entry: &Entry) -> io::Result<()> {
        let line = encode(entry)?;
        if self.end + line.len() as u64 > FILE_BYTES {
            self.rewrite()?;
        }
        self.file.write_all_at(&line, self.end)?;
        self.file.sync_data()?;
        self.end += line.len() as u64;
        self.entries.push(entry.clone());
        Ok(())
    }

    /// Starts a new file with the latest entry, durable before it takes the old one's name.
    fn rewrite(&mut self) -> io::Result<()> {
        let fresh = self.path.with_extension("new");
        if fresh.exists() {
            std::fs::remove_file(&fresh)?;
        }
        let file = open_reserved(&fresh)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        let mut end = 0;
        self.entries.drain(..self.entries.len().saturating_sub(1));
        if let Some(latest) = self.entries.last() {
            let line = encode(latest)?;
            file.write_all_at(&line, 0)?;
            end = line.len() as u64;
        }
        file.sync_all()?;
        std::fs::rename(&fresh, &self.path)?;
        sync_folder(&self.path)?;
        (self.file, self.end) = (file, end);
        Ok(())
    }
}

/// Whether this state dir has a journal of the VM.
pub(crate) fn knows(state: &StateDir, vm: &str) -> anyhow::Result<bool> {
    Ok(state.folder("journal")?.join(file_name(vm)).exists())
}

/// Latest entries of every VM in a state dir, without locking.
pub(crate) fn survey(state: &StateDir) -> anyhow::Result<Vec<Entry>> {
    let folder = state.folder("journal")?;
    let mut found = Vec::new();
    let listing =
        std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for item in listing {
        let path = item?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let (entries, _) = read_entries(&File::open(&path)?)?;
            found.extend(entries.into_iter().next_back());
        }
    }
    found.sort_by(|left, right| left.vm.cmp(&right.vm));
    Ok(found)
}

fn open_reserved(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    if file.metadata()?.len() < FILE_BYTES {
        // Written, not only reserved: later appends change data alone.
        let old = file.metadata()?.len();
        let zeros = vec![0; usize::try_from(FILE_BYTES - old).unwrap_or(0)];
        file.write_all_at(&zeros, old)?;
        file.sync_all()?;
        sync_folder(path)?;
    }
    Ok(file)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    File::open(folder)?.sync_all()
}

fn encode(entry: &Entry) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(entry)?;
    Ok(format!("{} {json}\n", checksum(&json)).into_bytes())
}

fn checksum(json: &str) -> String {
    blake3::hash(json.as_bytes()).to_hex()[..16].to_owned()
}

/// All whole entries from the start, and where the next one goes.
fn read_entries(file: &File) -> io::Result<(Vec<Entry>, u64)> {
    let length = file.metadata()?.len().min(FILE_BYTES);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    let mut entries = Vec::new();
    let mut end = 0_u64;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(entry) = decode(line) else { break };
        end += line.len() as u64;
        entries.push(entry);
    }
    Ok((entries, end))
}

fn decode(line: &[u8]) -> Option<Entry> {
    let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, json) = text.split_once(' ')?;
    if sum != checksum(json) {
        return None;
    }
    serde_json::from_str(json).ok()
}

/// A VM's name as a file name: letters, digits, dash and underscore stay, the rest becomes `%XX`.
pub(crate) fn safe_name(vm: &str) -> String {
    vm.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

fn file_name(vm: &str) -> String {
    format!("{}.log", safe_name(vm))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries come back after reopening; a torn last line does not count and is written over.
    #[test]
    fn torn_line_does_not_count() {
        let folder = scratch("torn");
        let mut journal = Journal::open(&folder, "vm").unwrap();
        journal.append(&entry(Step::Started)).unwrap();
        journal.append(&entry(Step::Running)).unwrap();
        let cut = journal.end - 5;
        journal.file.write_all_at(&[0; 5], cut).unwrap();
        drop(journal);
        let mut journal = Journal::open(&folder, "vm").unwrap();
        assert_eq!(journal.latest().unwrap().step, Step::Started);
        journal
            .append(&entry(Step::Refused { reason: "r".into() }))
            .unwrap();
        drop(journal);
        assert!(
            Journal::open(&folder, "vm")
                .unwrap()
                .latest()
                .unwrap()
                .is_settled()
        );
    }

    /// A full file is rewritten with what counts; the limit of the file holds.
    #[test]
    fn full_file_is_rewritten() {
        let folder = scratch("full");
        let mut journal = Journal::open(&folder, "vm/1").unwrap();
        for _ in 0..3000 {
            journal.append(&entry(Step::Started)).unwrap();
        }
        journal.append(&entry(Step::Running)).unwrap();
        assert!(journal.end <= FILE_BYTES);
        drop(journal);
        assert_eq!(survey(&folder).unwrap(), [entry(Step::Running)]);
    }

    /// Two agents cannot work on one VM at once.
    #[test]
    fn one_agent_per_vm() {
        let folder = scratch("lock");
        let _held = Journal::open(&folder, "vm").unwrap();
        assert!(Journal::open(&folder, "vm").is_err());
        assert!(Journal::open(&folder, "other").is_ok());
    }

    fn entry(step: Step) -> Entry {
        Entry {
            vm: "vm".into(),
            attempt: "00".into(),
            role: Role::Target,
            peer: "SHA256:x".into(),
            epoch: 0,
            at_s: 1,
            qmp: "/q".into(),
            qemu: ProcessId {
                pid: 1,
                start_time_ticks: 2,
                boot_id: "b".into(),
            },
            paused: false,
            step,
        }
    }

    fn scratch(name: &str) -> StateDir {
        let folder =
            std::env::temp_dir().join(format!("scaleaway-journal-{name}-{}", std::process::id()));
        if folder.exists() {
            std::fs::remove_dir_all(&folder).unwrap();
        }
        StateDir::at(&folder).unwrap()
    }
}
