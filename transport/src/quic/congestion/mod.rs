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
//!  |                                       queue gone                  |
//!  |                                            |        window trimmed, queue stays: others
//!  |                                        StepBack <--- 5 s ---      v   hold it
//!  |                                            '---- queue stays --> Crowded
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
//! Reading order: `machine` (what happens when), `phase` (its constants), `path` (what is known of
//! the path), `rounds` (a round's sums), `flight` (delivery rate from marks), `filters`,
//! `shaping` (what the operator allows), `controller` (the quinn side), `simulation` and `tests` (what it makes of links).

mod controller;
mod filters;
mod flight;
mod machine;
mod path;
mod phase;
mod rounds;
mod shaping;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use controller::{Scaleaway, ScaleawayConfig};
pub use machine::Machine;
pub use shaping::{Mode, Shaping, YIELD_QUEUEING};

use std::time::Duration;

/// What the controller knows of the path. `None` is not yet measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Greatest delivery rate of the last 10 rounds, in bytes of UDP payload per second.
    pub rate_bytes_per_s: Option<u64>,
    /// Least round trip time of a packet in the last 10 s (30 s while others hold the queue).
    pub rtt_min: Option<Duration>,
    /// Queue of the last round.
    pub queueing: Option<Duration>,
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
