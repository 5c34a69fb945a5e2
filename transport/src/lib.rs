//! Scaleaway's wire protocol and transfer engine.
//!
//! Knows images, blocks and peers; knows nothing of QEMU. `block`, `wire` and `session` are
//! sans-IO: no socket, no file, no clock, no thread; time is an argument. Reading order: `block`
//! (what a page becomes), `wire` (the bytes), `session` (who says what when), `quic` (the driver).

pub mod block;
#[cfg(feature = "quic")]
pub mod quic;
pub mod session;
#[cfg(feature = "quic")]
pub mod store;
pub mod wire;
