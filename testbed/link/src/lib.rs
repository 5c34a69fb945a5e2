//! Model of one direction of a network link.
