//! Scaleaway: moves running QEMU/KVM virtual machines between hosts over a WAN, and back.
//!
//! Reading order: `source` and `target` (the flow, phase by phase), `capture` and `feed` (QEMU's two
//! streams), `vm` (QEMU's monitor), `peer` (the other host), `journal` and `settling` (what must not
//! be forgotten), `command` (one file per verb).
#![forbid(unsafe_code)]

mod capture;
mod cli;
mod command;
mod control;
mod estimate;
mod fault;
mod faults;
mod feed;
mod hook;
mod journal;
mod kept;
mod mapped;
mod peer;
mod plan;
mod probe;
mod progress;
mod prove;
mod relay;
mod report;
mod resumed;
mod settling;
mod shaping;
mod shared;
mod signals;
mod source;
mod state_dir;
mod tally;
mod target;
mod trace;
mod trust;
mod vm;
mod waiting;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Bench, Cli, Verb};

/// Wrong use, or nothing was begun.
const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("SCALEAWAY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match run(cli.verb) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(WRONG_USE)
        }
    }
}

/// One connection lives best on one thread (its own task order, no hand-over of its lock); pages are
/// encoded, decoded and read on threads of their own.
fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match verb {
            Verb::Identity(args) => command::identity::run(&args),
            Verb::Trust(args) => command::trust::run(&args),
            Verb::Receive(args) => command::receive::run(args).await,
            Verb::Send(args) => command::send::run(args).await,
            Verb::Plan(args) => command::plan::run(args).await,
            Verb::Status(args) => command::status::run(&args),
            Verb::Set(args) => command::set::set(args).await,
            Verb::Abort(args) => command::set::abort(args).await,
            Verb::Resolve(args) => command::resolve::run(args).await,
            Verb::Checkpoint(args) => command::checkpoint::run(&args),
            Verb::Content(args) => command::content::run(&args),
            Verb::Bench(Bench::Link(args)) => command::bench_link::run(args).await,
            Verb::Bench(Bench::Engine(args)) => command::bench_engine::run(args).await,
        }
    })
}
