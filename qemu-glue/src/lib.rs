//! QEMU's side of Scaleaway. Reading order: `stream` (the migration stream, pure), `qmp` (the
//! monitor), `memory` (which memory of the QEMU process is which RAM block), `disk` (images).

#[cfg(feature = "client")]
pub mod disk;
#[cfg(feature = "client")]
pub mod memory;
#[cfg(feature = "client")]
pub mod qmp;
pub mod stream;
