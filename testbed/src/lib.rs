//! The lab: hosts in namespaces, an emulated link between them, an overlay over it, and real guests.
//! It runs the product as a black box, beside QEMU's own migration, and writes reports.
//!
//! Non-goals: it links none of the product's crates, and it knows nothing of their insides.
//!
//! The pieces can be used one by one from a test, without namespaces:
//!
//! ```no_run
//! use testbed::guest::{Guest, Image, Machine, Place};
//! # fn main() -> anyhow::Result<()> {
//! let image = Image::ready(&testbed::progress::Progress::silent())?;
//! let folder = std::path::Path::new("/tmp/example");
//! let source = Guest::boot(Place::Here, &image, &Machine::small(), folder)?;
//! source.wait_ready()?;
//! assert_eq!(source.control()?.verify()?.errors, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Reading order: `cli`, `scenario`, `run`, `arm`, `guest` (image, QEMU, saved state, self-check),
//! `product`, `stores`, `lab` with `host` and `netns`, `wan` (the link), `overlay` with its hook, `probe` (what
//! the user sees), `link_run` (transports alone), `report`, `record` (what guests write).

pub mod arm;
pub mod cli;
pub mod clock;
pub mod guest;
pub mod host;
pub mod internal;
pub mod lab;
pub mod link_run;
pub mod netns;
pub mod overlay;
pub mod pair;
pub mod probe;
pub mod product;
pub mod progress;
pub mod record;
pub mod report;
pub mod requirement;
pub mod run;
pub mod scenario;
mod sparse;
pub mod stores;
pub mod wan;
