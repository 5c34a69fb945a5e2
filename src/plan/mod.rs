//! What a move would be like, found out before it begins.

pub(crate) mod link;
