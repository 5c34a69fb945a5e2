//! What moves the guest: the product, or QEMU's own migration in its variants.

pub mod native;
