//! The stream's first bytes: header, configuration section, its subsections.
//!
//! ```text
//! be32 "QEVM" | be32 3 | 07 | be32 n, n bytes machine type | subsection*
//! subsection: 05 | u8 n, n bytes name | be32 version | body
//! ```

use super::cursor::{Cursor, Stop, shown};
use super::{MAGIC, StreamError, TYPE_CONFIGURATION, TYPE_SUBSECTION, VERSION};

/// Longest machine type name that is believed.
const MACHINE_NAME_MAX: u32 = 1024;
/// Most capabilities that a source can list (QEMU 10 has 24 in all).
const CAPABILITIES_MAX: u32 = 256;
/// Binary logarithm of the page size.
const PAGE_BITS: u32 = 12;

/// Header and machine type.
pub(super) fn start(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    let (magic, version) = (cursor.u32()?, cursor.u32()?);
    if (magic, version) != (MAGIC, VERSION) {
        return Err(StreamError::NotAStream { magic, version }.into());
    }
    let kind = cursor.u8()?;
    if kind != TYPE_CONFIGURATION {
        return Err(StreamError::SectionType(kind).into());
    }
    let length = cursor.u32()?;
    if length > MACHINE_NAME_MAX {
        return Err(StreamError::HeadTooLarge {
            max: MACHINE_NAME_MAX as usize,
        }
        .into());
    }
    cursor.take(length as usize)?;
    Ok(())
}

/// One subsection, from its type byte on.
pub(super) fn subsection(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    let kind = cursor.u8()?;
    if kind != TYPE_SUBSECTION {
        return Err(StreamError::SectionType(kind).into());
    }
    let name = cursor.name()?;
    let version = cursor.u32()?;
    match (name, version) {
        (b"configuration/target-page-bits", 1) => match cursor.u32()? {
            PAGE_BITS => {}
            bits => return Err(StreamError::UnsupportedPageSize { bits }.into()),
        },
        (b"configuration/uuid", 1) => {
            cursor.take(16)?;
        }
        (b"configuration/capabilities", 1) => capabilities(cursor)?,
        _ => return Err(StreamError::UnsupportedConfiguration { name: shown(name) }.into()),
    }
    Ok(())
}

/// Only capabilities that change what is in the stream are listed: `x-ignore-shared` leaves memory
/// out, `mapped-ram` moves it into a file. None is supported, so the list must be empty.
fn capabilities(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    let count = cursor.u32()?;
    if count > CAPABILITIES_MAX {
        return Err(StreamError::HeadTooLarge {
            max: CAPABILITIES_MAX as usize,
        }
        .into());
    }
    if count > 0 {
        let name = shown(cursor.name()?);
        return Err(StreamError::UnsupportedCapability { name }.into());
    }
    Ok(())
}
