//! `scaleaway plan`: says what a move would be like before it begins.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::cli::{listen_address, rate};
use crate::mapped::Mapped;
use crate::peer::Way;
use crate::plan::run::{self, Options};
use crate::state_dir::{StateDir, StateDirArgs};

/// Say what moving this QEMU's guest to a waiting `receive` would be like: time, downtime, bytes.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// QEMU's monitor socket (started with -qmp unix:PATH,server=on,wait=off).
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Dial the peer, which waits with `receive` or `receive --probe`.
    #[arg(
        long,
        value_name = "HOST:PORT",
        required_unless_present = "listen",
        conflicts_with = "listen"
    )]
    to: Option<String>,
    /// Wait for the peer to dial.
    #[arg(long, value_name = "ADDR:PORT", value_parser = listen_address)]
    listen: Option<SocketAddr>,
    /// Only this trusted peer.
    #[arg(long, value_name = "NAME|FINGERPRINT")]
    peer: Option<String>,
    /// Name of a VM that has no UUID; the same on both hosts.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Longest stop of the guest that `send` will be asked for, in ms.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime: u64,
    /// Cap of the transfer's rate in bit/s (k, M, G); the probe keeps it too.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    max_bandwidth: Option<u64>,
    /// Whether `send` will read pages from memory that QEMU shares.
    #[arg(long, value_enum, default_value_t)]
    mapped: Mapped,
    /// One JSON document on stdout.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    state: StateDirArgs,
}

/// Exit code: 0 it was found out, 1 it was not.
pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<ExitCode> {
    let way = match (args.to, args.listen) {
        (Some(host), _) => Way::Dial(host),
        (None, Some(address)) => Way::Listen(address),
        (None, None) => anyhow::bail!("give --to HOST:PORT or --listen ADDR:PORT"),
    };
    let planned = run::run(Options {
        state: StateDir::open(&args.state)?,
        qmp: args.qmp,
        way,
        peer: args.peer,
        vm: args.vm,
        downtime: Duration::from_millis(args.downtime),
        max_bandwidth_bps: args.max_bandwidth,
        mapped: args.mapped,
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
