//! Big-endian reading from a slice that may end too early.

use super::StreamError;

/// The record is surely at least this many bytes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need(pub(super) usize);

/// Why a record could not be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It is not whole.
    Need(Need),
    /// It is wrong.
    Wrong(StreamError),
}

impl From<Need> for Stop {
    fn from(need: Need) -> Self {
        Self::Need(need)
    }
}

impl From<StreamError> for Stop {
    fn from(error: StreamError) -> Self {
        Self::Wrong(error)
    }
}

/// Reads one record from its first byte on.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The bytes read so far.
    pub(super) fn read(&self) -> &'a [u8] {
        &self.bytes[..self.at]
    }

    /// Callers bound `length`; the sum cannot overflow.
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], Need> {
        let end = self.at + length;
        let taken = self.bytes.get(self.at..end).ok_or(Need(end))?;
        self.at = end;
        Ok(taken)
    }

    /// The next byte, which stays unread.
    pub(super) fn peek(&self) -> Result<u8, Need> {
        self.bytes.get(self.at).copied().ok_or(Need(self.at + 1))
    }

    /// What there is, at most `max` bytes, at least one.
    pub(super) fn take_up_to(&mut self, max: u64) -> Result<&'a [u8], Need> {
        self.peek()?;
        let there = self.bytes.len() - self.at;
        self.take(usize::try_from(max).map_or(there, |max| max.min(there)))
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Need> {
        let left = self.bytes.get(self.at..).unwrap_or_default();
        let taken = left.first_chunk().ok_or(Need(self.at + N))?;
        self.at += N;
        Ok(taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Need> {
        self.array().map(|&[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Need> {
        self.array().map(|bytes| u16::from_be_bytes(*bytes))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Need> {
        self.array().map(|bytes| u32::from_be_bytes(*bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Need> {
        self.array().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// A string with a length byte before it.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Need> {
        let length = self.u8()?;
        self.take(length.into())
    }
}

/// A name for an error message: what is not text is replaced.
pub(super) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
