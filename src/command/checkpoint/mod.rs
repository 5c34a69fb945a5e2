//! `scaleaway checkpoint`: what this host keeps of guests that came or went.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use transport::store::{Checkpoints, Meta, Stored};

use crate::journal::now_s;
use crate::progress::say;
use crate::state_dir::{StateDir, StateDirArgs};
use crate::trust::Trust;

const DAY_S: u64 = 24 * 3600;

/// Show and remove what is kept of guests' memory so that their next move with the same peer is
/// short.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CheckpointArgs {
    #[command(flatten)]
    pub(crate) state: StateDirArgs,
    #[command(subcommand)]
    pub(crate) verb: CheckpointVerb,
}

/// What to do with them.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum CheckpointVerb {
    /// One line per checkpoint, least recently used first.
    List {
        /// One JSON object: budget, and all checkpoints.
        #[arg(long)]
        json: bool,
    },
    /// Everything about a VM's checkpoints.
    Show {
        /// The VM: UUID or name.
        vm: String,
        /// Only that of this peer.
        #[arg(long, value_name = "NAME|FINGERPRINT")]
        peer: Option<String>,
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Wipe and remove a VM's checkpoints; its next move sends everything.
    Remove {
        /// The VM: UUID or name.
        vm: String,
        /// Only that of this peer.
        #[arg(long, value_name = "NAME|FINGERPRINT")]
        peer: Option<String>,
    },
    /// Wipe and remove what is too old or beyond the budget, as each move does at its begin.
    Prune {
        /// From here on: most bytes on disk (with K, M, G, T: 2^10 and so on), or `auto`: a quarter
        /// of what is free or held.
        #[arg(long, value_name = "SIZE|auto", value_parser = budget)]
        budget: Option<Budget>,
        /// From here on: days without use after which a checkpoint goes.
        #[arg(long, value_name = "DAYS")]
        days: Option<u64>,
        /// One JSON array of what went.
        #[arg(long)]
        json: bool,
    },
}

/// `--budget`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget(Option<u64>);

