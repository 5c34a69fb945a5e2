//! Images on disk. Today: the source's shadow of pages that are announced and not sent yet.

mod shadow;

pub use shadow::Shadow;
