//! What `send` and `plan` take alike: which QEMU, which way to the peer, and the rule of the move. One
//! says what the other would do with the same options.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use transport::block::Disable;
use transport::session::{Policy, WhenStuck};

use crate::cli::listen_address;
use crate::peer::Way;
use crate::shaping::ShapingArgs;

/// Options of a move.
#[derive(Debug, clap::Args)]
pub(crate) struct MoveArgs {
    /// QEMU's monitor socket (started with -qmp unix:PATH,server=on,wait=off).
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
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
    /// What to do when the guest dirties memory as fast as the link takes it: wait, throttle,
    /// post-copy (run at the target, pages follow), force (a longer stop than asked for) or abort.
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
    #[command(flatten)]
    pub(crate) shaping: ShapingArgs,
    /// Switch an encoding stage off (same, zero, copy, known, delta, literal, raw); may be repeated.
    #[arg(long, value_name = "STAGE")]
    disable: Vec<String>,
    /// One zstd level for all pages; without, the level follows link and processor.
    #[arg(long, value_name = "LEVEL", allow_hyphen_values = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    pub(crate) level: Option<i32>,
}

impl MoveArgs {
    pub(crate) fn way(&self) -> anyhow::Result<Way> {
        match (&self.to, self.listen) {
            (Some(host), _) => Ok(Way::Dial(host.clone())),
            (None, Some(address)) => Ok(Way::Listen(address)),
            (None, None) => anyhow::bail!("give --to HOST:PORT or --listen ADDR:PORT"),
        }
    }

    pub(crate) fn policy(&self) -> Policy {
        Policy {
            when_stuck: self.when_stuck,
            throttle_max: self.throttle_max,
            time_max: self.timeout.map(Duration::from_secs),
            rounds_max: self.max_rounds,
            ..Policy::new(Duration::from_millis(self.downtime))
        }
    }

    pub(crate) fn disable(&self) -> anyhow::Result<Disable> {
        let mut disable = Disable::default();
        for stage in &self.disable {
            disable.add(stage)?;
        }
        Ok(disable)
    }
}
