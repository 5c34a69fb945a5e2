//! `scaleaway plan`: says what a move would be like before it begins.

use std::process::ExitCode;

use super::moving::MoveArgs;
use crate::cli::GuestArgs;
use crate::plan::run::{self, Options};
use crate::state_dir::StateDir;

/// Say what `send` with these options would be like, to a waiting `receive` or `receive --probe`: time,
/// downtime, bytes.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    moving: MoveArgs,
    #[command(flatten)]
    guest: GuestArgs,
    /// One JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Exit code: 0 it was found out, 1 it was not.
pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<ExitCode> {
    let moving = args.moving;
    let planned = run::run(Options {
        state: StateDir::open(&args.guest.state)?,
        way: moving.way()?,
        peer: args.guest.peer,
        vm: args.guest.vm,
        policy: moving.policy(),
        shaping: moving.shaping.shaping(),
        disable: moving.disable()?,
        level: moving.level,
        mapped: args.guest.mapped,
        qmp: moving.qmp,
    })
    .await;
    match planned {
        Ok(document) => {
            let text = if args.json {
                serde_json::to_string_pretty(&document)?
            } else {
                document.to_string()
            };
            crate::progress::say(&text);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            tracing::error!("no plan: {error:#}");
            Ok(ExitCode::from(1))
        }
    }
}
