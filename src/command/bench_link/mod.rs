//! `scaleaway bench link`: how much the link to a peer carries, as migrations would use it.
//!
//! ```text
//! dialer -> Run    listener -> Ready    sender: 8 lanes of bytes until the receiver has enough
//! receiver -> Received, sender -> Link: about once a second, for the progress lines
//! receiver -> Reception, sender -> Sending: the summary, the same on both sides
//! ```
//!
//! Reading order: this file, `flow`, `report`, `messages`.

mod flow;
mod messages;
mod report;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::timeout;
use transport::quic::{Connection, Controller, Endpoint, Mode, Protocol, Shaping, Tuning};

use crate::state_dir::{StateDir, StateDirArgs};
use crate::trust::{Peer, Refusal, Trust};
use flow::Flow;
use messages::{Lines, Message};
use report::Printer;

const SECONDS_MAX: u64 = 3600;
const YIELD_MAX_MS: u64 = 10_000;
/// A peer that is silent for longer than this during set-up is given up.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Measure the link to a trusted host, from the dialling side to the listening one.
#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("way").required(true).args(["listen", "to"]))]
pub(crate) struct BenchLinkArgs {
    /// Wait here for one measurement.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Measure to the host that listens here.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: Option<String>,
    /// Only with this host; default: any that is trusted.
    #[arg(long, value_name = "NAME|FINGERPRINT")]
    pub(crate) peer: Option<String>,
    /// How long to measure (dialling side).
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub(crate) seconds: u64,
    /// The listening side sends (dialling side).
    #[arg(long)]
    pub(crate) reverse: bool,
    /// Congestion controller for what this side sends: scaleaway, cubic or bbr.
    #[arg(long, default_value_t = Controller::Scaleaway, value_name = "NAME")]
    pub(crate) controller: Controller,
    /// Give way to others on the link once it queues for MS (what this side sends, with the
    /// controller scaleaway).
    #[arg(long = "yield", value_name = "MS", num_args = 0..=1, default_missing_value = "5",
        value_parser = clap::value_parser!(u64).range(1..=YIELD_MAX_MS))]
    pub(crate) yield_ms: Option<u64>,
    /// Least rate that is kept while giving way [default: 5 % of the greatest seen, 1M at least].
    #[arg(long, value_name = "RATE", value_parser = crate::cli::rate, requires = "yield_ms")]
    pub(crate) min_bandwidth: Option<u64>,
    /// Greatest rate in bits per second of IP bytes, such as 20M.
    #[arg(long, value_name = "RATE", value_parser = crate::cli::rate)]
    pub(crate) max_bandwidth: Option<u64>,
    /// One JSON object a line instead of text; the summary is the last one.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) state: StateDirArgs,
}

/// Runs one measurement and prints it.
///
/// # Errors
/// The link, the trust file, or the other side's refusal.
pub(crate) async fn run(args: BenchLinkArgs) -> Result<ExitCode> {
    let shaped = args.yield_ms.or(args.max_bandwidth).is_some();
    if shaped && args.controller != Controller::Scaleaway {
        bail!("--yield and --max-bandwidth need the controller scaleaway");
    }
    let state = StateDir::open(&args.state)?;
    let trust = Trust::load(&state)?;
    let expected = trust.expect(args.peer.as_deref())?;
    let identity = state.identity()?;
    let tuning = Tuning {
        protocol: Protocol::BenchLink,
        controller: args.controller,
        shaping: shaping(&args),
        ..Tuning::default()
    };
    let (endpoint, target) = match (args.listen, &args.to) {
        (Some(address), _) => (Endpoint::bind(address, &identity, &tuning)?, None),
        (None, Some(host)) => {
            let address = resolve(host).await?;
            (
                Endpoint::bind_to_dial(address, &identity, &tuning)?,
                Some(address),
            )
        }
        (None, None) => bail!("either --listen or --to is needed"),
    };
    let admit = |connection: &Connection| trust.admit(&expected, connection.peer());
    let measured = match target {
        Some(address) => dial(&endpoint, address, admit, &args).await,
        None => listen(&endpoint, admit, &args).await,
    };
    endpoint.close().await;
    measured.map(|()| ExitCode::SUCCESS)
}

fn shaping(args: &BenchLinkArgs) -> Shaping {
    let shaping = Shaping::default();
    if let Some(ms) = args.yield_ms {
        let queueing = Duration::from_millis(ms);
        shaping.set_mode(Mode::Yield { queueing });
    }
    shaping.set_rate_min(args.min_bandwidth);
    shaping.set_rate_max(args.max_bandwidth);
    shaping
}

/// Measures with the first trusted caller.
async fn listen(
    endpoint: &Endpoint,
    admit: impl Fn(&Connection) -> Result<Peer, Refusal>,
    args: &BenchLinkArgs,
) -> Result<()> {
    let mut printer = Printer::new(args.json);
    printer.listening(endpoint.local_address()?)?;
    loop {
        let connection = endpoint.accept().await?;
        if let Err(refusal) = admit(&connection) {
            tracing::warn!(from = %connection.remote_address(), "{refusal}");
            connection.refuse(&refusal.to_string()).await;
            continue;
        }
        let control = timeout(ANSWER_MAX, connection.accept_control());
        let mut lines = Lines::new(control.await.context("the caller says nothing")??);
        let request = timeout(ANSWER_MAX, lines.next())
            .await
            .context("the caller says nothing")??;
        let Message::Run { seconds, reverse } = request else {
            bail!("the caller began with another message");
        };
        let seconds = seconds.clamp(1, SECONDS_MAX);
        lines.say(&Message::Ready).await?;
        let flow = Flow {
            connection: &connection,
            lines,
            printer,
        };
        return if reverse {
            flow.send().await
        } else {
            flow.receive(seconds).await
        };
    }
}

async fn dial(
    endpoint: &Endpoint,
    address: SocketAddr,
    admit: impl Fn(&Connection) -> Result<Peer, Refusal>,
    args: &BenchLinkArgs,
) -> Result<()> {
    let connection = endpoint.dial(address).await?;
    if let Err(refusal) = admit(&connection) {
        connection.refuse(&refusal.to_string()).await;
        return Err(refusal.into());
    }
    let mut lines = Lines::new(connection.open_control().await?);
    lines
        .say(&Message::Run {
            seconds: args.seconds,
            reverse: args.reverse,
        })
        .await?;
    let answer = timeout(ANSWER_MAX, lines.next())
        .await
        .context("the listener says nothing")??;
    if answer != Message::Ready {
        bail!("the listener answered {answer:?}");
    }
    let flow = Flow {
        connection: &connection,
        lines,
        printer: Printer::new(args.json),
    };
    if args.reverse {
        flow.receive(args.seconds).await
    } else {
        flow.send().await
    }
}

async fn resolve(host: &str) -> Result<SocketAddr> {
    let mut found = tokio::net::lookup_host(host)
        .await
        .with_context(|| format!("\"{host}\" is not HOST:PORT, or has no address"))?;
    found
        .next()
        .with_context(|| format!("\"{host}\" has no address"))
}
