//! `scaleaway status`: every VM that this state dir knows, where it is, what is unsettled.

use std::process::ExitCode;

use serde::Serialize;

use crate::journal::{self, Entry, Role, Step};
use crate::progress::say;
use crate::state_dir::{StateDir, StateDirArgs};

/// Show every VM that this host has sent or received, where it is, and what is unsettled.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// One JSON array.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    state: StateDirArgs,
}

/// One VM.
#[derive(Debug, Serialize)]
struct Standing {
    vm: String,
    role: &'static str,
    peer: String,
    attempt: String,
    step: &'static str,
    /// `here`, `there`, or `doubt`.
    at: &'static str,
    settled: bool,
    qemu_alive: bool,
    epoch: u64,
    since_s: u64,
    advice: Option<String>,
}

/// Prints a line (or object) per VM; exit code 3 when something is unsettled.
pub(crate) fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    let standings: Vec<Standing> = journal::survey(&state)?.iter().map(standing).collect();
    if args.json {
        say(&serde_json::to_string_pretty(&standings)?);
    } else if standings.is_empty() {
        say("no VM has been sent or received with this state dir");
    }
    for one in standings.iter().filter(|_| !args.json) {
        say(&format!(
            "{}  {} ({}; peer {})",
            one.vm, one.at, one.step, one.peer
        ));
        if let Some(advice) = &one.advice {
            say(&format!("    {advice}"));
        }
    }
    let all_settled = standings.iter().all(|one| one.settled);
    Ok(if all_settled {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}

fn standing(entry: &Entry) -> Standing {
    let settled = entry.is_settled();
    Standing {
        vm: entry.vm.clone(),
        role: match entry.role {
            Role::Source => "source",
            Role::Target => "target",
        },
        peer: entry.peer.clone(),
        attempt: entry.attempt.clone(),
        step: entry.step.name(),
        at: place(entry),
        settled,
        qemu_alive: entry.qemu.is_alive().unwrap_or(false),
        epoch: entry.epoch,
        since_s: entry.at_s,
        advice: (!settled).then(|| advice(entry)),
    }
}

/// Where the journal says that the guest is.
fn place(entry: &Entry) -> &'static str {
    match (&entry.step, entry.role) {
        (Step::Started, Role::Source) | (Step::SettledHere { .. } | Step::Running, _) => "here",
        (Step::Committed { .. } | Step::Filling { .. }, _) => "here",
        (Step::Holding { .. }, _) => "there",
        (Step::Started, Role::Target)
        | (Step::Refused { .. } | Step::NeverRan { .. } | Step::SettledThere { .. }, _) => "there",
        (Step::Intent { .. }, _) => "doubt",
    }
}

fn advice(entry: &Entry) -> String {
    let vm = &entry.vm;
    match (&entry.step, entry.role) {
        (Step::Started, Role::Source) => format!(
            "a move is under way or its `send` died before the point of no return: \
             `scaleaway resolve {vm} --here` makes sure that the guest runs here"
        ),
        (Step::Started, Role::Target) => format!(
            "a move is under way or its `receive` died before the point of no return: \
             `scaleaway resolve {vm} --there` ends the copy here"
        ),
        (Step::Intent { .. }, _) => format!(
            "Commit may have been sent: run `scaleaway resolve {vm} --listen ADDR:PORT` on one host \
             and `scaleaway resolve {vm} --to HOST:PORT` on the other"
        ),
        (Step::Committed { .. }, _) => format!(
            "Commit was accepted and its `receive` died: `scaleaway resolve {vm} --here` runs the guest"
        ),
        (Step::Filling { .. }, _) => format!(
            "the guest runs here and waits for pages that the other host holds: run `scaleaway \
             resolve {vm} --listen ADDR:PORT` on one host and `scaleaway resolve {vm} --to HOST:PORT` \
             on the other"
        ),
        (Step::Holding { .. }, _) => format!(
            "the guest runs at the peer and needs pages of this QEMU, which must not end: run \
             `scaleaway resolve {vm} --listen ADDR:PORT` on one host and `scaleaway resolve {vm} --to \
             HOST:PORT` on the other"
        ),
        _ => format!("`scaleaway resolve {vm}`"),
    }
}
