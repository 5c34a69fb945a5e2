//! What a page becomes and what comes back, through the public API only.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "small numbers that the tests made"
)]

mod golden;
mod history;
mod hostile;
mod memory;
mod ownership;
mod references;
mod walks;
