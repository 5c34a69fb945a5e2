//! `scaleaway receive`: takes one guest into a QEMU that waits with `-incoming defer`, or answers
//! probes alone.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use transport::session::Outcome;
use transport::wire::Verify;

use crate::cli::{PORT, SessionArgs, VerifyArg, listen_address};
use crate::peer::Way;
use crate::probe::{self, ProbeHost};
use crate::state_dir::StateDir;
use crate::target::{self, Options};

/// Take one guest from a peer into a QEMU that was started with `-incoming defer`.
#[derive(Debug, clap::Args)]
pub(crate) struct ReceiveArgs {
    /// QEMU's monitor socket (started with -qmp unix:PATH,server=on,wait=off).
    #[arg(long, value_name = "PATH", required_unless_present = "probe")]
    qmp: Option<PathBuf>,
    /// Take no guest: only answer `scaleaway plan`, of any VM unless --vm names one, until interrupted.
    #[arg(long, conflicts_with_all = ["qmp", "paused", "report", "json", "hook"])]
    probe: bool,
    #[command(flatten)]
    session: SessionArgs,
    /// Wait for the peer to dial [default: 0.0.0.0:7117].
    #[arg(long, value_name = "ADDR:PORT", value_parser = listen_address, conflicts_with = "from")]
    listen: Option<SocketAddr>,
    /// Dial the peer.
    #[arg(long, value_name = "HOST:PORT")]
    from: Option<String>,
    /// Leave the guest stopped after the handover.
    #[arg(long)]
    paused: bool,
    /// How memory is proved before the guest may run.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = VerifyArg::Sample)]
    verify: VerifyArg,
}

/// Exit code: 0 the guest runs here, 1 it does not, 3 in doubt.
pub(crate) async fn run(args: ReceiveArgs) -> anyhow::Result<ExitCode> {
    let way = match args.from {
        Some(host) => Way::Dial(host),
        None => Way::Listen(
            args.listen
                .unwrap_or(SocketAddr::from(([0, 0, 0, 0], PORT))),
        ),
    };
    let verify = match args.verify {
        VerifyArg::Off => Verify::Off,
        VerifyArg::Sample => Verify::Sample,
        VerifyArg::Full => Verify::Full,
    };
    let session = args.session;
    let state = StateDir::open(&session.guest.state)?;
    let Some(qmp) = args.qmp else {
        let host = ProbeHost {
            state,
            verify,
            qemu: String::new(),
        };
        probe::answer_all(way, session.guest.peer.as_deref(), session.guest.vm, &host).await?;
        return Ok(ExitCode::SUCCESS);
    };
    let done = target::run(Options {
        state,
        qmp,
        way,
        peer: session.guest.peer,
        vm: session.guest.vm,
        mapped: session.guest.mapped,
        stay_paused: args.paused,
        verify,
        report: session.report,
        json: session.json,
        hook: session.hook,
        hook_limit: Duration::from_secs(session.hook_timeout),
    })
    .await;
    let outcome = match done {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::error!("the guest is not here: {error:#}");
            return Ok(ExitCode::from(1));
        }
    };
    Ok(match outcome {
        Outcome::Arrived => {
            tracing::info!("the guest is here");
            ExitCode::SUCCESS
        }
        Outcome::Stayed { detail, .. } => {
            tracing::error!("the guest is not here: {detail}");
            ExitCode::from(1)
        }
        Outcome::Doubt { detail } => {
            tracing::error!("in doubt: {detail}; run `scaleaway status`");
            ExitCode::from(3)
        }
    })
}
