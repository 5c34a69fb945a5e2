//! The links that scenarios and reports know by name.

use std::time::Duration;

use crate::params::bytes_in;
use crate::{LinkParams, Loss};

/// A named link; both directions are alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NamedLink {
    /// Its name in scenarios and reports.
    pub name: &'static str,
    /// Bits per second of IP bytes, each way.
    pub rate_bps: u64,
    /// Round-trip time without queueing and jitter, split evenly.
    pub rtt: Duration,
    /// Loss behind the queue, each way.
    pub loss: Loss,
    /// Greatest added delay, each way, in order.
    pub jitter: Duration,
    /// Buffer as time at `rate_bps`, each way.
    pub buffer: Duration,
}

/// Every named link.
pub const LINKS: [NamedLink; 9] = [
    link("lan-500m", 500, 200, Loss::None),
    link("metro-500m", 500, 20_000, Loss::Random { share: 0.001 }),
    link("wan-100m", 100, 50_000, Loss::None),
    link("wan-100m-demo", 100, 50_000, Loss::Random { share: 0.005 }),
    link("wan-100m-lossy", 100, 50_000, Loss::Random { share: 0.01 }),
    link("dsl-20m", 20, 100_000, Loss::Random { share: 0.005 }),
    NamedLink {
        buffer: Duration::from_millis(500),
        ..link("bloat-50m", 50, 30_000, Loss::None)
    },
    link(
        "burst-200m",
        200,
        80_000,
        Loss::Bursts {
            share: 0.02,
            mean_packets: 10.0,
        },
    ),
    NamedLink {
        jitter: Duration::from_millis(12),
        ..link("jitter-40m", 40, 50_000, Loss::None)
    },
];

/// The parameters of each direction of the link called `name`.
#[must_use]
pub fn named(name: &str) -> Option<LinkParams> {
    LINKS
        .iter()
        .find(|link| link.name == name)
        .map(NamedLink::params)
}

impl NamedLink {
    /// The parameters of each direction.
    #[must_use]
    pub fn params(&self) -> LinkParams {
        LinkParams {
            jitter: self.jitter,
            buffer_bytes: bytes_in(self.rate_bps, self.buffer),
            loss: self.loss,
            ..LinkParams::clean(self.rate_bps, self.rtt / 2)
        }
    }
}

/// A link without jitter whose buffer is one bandwidth-delay product, at least 5 ms.
const fn link(name: &'static str, rate_mbps: u64, rtt_us: u64, loss: Loss) -> NamedLink {
    let buffer_us = if rtt_us > 5_000 { rtt_us } else { 5_000 };
    NamedLink {
        name,
        rate_bps: rate_mbps * 1_000_000,
        rtt: Duration::from_micros(rtt_us),
        loss,
        jitter: Duration::ZERO,
        buffer: Duration::from_micros(buffer_us),
    }
}
