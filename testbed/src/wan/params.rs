//! The parameters of a link as JSON: in reports and in requests to the emulator.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use testbed_link::{LinkParams, Loss, Policer};

/// All parameters of one direction. Times in ms, rates in bit/s of IP bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkJson {
    /// Bits per second of IP bytes.
    pub rate_bps: u64,
    /// One-way delay.
    pub delay_ms: f64,
    /// Greatest added delay.
    #[serde(default)]
    pub jitter_ms: f64,
    /// Whether jitter may reorder.
    #[serde(default)]
    pub jitter_reorders: bool,
    /// Tail-drop buffer.
    pub buffer_bytes: u64,
    /// Share of packets lost behind the queue.
    #[serde(default)]
    pub loss_share: f64,
    /// Mean packets lost in a row; 0 means that each is lost by itself.
    #[serde(default)]
    pub loss_burst_packets: f64,
    /// Share of packets held back.
    #[serde(default)]
    pub reorder_share: f64,
    /// For how long.
    #[serde(default)]
    pub reorder_by_ms: f64,
    /// Packets come out together at multiples of this time.
    #[serde(default)]
    pub bunch_every_ms: f64,
    /// Rate of a token bucket before the queue; 0: none.
    #[serde(default)]
    pub policer_bps: u64,
    /// Its burst.
    #[serde(default)]
    pub policer_burst_bytes: u64,
}

impl From<&LinkParams> for LinkJson {
    fn from(params: &LinkParams) -> Self {
        let (loss_share, loss_burst_packets) = match params.loss {
            Loss::None => (0.0, 0.0),
            Loss::Random { share } => (share, 0.0),
            Loss::Bursts {
                share,
                mean_packets,
            } => (share, mean_packets),
        };
        Self {
            rate_bps: params.rate_bps,
            delay_ms: millis(params.delay),
            jitter_ms: millis(params.jitter),
            jitter_reorders: params.jitter_reorders,
            buffer_bytes: params.buffer_bytes,
            loss_share,
            loss_burst_packets,
            reorder_share: params.reorder_share,
            reorder_by_ms: millis(params.reorder_by),
            bunch_every_ms: millis(params.bunch_every),
            policer_bps: params.policer.map_or(0, |policer| policer.rate_bps),
            policer_burst_bytes: params.policer.map_or(0, |policer| policer.burst_bytes),
        }
    }
}

impl TryFrom<LinkJson> for LinkParams {
    type Error = anyhow::Error;

    fn try_from(json: LinkJson) -> Result<Self, Self::Error> {
        let loss = match json.loss_share {
            0.0 => Loss::None,
            share if json.loss_burst_packets == 0.0 => Loss::Random { share },
            share => Loss::Bursts {
                share,
                mean_packets: json.loss_burst_packets,
            },
        };
        let params = Self {
            rate_bps: json.rate_bps,
            delay: time("delay_ms", json.delay_ms)?,
            jitter: time("jitter_ms", json.jitter_ms)?,
            jitter_reorders: json.jitter_reorders,
            buffer_bytes: json.buffer_bytes,
            loss,
            reorder_share: json.reorder_share,
            reorder_by: time("reorder_by_ms", json.reorder_by_ms)?,
            bunch_every: time("bunch_every_ms", json.bunch_every_ms)?,
            policer: (json.policer_bps > 0).then_some(Policer {
                rate_bps: json.policer_bps,
                burst_bytes: json.policer_burst_bytes,
            }),
        };
        params.check()?;
        Ok(params)
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn time(field: &str, value_ms: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(value_ms / 1e3)
        .map_err(|error| anyhow::anyhow!("{field} = {value_ms}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every named link survives the way through JSON.
    #[test]
    fn named_links_survive_json() {
        for link in testbed_link::LINKS {
            let text = serde_json::to_string(&LinkJson::from(&link.params())).unwrap();
            let json: LinkJson = serde_json::from_str(&text).unwrap();
            assert_eq!(LinkParams::try_from(json).unwrap(), link.params(), "{text}");
        }
    }

    /// A negative time is refused by name.
    #[test]
    fn negative_time_is_refused() {
        let link = testbed_link::named("wan-100m").unwrap();
        let json = LinkJson {
            delay_ms: -1.0,
            ..LinkJson::from(&link)
        };
        let error = LinkParams::try_from(json).unwrap_err().to_string();
        assert!(error.starts_with("delay_ms = -1"), "{error}");
    }
}
