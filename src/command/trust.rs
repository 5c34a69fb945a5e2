//! `scaleaway trust`: whom this host lets in.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, bail};
use transport::quic::Fingerprint;

use crate::state_dir::{StateDir, StateDirArgs};
use crate::trust::{Peer, Trust};

/// Say which hosts may exchange guests with this one.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TrustArgs {
    #[command(flatten)]
    pub(crate) state: StateDirArgs,
    #[command(subcommand)]
    pub(crate) verb: TrustVerb,
}

/// What to do with the list.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum TrustVerb {
    /// Trust a key.
    Add {
        /// Any name for the host.
        name: String,
        /// What `scaleaway identity` prints there.
        fingerprint: Fingerprint,
        /// Where it listens.
        #[arg(value_name = "HOST:PORT")]
        address: Option<String>,
    },
    /// Show all trusted hosts.
    List,
    /// No longer trust a host, and forget the secret shared with it.
    Remove {
        /// The host's name.
        name: String,
    },
}

/// Changes or prints the list.
pub(crate) fn run(args: &TrustArgs) -> Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    let mut trust = Trust::load(&state)?;
    let mut out = std::io::stdout();
    match &args.verb {
        TrustVerb::Add {
            name,
            fingerprint,
            address,
        } => {
            if let Some(address) = address {
                check_address(address)?;
            }
            if *fingerprint == state.identity()?.fingerprint() {
                bail!(
                    "{fingerprint} is this host's own key; run `scaleaway identity` on the other"
                );
            }
            trust.add(Peer {
                name: name.clone(),
                fingerprint: *fingerprint,
                address: address.clone(),
            })?;
            writeln!(out, "{name} is trusted: {fingerprint}")?;
        }
        TrustVerb::List => {
            for peer in trust.peers() {
                let address = peer.address.as_deref().unwrap_or("");
                let line = format!("{} {} {address}", peer.name, peer.fingerprint);
                writeln!(out, "{}", line.trim_end())?;
            }
        }
        TrustVerb::Remove { name } => {
            let peer = trust.remove(name)?;
            writeln!(out, "{name} is no longer trusted: {}", peer.fingerprint)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check_address(address: &str) -> Result<()> {
    let port = address
        .rsplit_once(':')
        .map(|(host, port)| (host, port.parse::<u16>()));
    match port {
        Some((host, Ok(port))) if !host.is_empty() && port != 0 => Ok(()),
        Some(_) | None => bail!("\"{address}\" is not HOST:PORT"),
    }
}
