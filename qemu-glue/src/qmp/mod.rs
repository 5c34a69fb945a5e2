//! Client of QEMU's monitor protocol (QMP), typed for the commands and events that we use.
//!
//! ```text
//! Client (clone)  --request-->  monitor task, owner of the socket  <--lines-->  QEMU
//! EventReceiver   <--events---        | codec: bytes -> messages (pure)
//! ```
//!
//! Reading order: [`codec`] (pure), `monitor` (the task), [`client`], [`commands`], [`events`],
//! [`names`] (closed sets of names with a place for the unknown), [`process`] (which process is it?),
//! `kept` (a connection that outlives its client).
//!
//! Promises, each with a test: a monitor that dies is an error for every pending and later call and
//! a last event, never a hang; a reply that does not come in time is [`QmpError::Timeout`], and says
//! that the command may still run; events are never lost in silence (a full queue breaks the
//! monitor); what QEMU sends is bounded by [`codec::LINE_MAX_BYTES`] per line and never panics.
//! //= qemu docs/interop/qmp-spec.rst

pub mod client;
pub mod codec;
pub mod commands;
pub(crate) mod descriptors;
mod error;
pub mod events;
mod kept;
mod monitor;
pub mod names;
pub mod process;
mod socket;

pub use client::{Client, EventReceiver, Options};
pub use codec::{CodecError, Greeting, Timestamp, Version};
pub use commands::{MigrationInfo, MigrationParameters, RamStatistics, VmStatus};
pub use error::{CloseReason, QmpError};
pub use events::{Event, EventKind};
pub use names::{Capability, MigrationStatus, RunState};
pub use process::{ProcessError, ProcessId};
