//! The overlay's own flows beside a migration, from the user to the client: over the same link and
//! the same way as the guest's pages.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::lab::Lab;
use crate::overlay::CLIENT_OVERLAY_ADDRESS;
use crate::probe::{BulkLog, BulkProbe, GameLog, GameProbe, PingLog, PingProbe};
use crate::report::{Beside, Flows};
use crate::scenario::Beside as Asked;

const PING_INTERVAL: Duration = Duration::from_millis(20);
const GAME_PORT: u16 = 7001;
const BULK_PORT: u16 = 7002;
/// The stream has found its rate after so long.
pub(super) const SETTLE: Duration = Duration::from_secs(6);
/// Then it is watched for so long before the migration starts.
pub(super) const ALONE: Duration = Duration::from_secs(8);

/// The flows at work.
#[derive(Debug)]
pub(super) struct Flowing {
    ping: PingProbe,
    game: GameProbe,
    bulk: Option<BulkProbe>,
}

/// All that arrived.
#[derive(Debug)]
pub(super) struct Flown {
    ping: PingLog,
    game: GameLog,
    bulk: Option<BulkLog>,
}

impl Flowing {
    /// Starts them; returns once each arrives.
    pub(super) fn start(lab: &Lab, asked: &Asked, program: &Path) -> anyhow::Result<Self> {
        let at = |port: u16| -> anyhow::Result<SocketAddr> {
            let address = format!("{CLIENT_OVERLAY_ADDRESS}:{port}");
            address.parse().context("the client's overlay address")
        };
        let (from, to) = (&lab.user, &lab.client);
        let game = GameProbe::start(from, to, at(GAME_PORT)?, program)?;
        let ping = PingProbe::start(from, CLIENT_OVERLAY_ADDRESS, PING_INTERVAL)?;
        let bulk = match &asked.tcp {
            Some(congestion) => {
                let at = at(BULK_PORT)?;
                Some(BulkProbe::start(from, to, at, congestion, program)?)
            }
            None => None,
        };
        Ok(Self { ping, game, bulk })
    }

    /// Ends them.
    pub(super) fn stop(self) -> anyhow::Result<Flown> {
        Ok(Flown {
            ping: self.ping.stop()?,
            game: self.game.stop()?,
            bulk: self.bulk.map(BulkProbe::stop).transpose()?,
        })
    }
}

impl Flown {
    /// What they had in a span of the migration, and in one before it.
    pub(super) fn figures(&self, alone: (u64, u64), during: (u64, u64)) -> Beside {
        let [alone, during] = [alone, during].map(|(from_us, to_us)| self.flows(from_us, to_us));
        let tcp_share_of_alone = during
            .tcp_bps
            .zip(alone.tcp_bps)
            .map(|(during, alone)| during / alone);
        Beside {
            tcp_share_of_alone,
            during,
            alone,
        }
    }

    fn flows(&self, from_us: u64, to_us: u64) -> Flows {
        let ping = self.ping.span(from_us, to_us);
        let game = self.game.span(from_us, to_us);
        let bulk = self.bulk.as_ref();
        Flows {
            tcp_bps: bulk.and_then(|bulk| bulk.rate_bps(from_us, to_us)),
            udp_p50_ms: game.p50_ms,
            udp_p95_ms: game.p95_ms,
            udp_jitter_ms: game.jitter_ms,
            udp_lost_share: game.lost_share,
            ping_p50_ms: ping.rtt_p50_ms,
            ping_p95_ms: ping.rtt_p95_ms,
        }
    }
}
