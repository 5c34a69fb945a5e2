//! Our congestion controller: fills the link, keeps its queue short, ignores random loss.
//!
//! Quinn's cubic and newreno get 3 % of a link with 1 % loss; its bbr floods every buffer. This one
//! keeps a model of the path (delivery rate, base round trip time) and sets the window to little
//! more than one bandwidth-delay product (bdp), so that arriving acknowledgements clock the flow.
//! Quinn paces at `1.25 * window / rtt`, and nothing else, so the window is also the rate: the two
//! bdp of a BBR would send at 2.5 times the link.
//!
//! ```text
//!           rtt rises, checked per ACK                1 round
//! Startup ----------------------------> Hold ----------------------> Drain <- 3 rounds at most
//!  | ^  '----- rate stops growing, or heavy loss ----------------->    |
//!  | |                                                        queue <= target
//!  | '-- persistent congestion (from everywhere)                      v
//!  |                                            .------------------> Cruise
//!  |                                       queue gone                 |  ^
//!  |                                            |       trimmed, queue stays, or
//!  |                                        StepBack <-- base not seen for 5 s
//!  |                                         ^     '----- queue stays ---> Crowded
//!  |                                         '-- at a dip of the queue, 4 to 32 s --'
//! ```
//!
//! Words: a **round** ends when a packet sent after its start is acknowledged; the **base** is the
//! least *mean* round trip time of a round in 10 s (the least of single packets spirals down to a
//! fifth of the link under jitter); the **queue** is what two rounds in a row have above the base;
//! **target** is the queue that is allowed; **trim** scales the window down while the queue is
//! above it.
//!
//! Three rules keep a false queue from starving the flow. What only one round sees is a host's nap,
//! not a queue. Jitter, measured as the usual distance of a round's mean from its least, is added
//! to the base and to the target. And a rate that our own window allowed does not displace a
//! greater one that the link has shown before.
//!
//! Fairness: two flows of ours come to equal shares, since the smaller one may keep more of a queue
//! than the larger one, and is the last to make room; both look for the base together, at the dips
//! that the other one makes. A queue that stays although this flow makes room is held by others:
//! then the window follows cubic's curve (`crowd`), unless the operator wants it to yield.
//!
//! Reading order: `machine` (what happens when), `cruise` and `window` (the rest of it), `phase`
//! (its constants), `path` (what is known of the path), `crowd` (the window while others hold the
//! queue), `rounds` (a round's sums), `recent` (what is reported), `flight` (delivery rate from
//! marks), `filters`, `shaping` (what the operator allows), `controller` (the quinn side),
//! `simulation`, `rival`, `tests` and `matrix` (what it makes of links).

mod controller;
mod crowd;
mod cruise;
mod filters;
mod flight;
mod machine;
#[cfg(test)]
mod matrix;
mod path;
mod phase;
mod recent;
#[cfg(test)]
mod rival;
mod rounds;
mod shaping;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod window;

pub use controller::{Scaleaway, ScaleawayConfig};
pub use machine::Machine;
pub use shaping::{Mode, Shaping, YIELD_QUEUEING};

use std::time::Duration;

/// What the controller knows of the path. `None` is not yet measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Greatest delivery rate of the last 10 rounds, in bytes of UDP payload per second.
    pub rate_bytes_per_s: Option<u64>,
    /// Tenth and ninetieth percentile of the last 64 rounds' rates in which data never ran out.
    pub rate_low_bytes_per_s: Option<u64>,
    /// See there.
    pub rate_high_bytes_per_s: Option<u64>,
    /// Least round trip time of a packet in the last 10 s (30 s while others hold the queue).
    pub rtt_min: Option<Duration>,
    /// Queue of the last round.
    pub queueing: Option<Duration>,
    /// Median of the last 64 rounds' queues.
    pub queueing_p50: Option<Duration>,
    /// 95th percentile of them.
    pub queueing_p95: Option<Duration>,
    /// Name of the phase, for logs.
    pub phase: &'static str,
}

/// Product of a rate and a time in bytes, the rest cut off.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "float to integer casts saturate; no rate or time is negative"
)]
fn scaled(bytes: u64, factor: f64) -> u64 {
    (bytes as f64 * factor) as u64
}
