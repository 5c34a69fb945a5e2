//! Real guests: the Debian image, QEMU's command line and monitor, saved states, the self-check.
//!
//! ```text
//! Image::ready ──> Guest::boot ──wait_ready──> State::save ──┐
//!                                                            v
//!                  Guest::incoming  <── migration ──  Guest::restore
//! ```
//! A guest is one QEMU process with two monitors: `product.sock` for the program under test,
//! `lab.sock` for the lab (events and their times); and `control.sock`, a serial line on which the
//! program inside says its counters and checks all its memory on demand.

mod control;
mod image;
mod machine;
mod past;
mod place;
mod process;
mod qmp;
mod ram;
mod state;

pub use control::{Control, Counters, Verified};
pub use image::Image;
pub(crate) use image::{cache_folder, lock};
pub use machine::{Files, GUEST_ADDRESS, GUEST_MAC, GUEST_UUID, Load, MTU, Machine, Network, Ram};
pub use past::{Past, Stay};
pub use place::Place;
pub use process::Guest;
pub use qmp::{Event, Monitor};
pub use ram::{BlockDifference, Bytes, Comparison, compare};
pub use state::State;
