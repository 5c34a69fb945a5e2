//! The scaleaway program.
fn main() {}
