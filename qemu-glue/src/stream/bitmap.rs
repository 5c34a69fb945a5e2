//! The body of a `dirty-bitmap` section, understood only as far as its length.
//!
//! ```text
//! chunk: u8 flags [u8 n, n device name] [u8 n, n bitmap name]
//!   START    be32 granularity, u8 flags
//!   COMPLETE nothing
//!   BITS     be64 first sector, be32 sectors [be64 n, n bytes, unless ZEROES]
//!   EOS      the section ends with this chunk
//! ```

use super::StreamError;
use super::cursor::{Cursor, Stop};

const EOS: u8 = 0x01;
const ZEROES: u8 = 0x02;
const BITMAP_NAME: u8 = 0x04;
const DEVICE_NAME: u8 = 0x08;
const START: u8 = 0x10;
const COMPLETE: u8 = 0x20;
const BITS: u8 = 0x40;
const EXTRA_FLAGS: u8 = 0x80;

/// What follows a chunk's own fields.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Bytes of bitmap that belong to it.
    pub(super) data_bytes: u64,
    /// The section ends after them.
    pub(super) last: bool,
}

/// Reads a chunk up to its bitmap bytes. The order of the tests is that of QEMU's loader.
pub(super) fn read_chunk(cursor: &mut Cursor<'_>) -> Result<Chunk, Stop> {
    let flags = cursor.u8()?;
    if flags & EXTRA_FLAGS != 0 {
        return Err(StreamError::UnsupportedBitmapChunk { flags }.into());
    }
    if flags & DEVICE_NAME != 0 {
        cursor.name()?;
    }
    if flags & BITMAP_NAME != 0 {
        cursor.name()?;
    }
    let mut data_bytes = 0;
    if flags & START != 0 {
        cursor.u32()?;
        cursor.u8()?;
    } else if flags & COMPLETE == 0 && flags & BITS != 0 {
        cursor.u64()?;
        cursor.u32()?;
        if flags & ZEROES == 0 {
            data_bytes = cursor.u64()?;
        }
    }
    Ok(Chunk {
        data_bytes,
        last: flags & EOS != 0,
    })
}