/// Runs the verb.
pub(crate) fn run(args: &CheckpointArgs) -> Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    let checkpoints = Checkpoints::new(state.path());
    let trust = Trust::load(&state)?;
    match &args.verb {
        CheckpointVerb::List { json } => list(&checkpoints, &trust, *json)?,
        CheckpointVerb::Show { vm, peer, json } => {
            let found = find(&checkpoints, &trust, vm, peer.as_deref())?;
            show(&found, &trust, *json)?;
        }
        CheckpointVerb::Remove { vm, peer } => {
            for stored in find(&checkpoints, &trust, vm, peer.as_deref())? {
                checkpoints.remove(&stored)?;
                say(&format!("removed {}", line(&Entry::of(&stored, &trust))));
            }
        }
        CheckpointVerb::Prune { budget, days, json } => {
            let mut limits = checkpoints.limits();
            if let Some(Budget(bytes)) = budget {
                limits.bytes_max = *bytes;
            }
            if let Some(days) = days {
                limits.age_max_s = days.saturating_mul(DAY_S);
            }
            if limits != checkpoints.limits() {
                checkpoints.set_limits(&limits)?;
            }
            let evicted = checkpoints.prune(now_s())?;
            print_all(&evicted, &trust, *json, "nothing was too old or too much")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A checkpoint, for people and scripts.
#[derive(Debug, Serialize)]
struct Entry {
    vm: Option<String>,
    peer: Option<String>,
    fingerprint: Option<String>,
    disk_bytes: u64,
    image_bytes: Option<u64>,
    used_s: Option<u64>,
    created_s: Option<u64>,
    role: Option<transport::store::Role>,
    state: Option<transport::store::State>,
    attempt: Option<String>,
    root: Option<String>,
    folder: PathBuf,
}

/// `list --json`.
#[derive(Debug, Serialize)]
struct Listing {
    held_bytes: u64,
    budget_bytes: u64,
    age_max_s: u64,
    checkpoints: Vec<Entry>,
}

impl Entry {
    fn of(stored: &Stored, trust: &Trust) -> Self {
        let meta = stored.meta.as_ref();
        Self {
            vm: meta.map(|meta| meta.vm.clone()),
            peer: meta.map(|meta| peer_name(meta, trust)),
            fingerprint: meta.map(|meta| meta.peer.clone()),
            disk_bytes: stored.bytes,
            image_bytes: meta.map(Meta::image_bytes),
            used_s: meta.map(|meta| meta.used_s),
            created_s: meta.map(|meta| meta.created_s),
            role: meta.map(|meta| meta.role),
            state: meta.map(|meta| meta.state),
            attempt: meta.map(|meta| meta.attempt.clone()),
            root: meta.and_then(|meta| meta.root.clone()),
            folder: stored.folder.clone(),
        }
    }
}

fn list(checkpoints: &Checkpoints, trust: &Trust, json: bool) -> Result<()> {
    let stored = checkpoints.list()?;
    let usage = checkpoints.usage()?;
    if json {
        let listing = Listing {
            held_bytes: usage.held,
            budget_bytes: usage.budget,
            age_max_s: checkpoints.limits().age_max_s,
            checkpoints: stored.iter().map(|one| Entry::of(one, trust)).collect(),
        };
        say(&serde_json::to_string_pretty(&listing)?);
        return Ok(());
    }
    print_all(&stored, trust, false, "no checkpoint is kept")?;
    if !stored.is_empty() {
        let (held, budget) = (mib(usage.held), mib(usage.budget));
        say(&format!("{held} of {budget} in use"));
    }
    Ok(())
}

fn show(found: &[Stored], trust: &Trust, json: bool) -> Result<()> {
    let entries: Vec<Entry> = found.iter().map(|one| Entry::of(one, trust)).collect();
    if json {
        say(&serde_json::to_string_pretty(&entries)?);
        return Ok(());
    }
    for entry in &entries {
        say(&line(entry));
        let unknown = || "?".to_owned();
        let attempt = entry.attempt.clone().unwrap_or_else(unknown);
        say(&format!("    last attempt {attempt}"));
        let image = entry.image_bytes.map_or_else(unknown, mib);
        say(&format!("    guest memory {image}"));
        say(&format!("    folder       {}", entry.folder.display()));
    }
    Ok(())
}

fn print_all(stored: &[Stored], trust: &Trust, json: bool, nothing: &str) -> Result<()> {
    let entries: Vec<Entry> = stored.iter().map(|one| Entry::of(one, trust)).collect();
    if json {
        say(&serde_json::to_string_pretty(&entries)?);
    } else if entries.is_empty() {
        say(nothing);
    } else {
        for entry in &entries {
            say(&line(entry));
        }
    }
    Ok(())
}

fn line(entry: &Entry) -> String {
    let unknown = "unreadable";
    let vm = entry.vm.as_deref().unwrap_or(unknown);
    let peer = entry.peer.as_deref().unwrap_or(unknown);
    let age_s = entry.used_s.map(|used_s| now_s().saturating_sub(used_s));
    let age = age_s.map_or_else(String::new, |age_s| {
        format!(", used {} ago", duration(age_s))
    });
    format!("{vm}  peer {peer}, {} on disk{age}", mib(entry.disk_bytes))
}

/// The checkpoints of a VM, with one peer or all.
fn find(
    checkpoints: &Checkpoints,
    trust: &Trust,
    vm: &str,
    peer: Option<&str>,
) -> Result<Vec<Stored>> {
    let fits = |stored: &Stored| {
        stored.meta.as_ref().is_some_and(|meta| {
            let with = |peer: &str| meta.peer == peer || peer_name(meta, trust) == peer;
            meta.vm == vm && peer.is_none_or(with)
        })
    };
    let mut found = checkpoints.list()?;
    found.retain(fits);
    if found.is_empty() {
        match peer {
            Some(peer) => bail!("no checkpoint of \"{vm}\" with {peer}"),
            None => bail!("no checkpoint of \"{vm}\""),
        }
    }
    Ok(found)
}

fn peer_name(meta: &Meta, trust: &Trust) -> String {
    let known = trust.peers().iter();
    known
        .filter(|peer| peer.fingerprint.to_string() == meta.peer)
        .map(|peer| peer.name.clone())
        .next()
        .unwrap_or_else(|| meta.peer.clone())
}

/// Reads `--budget`.
fn budget(text: &str) -> Result<Budget, String> {
    if text == "auto" {
        return Ok(Budget(None));
    }
    let parse = || {
        let (digits, shift) = match text.find(|c: char| !c.is_ascii_digit()) {
            None => (text, 0),
            Some(end) => {
                let shift = match &text[end..] {
                    "K" => 10,
                    "M" => 20,
                    "G" => 30,
                    "T" => 40,
                    other => bail!("{other} is no unit"),
                };
                (&text[..end], shift)
            }
        };
        let value: u64 = digits.parse()?;
        value.checked_mul(1 << shift).context("too large")
    };
    let bytes = parse().map_err(|error| format!("{text:?} is no size such as 20G: {error}"))?;
    Ok(Budget(Some(bytes)))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / DAY_S),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_have_binary_units() {
        let check = |text, expected| assert_eq!(budget(text).ok(), expected, "{text}");
        check("auto", Some(Budget(None)));
        check("20G", Some(Budget(Some(20 << 30))));
        check("4096", Some(Budget(Some(4096))));
        check("0", Some(Budget(Some(0))));
        check("20GB", None);
        check("G", None);
        check("-1", None);
        check("99999999999T", None);
    }
}
