//! The driver: UDP socket, keys, congestion control, streams.
//!
//! ```text
//! Endpoint --dial---> Connection --control--> ControlStream (one, both ways, priority 10)
//!          --accept->     |------ lanes ----> 8 LaneSender | LaneReceiver (one way, priority 0)
//!                         |------ urgent ---> UrgentSender | UrgentReceiver (one way, priority 20)
//!                         '------ peer() ---> Fingerprint: the program trusts it, or refuses
//! ```
//!
//! One UDP socket serves both roles; whichever side dials, the guest may go either way. Reading
//! order: `identity`, `tls`, `tuning`, `endpoint`, `connection`, `streams`, `congestion`, `probe`.

pub mod congestion;
mod connection;
pub mod driver;
mod endpoint;
mod error;
mod fingerprint;
mod identity;
pub mod probe;
mod streams;
mod tls;
mod tuning;

pub use congestion::{Mode, Shaping, YIELD_QUEUEING};
pub use connection::{Connection, LinkSample};
pub use endpoint::Endpoint;
pub use error::{CloseCode, QuicError};
pub use fingerprint::{Fingerprint, FingerprintError};
pub use identity::Identity;
pub use streams::{
    ControlReceiver, ControlSender, ControlStream, LaneReceiver, LaneSender, UrgentReceiver,
    UrgentSender,
};
pub use tuning::{Controller, ControllerError, Protocol, Tuning};
