//! Whole sessions in virtual time: both machines and the data plane that ship, over a modelled
//! link, with modelled QEMUs, journals, and operators who run `resolve`.
//!
//! ```text
//! guest -> source_qemu -> source_end (Source, SourceLanes) -> net -> target_end (Target,
//! TargetLanes) -> target_qemu          faults strike anywhere; oracle looks after every event
//! ```
//!
//! `SIM_SEED=7` runs one seed and prints what happened; `SIM_SEEDS=5000` runs more of them.
//!
//! Reading order: sessions (the tests), rules, checks, plan, world, clock, source_end, capture, relay, target_end, lanes, net,
//! source_qemu, target_qemu, journal, faults, errors, operator, oracle.

mod capture;
mod checks;
mod clock;
mod content;
mod errors;
mod faults;
mod journal;
mod lanes;
mod net;
mod operator;
mod oracle;
mod plan;
mod relay;
mod rules;
mod sessions;
mod source_end;
mod source_qemu;
mod target_end;
mod target_qemu;
mod world;
