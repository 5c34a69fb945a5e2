//! One file per verb.

pub(crate) mod bench_link;
pub(crate) mod identity;
pub(crate) mod receive;
pub(crate) mod resolve;
pub(crate) mod send;
pub(crate) mod status;
pub(crate) mod trust;
