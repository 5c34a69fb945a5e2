//! The phases and the constants of each.

use std::time::{Duration, Instant};

use super::crowd::Crowd;

/// Window gains of a Cruise cycle, one a round: probe, drain, cruise.
pub(super) const CRUISE_GAINS: [f64; 8] = [1.10, 1.10, 0.91, 1.01, 1.01, 1.01, 1.01, 1.01];
/// The same while yielding: a queue that is only ours is not worth having.
pub(super) const YIELD_GAINS: [f64; 8] = [1.05, 1.05, 0.93, 1.01, 1.01, 1.01, 1.01, 1.01];
/// Position in the cycle at whose end a probe is judged: what its first round sent has come back.
pub(super) const PROBE_END: usize = 1;
/// Added to a probe's gain when the one before it found more rate, up to the second number.
pub(super) const PROBE_BOOST: (f64, f64) = (0.2, 0.8);
/// The second number while yielding: the last step's queue is as long as the step.
pub(super) const YIELD_BOOST_MAX: f64 = 0.5;
/// Rate growth that a probe must find to be repeated.
pub(super) const PROBE_GROWTH: f64 = 1.04;
/// Share of the known rate below which, with a long queue, the link is believed to be slower.
pub(super) const SLOWER: f64 = 0.7;
/// Falls of the rate without a calm round in between that are taken for a slower link; what comes
/// after them are others on it.
pub(super) const FALLS_MAX: u32 = 2;
/// Part of the rate before the falls that is claimed from others.
pub(super) const CLAIM: f64 = 0.5;
/// Rounds of stepping back just to see the base again, and how long it may be out of sight.
pub(super) const LOOK_ROUNDS: u32 = 2;
pub(super) const BASE_UNSEEN_MAX: Duration = Duration::from_secs(5);
/// Rounds of a queue beyond its target, soon after a crowded time, that are another one.
pub(super) const CROWDED_AGAIN: u32 = 6;
/// How long the window of a crowded time is worth coming back to.
pub(super) const CROWDED_MEMORY: Duration = Duration::from_secs(20);
pub(super) const STEP_BACK_GAIN: f64 = 0.6;
pub(super) const STEP_BACK_ROUNDS: u32 = 4;
pub(super) const STARTUP_GAIN_MAX: f64 = 2.1;
/// Growth per round that Startup expects, and the rounds without it that end it.
pub(super) const STARTUP_GROWTH: f64 = 1.25;
pub(super) const STARTUP_STALLED_ROUNDS: u32 = 3;
/// A round of fewer packets is one of the handshake, and says nothing of growth.
pub(super) const STARTUP_PACKETS: u32 = 4;
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
/// Trim below which a yielding flow has all but left, and the rounds alike from there on that tell
/// of a longer path; as long, since cubic's queue hardly moves for some seconds.
pub(super) const YIELD_LEFT_TRIM: f64 = 0.3;
pub(super) const YIELD_STEADY_ROUNDS: u32 = 8;
pub(super) const YIELD_STEADY: Duration = Duration::from_secs(12);
/// How long a least round trip time is believed while others hold the queue: what was found
/// without them is the only measure of it.
pub(super) const CROWDED_RTT_WINDOW: Duration = Duration::from_secs(30);
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
    },
    /// Competing with others for the queue.
    Crowded {
        /// The window.
        crowd: Crowd,
        /// When it began.
        since: Instant,
    },
    /// Looking whether the others are gone.
    StepBack {
        /// Rounds so far.
        rounds: u32,
        /// For when they are not; `None` when it only wants to see the base.
        crowd: Option<Crowd>,
    },
}

impl Phase {
    pub(super) const STARTUP: Self = Self::Startup {
        full_rate: 0,
        stalled: 0,
    };

    pub(super) fn cruise(rate: u64, boost: f64) -> Self {
        Self::Cruise {
            position: 0,
            boost,
            rate_before: rate,
        }
    }

    /// How long a least round trip time is believed; longer while others hold the queue.
    pub(super) fn rtt_window(self) -> Duration {
        match self {
            Self::Crowded { .. } | Self::StepBack { .. } => CROWDED_RTT_WINDOW,
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
