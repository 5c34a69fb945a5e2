//! `scaleaway plan`: what a move would be like, found out before it begins.
//!
//! ```text
//! link     (probe of the target that waits)  -+
//! sample   (some of the guest's memory)       +-> cost (the engine's encoder) -+
//! dirtying (how the sample changes)           |                                +-> model -> page
//! history  (earlier moves)                   -+--------------------------------+
//! ```
//! `run` has the order of things; `model` is a pure function and says how a move is predicted, `ending` how one
//! that does not converge ends.

pub(crate) mod cost;
pub(crate) mod dirtying;
pub(crate) mod ending;
pub(crate) mod history;
pub(crate) mod link;
pub(crate) mod model;
pub(crate) mod noted;
pub(crate) mod page;
pub(crate) mod run;
pub(crate) mod sample;
mod stop;

/// A page count or number as an index.
fn index(number: u32) -> usize {
    usize::try_from(number).expect("usize holds 32 bits, see transport::block")
}
