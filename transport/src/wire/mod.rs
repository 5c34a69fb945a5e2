//! The bytes between two agents. docs/protocol.md is the spec.

mod frame;
pub mod limits;

pub use frame::*;
