//! What a link is like: plain data, checked once.

use std::time::Duration;

/// How packets get lost behind the queue.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// None is lost.
    None,
    /// Each packet by itself, with this probability (0..=1).
    Random {
        /// Share of packets lost.
        share: f64,
    },
    /// Gilbert-Elliott: a good state that loses nothing and a bad one that loses everything.
    Bursts {
        /// Share of packets lost over a long time (0..1).
        share: f64,
        /// Mean number of packets lost in a row (at least 1; lengths are geometric).
        mean_packets: f64,
    },
}

/// Parameters of one direction of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkParams {
    /// Bits per second of IP bytes (1 to 10^12).
    pub rate_bps: u64,
    /// One-way delay behind the queue (at most 60 s).
    pub delay: Duration,
    /// Greatest delay added to `delay` (at most 60 s).
    pub jitter: Duration,
    /// False: in order; the added delay is redrawn once per `jitter` of time, so packets stall
    /// and then arrive bunched, as on a radio link. True: redrawn for each packet, which reorders.
    pub jitter_reorders: bool,
    /// Bytes that may wait, the packet being sent included; what does not fit is dropped.
    /// An empty queue takes one packet of any size.
    pub buffer_bytes: u64,
    /// Loss behind the queue: a lost packet has used its share of the rate.
    pub loss: Loss,
    /// Share of packets that are held back by `reorder_by`, so that others overtake them (0..=1).
    pub reorder_share: f64,
    /// How long a reordered packet is held back (at most 60 s).
    pub reorder_by: Duration,
    /// Packets come out only at multiples of this time, together, as radio links and offloading
    /// cards let them; zero: each at its own time (at most 60 s).
    pub bunch_every: Duration,
    /// Drops what is too much before the queue, instead of letting it wait.
    pub policer: Option<Policer>,
}

/// A token bucket without a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policer {
    /// Bits per second of IP bytes that pass (1 to 10^12).
    pub rate_bps: u64,
    /// Bytes that pass at once after a pause.
    pub burst_bytes: u64,
}

/// A parameter outside its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamError {
    /// The field, with its range.
    pub field: &'static str,
}

impl std::fmt::Display for ParamError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "link parameter out of range: {}", self.field)
    }
}

impl std::error::Error for ParamError {}

const TIME_MAX: Duration = Duration::from_secs(60);
const RATE_MAX_BPS: u64 = 1_000_000_000_000;

impl LinkParams {
    /// A clean link of `rate_bps` with the one-way `delay` and the buffer that the named links
    /// have: one bandwidth-delay product (of both ways), at least 5 ms.
    #[must_use]
    pub fn clean(rate_bps: u64, delay: Duration) -> Self {
        let buffer_time = (2 * delay).max(Duration::from_millis(5));
        Self {
            rate_bps,
            delay,
            jitter: Duration::ZERO,
            jitter_reorders: false,
            buffer_bytes: bytes_in(rate_bps, buffer_time),
            loss: Loss::None,
            reorder_share: 0.0,
            reorder_by: Duration::ZERO,
            bunch_every: Duration::ZERO,
            policer: None,
        }
    }

    /// Are all fields within their ranges?
    ///
    /// # Errors
    /// Names the first field that is not.
    pub fn check(&self) -> Result<(), ParamError> {
        let loss_is_sound = match self.loss {
            Loss::None => true,
            Loss::Random { share } => is_share(share),
            Loss::Bursts {
                share,
                mean_packets,
            } => is_share(share) && share < 1.0 && mean_packets.is_finite() && mean_packets >= 1.0,
        };
        let checks = [
            (
                (1..=RATE_MAX_BPS).contains(&self.rate_bps),
                "rate_bps (1 to 10^12)",
            ),
            (self.delay <= TIME_MAX, "delay (at most 60 s)"),
            (self.jitter <= TIME_MAX, "jitter (at most 60 s)"),
            (self.reorder_by <= TIME_MAX, "reorder_by (at most 60 s)"),
            (self.bunch_every <= TIME_MAX, "bunch_every (at most 60 s)"),
            (
                self.policer
                    .is_none_or(|policer| (1..=RATE_MAX_BPS).contains(&policer.rate_bps)),
                "policer (1 to 10^12 bit/s)",
            ),
            (is_share(self.reorder_share), "reorder_share (0 to 1)"),
            (
                loss_is_sound,
                "loss (share 0 to 1, bursts of 1 packet or more)",
            ),
        ];
        match checks.iter().find(|(sound, _)| !sound) {
            Some((_, field)) => Err(ParamError { field }),
            None => Ok(()),
        }
    }
}

/// Bytes that `rate_bps` carries in `time`, at most `u64::MAX`.
#[must_use]
pub(crate) fn bytes_in(rate_bps: u64, time: Duration) -> u64 {
    let bits_e9 = u128::from(rate_bps).saturating_mul(time.as_nanos());
    u64::try_from(bits_e9 / 8_000_000_000).unwrap_or(u64::MAX)
}

fn is_share(value: f64) -> bool {
    (0.0..=1.0).contains(&value)
}
