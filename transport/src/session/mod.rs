//! Who says what when: one machine per side, the pure pre-copy policy, the rules of settling.
//!
//! ```text
//!  source   Waiting -> Preparing -> Layout -> Precopy -> Stopping -> Draining -> AwaitLoaded
//!             |            |          |          |           |           |            |
//!             +------------+----------+----------+-----------+-----------+------------+--> Returning -> done(stayed)
//!           -> Completing -> Intent ==Commit==> Committed -> Settling -> done(arrived)
//!                   |          |                    |  link lost: asks again (Doubt)
//!                   +----------+--> Returning       +--> Returning only on Refused or NeverRan
//!
//!  target   Waiting -> Preparing -> Receiving -> Loading -> Proving -> Loaded ==Commit==> Committing
//!             |            |            |           |          |          |
//!             +------------+------------+-----------+----------+----------+--> Refusing -> done(stayed)
//!           -> Starting -> Running -> done(arrived)
//! ```
//!
//! Sans-IO: `handle(now, Input)`, then drain `poll_action()` until `None`; `poll_timeout()` says when
//! to call `handle` with [`Input::Timer`](source::Input::Timer) next. docs/handover.md is the spec.

mod greeting;
mod precopy;
pub mod probe;
mod settle;
pub mod source;
pub mod target;

pub use greeting::{Agreed, greet};
pub use precopy::{
    Decision, Observation, Policy, RateMeter, Steering, Stuck, WhenStuck, WhenStuckError, decide,
};
pub use settle::{Next, Side, settle};

use crate::wire::AbortCode;

/// How an attempt ended; the same word in both reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The target has the guest.
    Arrived,
    /// The source has the guest.
    Stayed {
        /// Why, for the operator.
        code: AbortCode,
        /// Text for the operator.
        detail: String,
    },
    /// Commit may have been sent and no durable answer came.
    Doubt {
        /// What is missing.
        detail: String,
    },
}

/// How QEMU's migration status reads; what we do not use is `Other`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmMigration {
    /// Anything on the way (`setup`, `active`, `device`, ...).
    Other,
    /// The migration is complete at this QEMU.
    Completed,
    /// It failed or was cancelled.
    Failed(String),
}

/// How QEMU can be kept in pre-copy until the engine says stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Withheld SWITCHOVER_ACK (QEMU 8.1 and later).
    SwitchoverAck,
    /// `max-bandwidth` follows the link; QEMU's own arithmetic decides the stop (QEMU 7.2).
    Starvation,
}
