//! The two session machines alone: their transitions as a table, and what no sequence of inputs
//! may bring about.

mod inputs;
mod places;
mod table;
mod walks;
