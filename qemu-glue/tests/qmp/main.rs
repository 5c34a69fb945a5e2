//! The monitor client against a scripted monitor (`fake`) and against a real QEMU (`real`).
//!
//! `QEMU=/path cargo test -p qemu-glue --test qmp` takes another QEMU than `qemu-system-x86_64`.
#![cfg(feature = "client")]

#[cfg(test)]
mod fake;
#[cfg(test)]
mod real;
#[cfg(test)]
mod scratch;
