//! `scaleaway send`: moves the guest of a QEMU to the peer's waiting one.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use transport::session::Outcome;

use super::moving::MoveArgs;
use crate::cli::SessionArgs;
use crate::source::{self, MemoryBudget, Options};
use crate::state_dir::StateDir;

/// Move the running guest of this QEMU to a peer that waits with `scaleaway receive`.
#[derive(Debug, clap::Args)]
pub(crate) struct SendArgs {
    #[command(flatten)]
    moving: MoveArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// Write what the controllers see, ten times a second, here (JSON lines).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Memory of this process beside buffers that are always there, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 160, value_parser = clap::value_parser!(u32).range(48..=65_536))]
    memory_max: u32,
    /// Leave source QEMU in `postmigrate` after success.
    #[arg(long)]
    keep_source: bool,
}

/// Exit code: 0 the guest runs at the target, 1 it runs here, 3 in doubt.
pub(crate) async fn run(args: SendArgs) -> anyhow::Result<ExitCode> {
    let moving = args.moving;
    let session = args.session;
    let done = source::run(Options {
        state: StateDir::open(&session.guest.state)?,
        way: moving.way()?,
        policy: moving.policy(),
        shaping: moving.shaping.shaping(),
        disable: moving.disable()?,
        level: moving.level,
        qmp: moving.qmp,
        peer: session.guest.peer,
        vm: session.guest.vm,
        mapped: session.guest.mapped,
        trace: args.trace,
        budget: MemoryBudget::of(args.memory_max),
        keep_source: args.keep_source,
        report: session.report,
        json: session.json,
        hook: session.hook,
        hook_limit: Duration::from_secs(session.hook_timeout),
    })
    .await;
    let outcome = match done {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::error!("the guest stays here: {error:#}");
            return Ok(ExitCode::from(1));
        }
    };
    Ok(match outcome {
        Outcome::Arrived => {
            tracing::info!("the guest runs at the target");
            ExitCode::SUCCESS
        }
        Outcome::Stayed { detail, .. } => {
            tracing::error!("the guest stays here: {detail}");
            ExitCode::from(1)
        }
        Outcome::Doubt { detail } => {
            tracing::error!(
                "in doubt: {detail}; the guest is paused here. Run `scaleaway status`, then `scaleaway resolve VM` on both hosts"
            );
            ExitCode::from(3)
        }
    })
}
