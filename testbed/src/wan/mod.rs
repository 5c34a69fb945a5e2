//! The link between cloud and client: an emulator between two packet sockets.
//!
//! ```text
//! site side (cloud, user) -- port "site" --> Link: to_client --> port "far" -- client
//!                         <----------------  Link: to_cloud  <--
//! ```
//!
//! The emulator is a process of its own (`testbed __wan`) in a middle namespace, so that it keeps
//! time whatever the rest of the lab does. It answers on a datagram socket: [`Wan`] is the client.
//!
//! Reading order: `params` (JSON of a link), `port` (packet socket), `emulator` (the loop),
//! `control` (requests and counters).

mod control;
mod emulator;
mod params;
mod port;

pub use control::{DirectionCounters, Request, Wan, WanCounters};
pub use emulator::{Settings, run};
pub use params::LinkJson;
pub(crate) use port::Port;
