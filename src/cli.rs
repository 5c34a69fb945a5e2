//! The command line, and how its units are read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand, ValueEnum};

use crate::command;
use crate::mapped::Mapped;
use crate::state_dir::StateDirArgs;

/// UDP port of an agent.
pub(crate) const PORT: u16 = 7117;

/// Moves running QEMU/KVM virtual machines between hosts over a WAN, and back.
#[derive(Debug, Parser)]
#[command(name = "scaleaway", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Identity(command::identity::IdentityArgs),
    Trust(command::trust::TrustArgs),
    Receive(command::receive::ReceiveArgs),
    Send(command::send::SendArgs),
    Plan(command::plan::PlanArgs),
    Status(command::status::StatusArgs),
    Set(command::set::SetArgs),
    Abort(command::set::AbortArgs),
    Resolve(command::resolve::ResolveArgs),
    Checkpoint(command::checkpoint::CheckpointArgs),
    Content(command::content::ContentArgs),
    /// Measure: the link to a peer, the engine on this host.
    #[command(subcommand)]
    Bench(Bench),
}

/// What `bench` measures.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    Link(command::bench_link::BenchLinkArgs),
    Engine(command::bench_engine::BenchEngineArgs),
}

/// `--verify`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyArg {
    Off,
    Sample,
    Full,
}

/// Options that say whose guest, and how its memory is reached: of `send`, `receive` and `plan`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct GuestArgs {
    /// Whether pages are read from, or written into, memory that QEMU shares (a memfd or a file).
    #[arg(long, value_enum, default_value_t)]
    pub(crate) mapped: Mapped,
    /// Only this trusted peer.
    #[arg(long, value_name = "NAME|FINGERPRINT")]
    pub(crate) peer: Option<String>,
    /// Name of a VM that has no UUID; the same on both hosts.
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,
    #[command(flatten)]
    pub(crate) state: StateDirArgs,
}

/// Options that `send` and `receive` share.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SessionArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    /// Write the report (JSON) here.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Progress and report as JSON lines on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Program to run at each phase (started, stopped, running, failed).
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) hook: Option<PathBuf>,
    /// Longest run of the hook in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub(crate) hook_timeout: u64,
}

/// `ADDR:PORT`, `ADDR` or `:PORT` to listen on; the port is 7117 unless given.
pub(crate) fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = SocketAddr::from_str(text) {
        return Ok(address);
    }
    if let Ok(ip) = IpAddr::from_str(text) {
        return Ok(SocketAddr::new(ip, PORT));
    }
    if let Some(port) = text.strip_prefix(':').and_then(|port| port.parse().ok()) {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port));
    }
    if text == "[::]" {
        return Ok(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), PORT));
    }
    Err(format!(
        "{text:?} is no address to listen on; give ADDR:PORT, such as 0.0.0.0:{PORT}"
    ))
}

/// Bits per second of IP bytes: digits with `k`, `M` or `G` (10^3, 10^6, 10^9).
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no rate; give bits per second, such as 20M or 1G");
    let (digits, unit) = match text.strip_suffix(['k', 'M', 'G']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, ""),
    };
    let factor = match unit {
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        _ => 1,
    };
    let value: u64 = digits.parse().map_err(|_| wrong())?;
    value
        .checked_mul(factor)
        .filter(|rate| *rate >= 8_000)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// The definition is consistent.
    #[test]
    fn command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Rates have decimal units; nonsense is refused.
    #[test]
    fn rates() {
        let check = |text, expected| assert_eq!(rate(text).ok(), expected, "{text}");
        check("20M", Some(20_000_000));
        check("1G", Some(1_000_000_000));
        check("64000", Some(64_000));
        check("12", None);
        check("20MB", None);
        check("99999999999G", None);
        check("", None);
    }

    /// A listening address may leave out what has a default.
    #[test]
    fn listen_addresses() {
        let check = |text, expected: &str| {
            assert_eq!(listen_address(text).unwrap().to_string(), expected);
        };
        check("127.0.0.1:9", "127.0.0.1:9");
        check("10.0.0.1", "10.0.0.1:7117");
        check(":7000", "0.0.0.0:7000");
        check("[::]", "[::]:7117");
        assert!(listen_address("nowhere").is_err());
    }
}
