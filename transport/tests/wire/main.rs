//! The bytes of control frames and lanes, through the public API only.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod any_frame;
mod codec;
mod corpus;
mod golden;
mod lane;
mod spec;
