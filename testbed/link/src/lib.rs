//! Model of one direction of a network link: no I/O, no clock, no dependencies.
//!
//! A [`Link`] takes packets of any type, and gives each back when it would leave the far end:
//!
//! ```text
//! offer -> policer -> [bounded queue] -> [serialiser: rate] -> loss -> delay + jitter + reorder -> poll
//!          optional     tail drop                          behind the queue         + bunching
//! ```
//!
//! Time is an argument, a [`Duration`](std::time::Duration) since any fixed moment; chance comes
//! from a seed. So the same code serves simulated sessions in virtual time and the lab's emulator.
//!
//! Non-goals: more than one queue, queue management other than tail drop, cross traffic,
//! corruption and duplication.
//!
//! ```
//! use std::time::Duration;
//! use testbed_link::{Link, Verdict, named};
//!
//! let mut link = Link::new(named("wan-100m").expect("a known name"), 1).expect("sound parameters");
//! let start = Duration::ZERO;
//! assert_eq!(link.offer(start, 1500, "packet"), Verdict::Queued);
//! let due = link.next_delivery().expect("one packet is under way");
//! assert_eq!(due, Duration::from_micros(25_120)); // 120 us at 100 Mbit/s, then 25 ms
//! assert_eq!(link.poll(due), Some("packet"));
//! ```
//!
//! Reading order: `params.rs`, `link.rs`, `named.rs`, `random.rs`.

#![forbid(unsafe_code)]

mod link;
mod named;
mod params;
mod random;
#[cfg(test)]
mod tests;

pub use link::{Count, Counters, Link, Verdict};
pub use named::{LINKS, NamedLink, named};
pub use params::{LinkParams, Loss, ParamError, Policer};
pub use random::Random;
