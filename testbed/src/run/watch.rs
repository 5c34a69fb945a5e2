//! What the user sees of the guest: its pings and its reading of the counter, through the overlay.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::figures;
use crate::clock;
use crate::lab::Lab;
use crate::overlay::GUEST_ADDRESS;
use crate::probe::{CounterLog, CounterProbe, PingLog, PingProbe};

const PING_INTERVAL: Duration = Duration::from_millis(20);
const COUNTER_PORT: u16 = 7000;
/// First packet to the guest: ARP, learning in three bridges.
const REACHED_MAX: Duration = Duration::from_secs(15);

/// Both probes at work.
#[derive(Debug)]
pub(super) struct Watch {
    ping: PingProbe,
    counter: CounterProbe,
}

/// All that they saw.
#[derive(Debug)]
pub(super) struct Watched {
    ping: PingLog,
    counter: CounterLog,
}

/// Figures for the report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// Between two answers, late ones too.
    pub(super) longest_gap_ms: Option<f64>,
    /// Between two answers in good time.
    pub(super) outage_ms: Option<f64>,
    pub(super) late: Option<u64>,
    pub(super) lost: Option<u64>,
    pub(super) added_p95_ms: Option<f64>,
    pub(super) resets: Option<u64>,
}

impl Watch {
    /// Starts both; returns once the user reaches the guest.
    pub(super) fn start(lab: &Lab, program: &Path) -> anyhow::Result<Self> {
        let address: SocketAddr = format!("{GUEST_ADDRESS}:{COUNTER_PORT}")
            .parse()
            .context("the guest's address")?;
        let counter = CounterProbe::start(&lab.user, address, program)?;
        clock::wait_until("the guest's counter at the user", REACHED_MAX, || {
            Ok((!counter.so_far().samples.is_empty()).then_some(()))
        })?;
        let ping = PingProbe::start(&lab.user, GUEST_ADDRESS, PING_INTERVAL)?;
        Ok(Self { ping, counter })
    }

    /// Ends both.
    pub(super) fn stop(self) -> anyhow::Result<Watched> {
        Ok(Watched {
            ping: self.ping.stop()?,
            counter: self.counter.stop()?,
        })
    }
}

impl Watched {
    /// See `figures`.
    pub(super) fn writes_share_after(
        &self,
        before: (u64, u64),
        resumed_us: u64,
        completed_us: u64,
    ) -> Option<f64> {
        figures::writes_share_after(&self.counter, before, resumed_us, completed_us)
    }

    /// Figures of a move that was observed from `observed_from_us`, started, stopped the guest
    /// (or never did) and was watched to the end.
    pub(super) fn seen(
        &self,
        observed_from_us: u64,
        started_us: u64,
        stopped_us: u64,
        until_us: u64,
    ) -> Seen {
        let before = self.ping.span(observed_from_us, started_us);
        let moving = self.ping.span(started_us, stopped_us);
        let whole = self.ping.span(started_us, until_us);
        let added = moving
            .rtt_p95_ms
            .zip(before.rtt_p50_ms)
            .map(|(p95, p50)| p95 - p50);
        Seen {
            longest_gap_ms: whole.longest_gap_ms,
            outage_ms: whole.outage_ms,
            late: (whole.sent > 0).then_some(whole.late),
            lost: (whole.sent > 0).then_some(whole.lost),
            added_p95_ms: added,
            resets: (self.counter.samples.len() > 1)
                .then(|| self.counter.resets() + self.counter.breaks()),
        }
    }
}
