//! The phases and the constants of each.

use std::time::{Duration, Instant};

/// Window gains of a Cruise cycle, one a round: probe, drain, cruise.
pub(super) const CRUISE_GAINS: [f64; 8] = [1.15, 1.15, 0.92, 1.08, 1.08, 1.08, 1.08, 1.08];
/// The same while yielding: a queue that is only ours is not worth having.
pub(super) const YIELD_GAINS: [f64; 8] = [1.05, 1.05, 0.93, 1.01, 1.01, 1.01, 1.01, 1.01];
/// Position in the cycle at whose end a probe is judged: what its first round sent has come back.
pub(super) const PROBE_END: usize = 1;
/// Added to a probe's gain when the one before it found more rate, up to the second number.
pub(super) const PROBE_BOOST: (f64, f64) = (0.2, 0.8);
/// Rate growth that a probe must find to be repeated.
pub(super) const PROBE_GROWTH: f64 = 1.04;
/// Share of the known rate below which, with a long queue, the link is believed to be slower.
pub(super) const SLOWER: f64 = 0.7;
/// Window gains while others hold the queue.
pub(super) const CROWDED_GAINS: [f64; 8] = [2.5, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0];
/// How long to compete before looking whether the others have left.
pub(super) const CROWDED_FOR: Duration = Duration::from_secs(5);
pub(super) const STEP_BACK_GAIN: f64 = 0.6;
pub(super) const STEP_BACK_ROUNDS: u32 = 4;
pub(super) const STARTUP_GAIN_MAX: f64 = 2.9;
/// Growth per round that Startup expects, and the rounds without it that end it.
pub(super) const STARTUP_GROWTH: f64 = 1.25;
pub(super) const STARTUP_STALLED_ROUNDS: u32 = 3;
/// Loss that ends Startup when the rate does not grow either.
pub(super) const STARTUP_LOSS: f64 = 0.15;
/// Packets of a round that must all be late before Startup believes in a queue.
pub(super) const STARTUP_SAMPLES: u32 = 8;
/// A rate sample is an average over a round that was half full: without this round on the way,
/// Startup overshoots by a whole bdp.
pub(super) const HOLD_GAIN: f64 = 1.25;
pub(super) const DRAIN_GAIN: f64 = 0.75;
pub(super) const DRAIN_ROUNDS: u32 = 3;
/// Trim below which a standing queue is blamed on others.
pub(super) const CROWDED_TRIM: f64 = 0.75;
pub(super) const TRIM_MIN: f64 = 0.5;
/// The same while yielding, where the least rate is the floor.
pub(super) const YIELD_TRIM_MIN: f64 = 0.01;
/// How long a least round trip time is believed while others hold the queue and this flow yields:
/// what it found alone is the only measure of their queue.
pub(super) const YIELD_RTT_WINDOW: Duration = Duration::from_secs(120);
/// Loss above the usual one that is taken for a policer or a full buffer; less is taken for the
/// weather.
pub(super) const CRUISE_LOSS: f64 = 0.08;
/// Rounds after which loss becomes usual: a smaller window has had its time to help by then.
pub(super) const USUAL_LOSS_ROUNDS: f64 = 16.0;

/// What the controller is doing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// Doubling per round.
    Startup {
        /// Rate that counts as the last growth.
        full_rate: u64,
        /// Rounds since.
        stalled: u32,
    },
    /// One round to measure the rate that Startup reached.
    Hold {
        /// Window at its beginning.
        window_max: u64,
    },
    /// Emptying the queue that Startup built.
    Drain {
        /// Rounds so far.
        rounds: u32,
        /// For the first probe of Cruise.
        boost: f64,
    },
    /// Following the link.
    Cruise {
        /// Place in [`CRUISE_GAINS`].
        position: usize,
        /// Added to the probe's gain.
        boost: f64,
        /// Rate when the probe began.
        rate_before: u64,
        /// When the queue was last at its target.
        calm_at: Instant,
    },
    /// Competing with others for the queue.
    Crowded {
        /// Place in [`CROWDED_GAINS`].
        position: usize,
        /// When it began.
        since: Instant,
    },
    /// Looking whether the others are gone.
    StepBack {
        /// Rounds so far.
        rounds: u32,
    },
}

impl Phase {
    pub(super) const STARTUP: Self = Self::Startup {
        full_rate: 0,
        stalled: 0,
    };

    pub(super) fn cruise(now: Instant, rate: u64, boost: f64) -> Self {
        Self::Cruise {
            position: 0,
            boost,
            rate_before: rate,
            calm_at: now,
        }
    }

    /// How long a least round trip time is believed; longer while others hold the queue.
    pub(super) fn rtt_window(self) -> Duration {
        match self {
            Self::Crowded { .. } | Self::StepBack { .. } => Duration::from_secs(30),
            Self::Startup { .. } | Self::Hold { .. } | Self::Drain { .. } | Self::Cruise { .. } => {
                Duration::from_secs(10)
            }
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Startup { .. } => "startup",
            Self::Hold { .. } => "hold",
            Self::Drain { .. } => "drain",
            Self::Cruise { .. } => "cruise",
            Self::Crowded { .. } => "crowded",
            Self::StepBack { .. } => "step-back",
        }
    }
}
