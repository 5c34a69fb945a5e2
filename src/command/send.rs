//! `scaleaway send`: moves the guest of a QEMU to the peer's waiting one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use transport::block::Disable;
use transport::session::{Outcome, Policy, WhenStuck};

use crate::cli::{SessionArgs, listen_address};
use crate::peer::Way;
use crate::shaping::ShapingArgs;
use crate::source::{self, MemoryBudget, Options};
use crate::state_dir::StateDir;

/// Move the running guest of this QEMU to a peer that waits with `scaleaway receive`.
#[derive(Debug, clap::Args)]
pub(crate) struct SendArgs {
    /// QEMU's monitor socket (started with -qmp unix:PATH,server=on,wait=off).
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    #[command(flatten)]
    session: SessionArgs,
    /// Dial the peer.
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
    /// Longest stop of the guest that is asked for, in ms.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime: u64,
    /// What to do when the guest dirties memory as fast as the link takes it: wait, throttle, force
    /// (a longer stop than asked for) or abort.
    #[arg(long, value_name = "POLICY", default_value_t = WhenStuck::Throttle)]
    when_stuck: WhenStuck,
    /// Strongest throttle of the guest's processors in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(1..=99))]
    throttle_max: u8,
    /// Time after which pre-copy counts as stuck for good, in s: `force` then stops the guest, all
    /// others end the move.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// The same after so many rounds.
    #[arg(long, value_name = "ROUNDS")]
    max_rounds: Option<u32>,
    /// Write what the controllers see, ten times a second, here (JSON lines).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    shaping: ShapingArgs,
    /// Switch an encoding stage off (same, zero, copy, known, delta, literal, raw); may be repeated.
    #[arg(long, value_name = "STAGE")]
    disable: Vec<String>,
    /// Memory of this process beside buffers that are always there, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 160, value_parser = clap::value_parser!(u32).range(48..=65_536))]
    memory_max: u32,
    /// Leave source QEMU in `postmigrate` after success.
    #[arg(long)]
    keep_source: bool,
    /// One zstd level for all pages; without, the level follows link and processor.
    #[arg(long, value_name = "LEVEL", allow_hyphen_values = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    level: Option<i32>,
}

/// Exit code: 0 the guest runs at the target, 1 it runs here, 3 in doubt.
pub(crate) async fn run(args: SendArgs) -> anyhow::Result<ExitCode> {
    let mut disable = Disable::default();
    for stage in &args.disable {
        disable.add(stage)?;
    }
    let way = match (args.to, args.listen) {
        (Some(host), _) => Way::Dial(host),
        (None, Some(address)) => Way::Listen(address),
        (None, None) => anyhow::bail!("give --to HOST:PORT or --listen ADDR:PORT"),
    };
    let session = args.session;
    let done = source::run(Options {
        state: StateDir::open(&session.state)?,
        qmp: args.qmp,
        way,
        peer: session.peer,
        vm: session.vm,
        mapped: session.mapped,
        policy: Policy {
            when_stuck: args.when_stuck,
            throttle_max: args.throttle_max,
            time_max: args.timeout.map(Duration::from_secs),
            rounds_max: args.max_rounds,
            ..Policy::new(Duration::from_millis(args.downtime))
        },
        trace: args.trace,
        shaping: args.shaping.shaping(),
        disable,
        level: args.level,
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
