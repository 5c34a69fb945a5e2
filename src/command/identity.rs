//! `scaleaway identity`: this host's key, made on first use.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;

use crate::state_dir::{StateDir, StateDirArgs};

/// Print this host's fingerprint, for `scaleaway trust add` on the other host; made on first use.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct IdentityArgs {
    #[command(flatten)]
    pub(crate) state: StateDirArgs,
}

/// Prints one line whose last word is the fingerprint.
pub(crate) fn run(args: &IdentityArgs) -> Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    let fingerprint = state.identity()?.fingerprint();
    writeln!(
        std::io::stdout(),
        "key in {}: {fingerprint}",
        state.path().display()
    )?;
    Ok(ExitCode::SUCCESS)
}
