//! What the operator allows this side's bulk to take of the link, changeable while it flows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Queue that [`Mode::Yield`] allows unless told otherwise.
pub const YIELD_QUEUEING: Duration = Duration::from_millis(5);
/// Least that yielding keeps, as a part of the greatest rate known, and in bit/s.
const RATE_MIN_PART: u64 = 20;
const RATE_MIN_BPS: u64 = 1_000_000;
/// Stands for "no cap".
const NONE: u64 = u64::MAX;
/// IPv4 and UDP headers of a packet: what the operator's rates count and the controller does not.
const HEADER_BYTES: u64 = 28;

/// How to treat others on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Keeps the link full; competes for a fair part when others hold a queue.
    #[default]
    Fill,
    /// Makes room for others, down to the least rate.
    Yield {
        /// Queueing delay (own and others') above which it makes room.
        queueing: Duration,
    },
}

/// Mode and limits of what is sent: a handle. Clones are the same settings, so whoever keeps one
/// can change them during a migration; a connection follows within a round trip.
///
/// Rates are bit/s of IP bytes, as on the command line, counted for full packets over IPv4.
#[derive(Debug, Clone, Default)]
pub struct Shaping(Arc<Settings>);

#[derive(Debug)]
struct Settings {
    /// Budget in microseconds, [`NONE`] in mode fill.
    yield_us: AtomicU64,
    /// 0 is the default.
    rate_min_bps: AtomicU64,
    rate_max_bps: AtomicU64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            yield_us: AtomicU64::new(NONE),
            rate_min_bps: AtomicU64::new(0),
            rate_max_bps: AtomicU64::new(NONE),
        }
    }
}

// Relaxed everywhere: each setting stands alone.
impl Shaping {
    /// Fills or yields from here on. A budget of 0 counts as 1 us.
    pub fn set_mode(&self, mode: Mode) {
        let yield_us = match mode {
            Mode::Fill => NONE,
            Mode::Yield { queueing } => u64::try_from(queueing.as_micros())
                .unwrap_or(NONE - 1)
                .clamp(1, NONE - 1),
        };
        self.0.yield_us.store(yield_us, Ordering::Relaxed);
    }

    /// What it does at present.
    pub fn mode(&self) -> Mode {
        match self.0.yield_us.load(Ordering::Relaxed) {
            NONE => Mode::Fill,
            micros => Mode::Yield {
                queueing: Duration::from_micros(micros),
            },
        }
    }

    /// Least rate in bit/s that yielding keeps; mode fill has no use for it. `None`: a twentieth
    /// of the greatest rate known, at least 1 Mbit/s. Without a least rate a migration beside a
    /// download would never end.
    pub fn set_rate_min(&self, bps: Option<u64>) {
        let bps = bps.map_or(0, |bps| bps.max(1));
        self.0.rate_min_bps.store(bps, Ordering::Relaxed);
    }

    /// The least rate that was set, in bit/s.
    pub fn rate_min(&self) -> Option<u64> {
        Some(self.0.rate_min_bps.load(Ordering::Relaxed)).filter(|bps| *bps > 0)
    }

    /// Greatest rate in bit/s, in both modes; `None`: no cap. Wins over the least rate.
    pub fn set_rate_max(&self, bps: Option<u64>) {
        let bps = bps.map_or(NONE, |bps| bps.clamp(1, NONE - 1));
        self.0.rate_max_bps.store(bps, Ordering::Relaxed);
    }

    /// The cap, in bit/s.
    pub fn rate_max(&self) -> Option<u64> {
        Some(self.0.rate_max_bps.load(Ordering::Relaxed)).filter(|bps| *bps != NONE)
    }

    /// The cap in bytes of UDP payload per second, in packets of `mtu` bytes.
    pub(super) fn bytes_max(&self, mtu: u64) -> Option<u64> {
        self.rate_max().map(|bps| payload(bps, mtu))
    }

    /// What yielding keeps, in bytes of UDP payload per second, where `greatest` is the greatest
    /// rate known.
    pub(super) fn bytes_min(&self, mtu: u64, greatest: u64) -> u64 {
        self.rate_min().map_or_else(
            || (greatest / RATE_MIN_PART).max(payload(RATE_MIN_BPS, mtu)),
            |bps| payload(bps, mtu),
        )
    }
}

fn payload(bps: u64, mtu: u64) -> u64 {
    let bytes = u128::from(bps / 8) * u128::from(mtu) / u128::from(mtu + HEADER_BYTES);
    u64::try_from(bytes)
        .expect("less than the rate, a u64")
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_one_setting() {
        let shaping = Shaping::default();
        let other = shaping.clone();
        assert_eq!(other.mode(), Mode::Fill);
        let mode = Mode::Yield {
            queueing: YIELD_QUEUEING,
        };
        shaping.set_mode(mode);
        assert_eq!(other.mode(), mode);
        other.set_mode(Mode::Fill);
        assert_eq!(shaping.mode(), Mode::Fill);
    }

    #[test]
    fn rates_are_ip_bits_outside_and_payload_inside() {
        let shaping = Shaping::default();
        assert_eq!(shaping.bytes_max(1472), None);
        shaping.set_rate_max(Some(12_000_000));
        assert_eq!(shaping.rate_max(), Some(12_000_000));
        assert_eq!(shaping.bytes_max(1472), Some(1_472_000));
        shaping.set_rate_max(None);
        assert_eq!(shaping.rate_max(), None);

        assert_eq!(shaping.bytes_min(1472, 0), 122_666);
        assert_eq!(shaping.bytes_min(1472, 20_000_000), 1_000_000);
        shaping.set_rate_min(Some(24_000_000));
        assert_eq!(shaping.bytes_min(1472, 20_000_000), 2_944_000);
        assert_eq!(shaping.rate_min(), Some(24_000_000));
    }
}
