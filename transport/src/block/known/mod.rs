//! Pages that the target holds outside the image, in disk images that it shares with this peer: named
//! by the number that the target gave.

mod table;

use bytes::{BufMut, BytesMut};

pub use table::KnownTable;

/// Bytes of one run's reference: number of its first page, the others follow.
pub(super) const REFERENCE_BYTES: usize = 4;

pub(super) fn put(number: u32, out: &mut BytesMut) {
    out.put_u32(number);
}

pub(super) fn parse(bytes: [u8; REFERENCE_BYTES]) -> u32 {
    u32::from_be_bytes(bytes)
}
