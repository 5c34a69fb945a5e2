//! The body of a ram section: block list and page records.
//!
//! ```text
//! record: be64 offset|flags, then by flag
//!   MEM_SIZE  offset = bytes of all blocks; { u8 n, n name, be64 bytes }*      (START only)
//!   PAGE      [u8 n, n name] 4096 bytes
//!   ZERO      [u8 n, n name] u8 0
//!   XBZRLE    [u8 n, n name] u8 1, be16 n, n bytes
//!   MULTIFD_FLUSH, EOS        nothing
//! ```
//!
//! The name is left out with CONTINUE: same block as the record before, in an earlier section too.

use std::collections::BTreeMap;

use super::cursor::{Cursor, Stop};
use super::{
    PAGE_SIZE, PAGE_SIZE_U64, RAM_CONTINUE, RAM_EOS, RAM_MEM_SIZE, RAM_MULTIFD_FLUSH, RAM_PAGE,
    RAM_XBZRLE, RAM_ZERO, RamBlock, StreamError,
};

/// Marks the only encoding that XBZRLE records have.
const XBZRLE_ENCODING: u8 = 1;

/// The source's blocks, and the block that CONTINUE means.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    list: Vec<RamBlock>,
    by_name: BTreeMap<String, u16>,
    last: Option<u16>,
}

/// One record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// The block list follows; this many bytes in all.
    BlockList {
        bytes: u64,
    },
    Page {
        block: u16,
        page: u32,
        content: &'a [u8; PAGE_SIZE],
    },
    Zero {
        block: u16,
        page: u32,
    },
    Xbzrle {
        block: u16,
        page: u32,
        encoded: &'a [u8],
    },
    MultifdFlush,
    EndOfSection,
}

impl Blocks {
    pub(super) fn list(&self) -> &[RamBlock] {
        &self.list
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Reads one entry of the block list and returns what is left of `bytes_left` after it.
    pub(super) fn read_entry(
        &mut self,
        cursor: &mut Cursor<'_>,
        bytes_left: u64,
        blocks_max: u16,
    ) -> Result<u64, Stop> {
        let wrong = |what| Stop::Wrong(StreamError::Blocks(what));
        let name = cursor.name()?;
        let bytes = cursor.u64()?;
        if name.is_empty() {
            return Err(wrong("a block without a name"));
        }
        let name = std::str::from_utf8(name).map_err(|_| wrong("a name that is not text"))?;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE_U64) {
            return Err(wrong("a size that is not a multiple of the page size"));
        }
        let left = bytes_left
            .checked_sub(bytes)
            .ok_or(wrong("blocks larger than their total"))?;
        let pages = u32::try_from(bytes / PAGE_SIZE_U64).map_err(|_| wrong("a block too large"))?;
        let index = u16::try_from(self.list.len()).map_err(|_| wrong("too many blocks"))?;
        if index >= blocks_max {
            return Err(wrong("too many blocks"));
        }
        if self.by_name.insert(name.to_owned(), index).is_some() {
            return Err(wrong("two blocks of one name"));
        }
        self.list.push(RamBlock {
            name: name.to_owned(),
            pages,
        });
        Ok(left)
    }

    /// Reads one record.
    pub(super) fn read_record<'a>(&mut self, cursor: &mut Cursor<'a>) -> Result<Record<'a>, Stop> {
        let word = cursor.u64()?;
        let flags = word % PAGE_SIZE_U64;
        let offset = word - flags;
        match flags & !RAM_CONTINUE {
            RAM_PAGE => {
                let (block, page) = self.read_address(cursor, offset, flags)?;
                let record = Record::Page {
                    block,
                    page,
                    content: cursor.array()?,
                };
                self.last = Some(block);
                Ok(record)
            }
            RAM_ZERO => {
                let (block, page) = self.read_address(cursor, offset, flags)?;
                if cursor.u8()? != 0 {
                    return Err(wrong_record("a filled page that is not zero"));
                }
                self.last = Some(block);
                Ok(Record::Zero { block, page })
            }
            RAM_XBZRLE => {
                let (block, page) = self.read_address(cursor, offset, flags)?;
                let encoded = read_xbzrle(cursor)?;
                self.last = Some(block);
                Ok(Record::Xbzrle {
                    block,
                    page,
                    encoded,
                })
            }
            _ if flags == RAM_MEM_SIZE => Ok(Record::BlockList { bytes: offset }),
            _ if flags == RAM_MULTIFD_FLUSH && offset == 0 => Ok(Record::MultifdFlush),
            _ if flags == RAM_EOS && offset == 0 => Ok(Record::EndOfSection),
            _ => Err(StreamError::UnsupportedRamRecord { flags }.into()),
        }
    }

    fn read_address(
        &self,
        cursor: &mut Cursor<'_>,
        offset: u64,
        flags: u64,
    ) -> Result<(u16, u32), Stop> {
        let block = if flags & RAM_CONTINUE != 0 {
            self.last.ok_or(wrong_record("no block to continue"))?
        } else {
            let name = std::str::from_utf8(cursor.name()?).ok();
            let block = name.and_then(|name| self.by_name.get(name));
            *block.ok_or(wrong_record("an unknown block"))?
        };
        let pages = self.list[usize::from(block)].pages;
        match u32::try_from(offset / PAGE_SIZE_U64) {
            Ok(page) if page < pages => Ok((block, page)),
            _ => Err(wrong_record("a page outside its block")),
        }
    }
}

fn read_xbzrle<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Stop> {
    if cursor.u8()? != XBZRLE_ENCODING {
        return Err(wrong_record("an unknown encoding of a change"));
    }
    let length = usize::from(cursor.u16()?);
    if length == 0 || length > PAGE_SIZE {
        return Err(wrong_record("a change that is empty or larger than a page"));
    }
    Ok(cursor.take(length)?)
}

fn wrong_record(what: &'static str) -> Stop {
    StreamError::RamRecord(what).into()
}
