//! The verbs that the lab calls on its own program, each starting with two underscores.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::lab;
use crate::netns::{self, Holding};
use crate::overlay::{self, HookSettings};
use crate::probe;
use crate::wan::{self, LinkJson};

/// Parsed arguments of an internal call.
#[derive(Debug, Parser)]
#[command(name = "testbed")]
struct Internal {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Holds the namespaces of a host.
    #[command(name = "__host")]
    Host {
        #[arg(long)]
        name: String,
        #[arg(long)]
        private: PathBuf,
        #[arg(long)]
        hidden: PathBuf,
        #[arg(long)]
        visible: Vec<PathBuf>,
    },
    /// Emulates the link between two interfaces.
    #[command(name = "__wan")]
    Wan {
        #[arg(long)]
        site: String,
        #[arg(long)]
        far: String,
        #[arg(long)]
        control: PathBuf,
        /// JSON of the link's parameters.
        #[arg(long)]
        link: String,
        #[arg(long)]
        seed: u64,
    },
    /// Moves the guest's MAC; the product calls it with the phase, its role is in the environment.
    #[command(name = "__hook")]
    Hook {
        #[arg(long)]
        mac: String,
        #[arg(long)]
        tap: String,
        #[arg(long)]
        tunnel: String,
        #[arg(long)]
        log: PathBuf,
        phase: String,
    },
    /// Reads the guest's counter.
    #[command(name = "__counter")]
    Counter { address: SocketAddr },
    /// Sends a game's datagrams.
    #[command(name = "__game-send")]
    GameSend { to: SocketAddr },
    /// Receives them.
    #[command(name = "__game-receive")]
    GameReceive { at: SocketAddr },
    /// Sends a stream that takes all that it gets.
    #[command(name = "__bulk-send")]
    BulkSend {
        to: SocketAddr,
        /// TCP's congestion control.
        #[arg(long)]
        congestion: String,
    },
    /// Receives it.
    #[command(name = "__bulk-receive")]
    BulkReceive { at: SocketAddr },
    /// Removes a run's files after its end.
    #[command(name = "__cleanup")]
    Cleanup { run: PathBuf },
}

/// Runs an internal verb if `arguments` (the program's name first) hold one; None if they do not.
#[must_use]
pub fn run(arguments: &[OsString]) -> Option<anyhow::Result<()>> {
    if !arguments.get(1)?.to_str()?.starts_with("__") {
        return None;
    }
    Some(match Internal::try_parse_from(arguments) {
        Ok(internal) => internal.verb.run(),
        Err(error) => Err(error.into()),
    })
}

impl Verb {
    fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Host {
                name,
                private,
                hidden,
                visible,
            } => netns::hold(&Holding {
                name,
                private,
                hidden,
                visible,
            }),
            Self::Wan {
                site,
                far,
                control,
                link,
                seed,
            } => {
                let link = serde_json::from_str::<LinkJson>(&link)?.try_into()?;
                wan::run(&wan::Settings {
                    site,
                    far,
                    control,
                    link,
                    seed,
                })
            }
            Self::Hook {
                mac,
                tap,
                tunnel,
                log,
                phase,
            } => {
                let role = std::env::var("SCALEAWAY_ROLE").context("read SCALEAWAY_ROLE")?;
                overlay::run_hook(
                    &HookSettings {
                        mac,
                        tap,
                        tunnel,
                        log,
                    },
                    &role,
                    &phase,
                )
            }
            Self::Counter { address } => probe::watch_counter(address),
            Self::GameSend { to } => probe::send_game(to),
            Self::GameReceive { at } => probe::receive_game(at),
            Self::BulkSend { to, congestion } => probe::send_bulk(to, &congestion),
            Self::BulkReceive { at } => probe::receive_bulk(at),
            Self::Cleanup { run } => lab::clean_up_after(&run),
        }
    }
}
