//! One file per verb; `moving` has the options that `send` and `plan` share.

pub(crate) mod bench_engine;
pub(crate) mod bench_link;
pub(crate) mod checkpoint;
pub(crate) mod content;
pub(crate) mod identity;
mod moving;
pub(crate) mod plan;
pub(crate) mod receive;
pub(crate) mod resolve;
pub(crate) mod send;
pub(crate) mod set;
pub(crate) mod status;
pub(crate) mod trust;
