//! Messages from the target to the source, on the same socket.
//!
//! ```text
//! be16 type | be16 n | n bytes       n is 4 for SHUT and PONG, 12 or 13 + name for REQ_PAGES..
//! ```
//!
//! No message passes from one QEMU to the other without a look at it: a SHUT(0) in the wrong moment
//! makes the source give its guest away. Messages of a recovery are errors but for a parser that was
//! made for one.
//!
//! ```text
//! RECV_BITMAP  be16 5 | be16 n | u8 n, n name, then be64 bytes | bits, lowest first | be64 mark
//! RESUME_ACK   be16 6 | be16 4 | be32 1
//! ```
//!
//! `//= qemu migration/migration.c, enum mig_rp_message_type, rp_cmd_args`

use super::cursor::{Cursor, Need};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// Stands behind a bitmap.
const BITMAP_MARK: u64 = 0x0123_4567_89ab_cdef;
/// What RESUME_ACK says.
const RESUME_VALUE: u32 = 1;

/// Most bytes in one message: a request with the longest name. QEMU itself allows 512.
const PAYLOAD_BYTES_MAX: u16 = 12 + 1 + 255;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The target is done: 0 when the guest is loaded, anything else is its failure.
    Shut(u32),
    /// Everything before the ping of this value has been read.
    Pong(u32),
    /// Postcopy: these bytes are missing.
    RequestPages {
        /// Name of the block, 1 to 255 bytes; `None` means the block of the last request.
        block: Option<Vec<u8>>,
        /// Offset in the block.
        start: u64,
        /// Number of bytes.
        length: u32,
    },
    /// The target agrees that the guest may be stopped.
    SwitchoverAck,
    /// Recovery: which pages of a block the target has, page 0 in the lowest bit of the first byte.
    Bitmap {
        /// Name of the block, 1 to 255 bytes.
        block: Vec<u8>,
        /// A bit for each page, rounded up.
        bits: Vec<u8>,
    },
    /// Recovery: the target goes on.
    ResumeAck,
}

/// A message that no target sends in this state of affairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReturnPathError {
    /// Unknown type, or a length that does not fit it.
    #[error("return path message of type {kind} with {length} bytes")]
    Malformed {
        /// Type of the message.
        kind: u16,
        /// Bytes of its payload.
        length: u16,
    },
    /// RECV_BITMAP or RESUME_ACK outside of a recovery, or with a wrong value or size in one.
    #[error("return path message of type {kind} is wrong, or outside of a recovery")]
    Recovery {
        /// Type of the message.
        kind: u16,
    },
    /// The target closed in the middle of a message.
    #[error("the return path ends inside a message")]
    Truncated,
    /// The parser was used after an error.
    #[error("the return path already failed")]
    AlreadyFailed,
}

/// Push parser of the messages of one connection.
#[derive(Debug, Default)]
pub struct Parser {
    /// The beginning of a message that the input cut; below 4 + [`PAYLOAD_BYTES_MAX`] bytes, and in
    /// a recovery a bitmap more.
    carry: Vec<u8>,
    failed: bool,
    /// Most bytes of a bitmap; `None` outside of a recovery.
    bitmap_bytes_max: Option<u64>,
}

impl Parser {
    /// A parser that expects the first byte of a message.
    pub fn new() -> Self {
        Self::default()
    }

    /// A parser that takes messages of a recovery: bitmaps of at most so many bytes.
    pub fn in_recovery(bitmap_bytes_max: u64) -> Self {
        Self {
            bitmap_bytes_max: Some(bitmap_bytes_max),
            ..Self::default()
        }
    }

    /// Takes the next bytes and gives the messages that they complete to `sink`.
    ///
    /// # Errors
    /// [`ReturnPathError`]; messages before the wrong one were given to the sink.
    pub fn push(
        &mut self,
        mut input: &[u8],
        sink: &mut impl FnMut(Message),
    ) -> Result<(), ReturnPathError> {
        if self.failed {
            return Err(ReturnPathError::AlreadyFailed);
        }
        while !input.is_empty() {
            // A failed read names how many bytes the message surely has.
            let wanted = match read(&self.carry, self.bitmap_bytes_max) {
                Err(Halt::Need(Need(wanted))) => wanted,
                Ok(_) | Err(Halt::Wrong(_)) => unreachable!("whole messages do not stay"),
            };
            let missing = wanted - self.carry.len();
            let (more, rest) = input.split_at(missing.min(input.len()));
            self.carry.extend_from_slice(more);
            input = rest;
            match read(&self.carry, self.bitmap_bytes_max) {
                Ok(message) => {
                    self.carry.clear();
                    sink(message);
                }
                Err(Halt::Need(_)) => {}
                Err(Halt::Wrong(error)) => {
                    self.failed = true;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The target closed its socket: was it between two messages?
    ///
    /// # Errors
    /// [`ReturnPathError::Truncated`], or [`ReturnPathError::AlreadyFailed`].
    pub fn finish(&self) -> Result<(), ReturnPathError> {
        match (self.failed, self.carry.is_empty()) {
            (true, _) => Err(ReturnPathError::AlreadyFailed),
            (false, false) => Err(ReturnPathError::Truncated),
            (false, true) => Ok(()),
        }
    }
}

impl Message {
    /// Appends the message's bytes.
    ///
    /// # Panics
    /// When a block's name is empty or longer than 255 bytes: no such block can exist.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Shut(value) => push(out, SHUT, &[&value.to_be_bytes()]),
            Self::Pong(value) => push(out, PONG, &[&value.to_be_bytes()]),
            Self::RequestPages {
                block: None,
                start,
                length,
            } => {
                push(
                    out,
                    REQ_PAGES,
                    &[&start.to_be_bytes(), &length.to_be_bytes()],
                );
            }
            Self::RequestPages {
                block: Some(name),
                start,
                length,
            } => {
                let n = u8::try_from(name.len()).ok().filter(|&n| n > 0);
                let n = n.expect("block names have 1 to 255 bytes");
                push(
                    out,
                    REQ_PAGES_ID,
                    &[&start.to_be_bytes(), &length.to_be_bytes(), &[n], name],
                );
            }
            Self::SwitchoverAck => push(out, SWITCHOVER_ACK, &[]),
            Self::Bitmap { block, bits } => {
                let n = u8::try_from(block.len()).ok().filter(|&n| n > 0);
                let n = n.expect("block names have 1 to 255 bytes");
                push(out, RECV_BITMAP, &[&[n], block]);
                out.extend_from_slice(&(bits.len() as u64).to_be_bytes());
                out.extend_from_slice(bits);
                out.extend_from_slice(&BITMAP_MARK.to_be_bytes());
            }
            Self::ResumeAck => push(out, RESUME_ACK, &[&RESUME_VALUE.to_be_bytes()]),
        }
    }
}

fn push(out: &mut Vec<u8>, kind: u16, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let length = u16::try_from(length).expect("a payload has at most 268 bytes");
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

enum Halt {
    Need(Need),
    Wrong(ReturnPathError),
}

impl From<Need> for Halt {
    fn from(need: Need) -> Self {
        Self::Need(need)
    }
}

/// One message. A wrong length is found before its payload is waited for.
fn read(bytes: &[u8], bitmap_bytes_max: Option<u64>) -> Result<Message, Halt> {
    let mut cursor = Cursor::new(bytes);
    let (kind, length) = (cursor.u16()?, cursor.u16()?);
    let malformed = Halt::Wrong(ReturnPathError::Malformed { kind, length });
    match (kind, length) {
        (SHUT, 4) => Ok(Message::Shut(cursor.u32()?)),
        (PONG, 4) => Ok(Message::Pong(cursor.u32()?)),
        (REQ_PAGES, 12) => Ok(Message::RequestPages {
            block: None,
            start: cursor.u64()?,
            length: cursor.u32()?,
        }),
        (REQ_PAGES_ID, 14..=PAYLOAD_BYTES_MAX) => {
            let payload = cursor.take(length.into())?;
            let mut payload = Cursor::new(payload);
            let (start, bytes) = (payload.u64()?, payload.u32()?);
            let n = payload.u8()?;
            if u16::from(n) + 13 != length {
                return Err(malformed);
            }
            let block = Some(payload.take(n.into())?.to_vec());
            Ok(Message::RequestPages {
                block,
                start,
                length: bytes,
            })
        }
        (SWITCHOVER_ACK, 0) => Ok(Message::SwitchoverAck),
        (RECV_BITMAP, 2..=256) if bitmap_bytes_max.is_some() => {
            let n = cursor.u8()?;
            if u16::from(n) + 1 != length {
                return Err(malformed);
            }
            let block = cursor.take(n.into())?.to_vec();
            let size = cursor.u64()?;
            let size = usize::try_from(size)
                .ok()
                .filter(|_| Some(size) <= bitmap_bytes_max)
                .ok_or(Halt::Wrong(ReturnPathError::Recovery { kind }))?;
            let bits = cursor.take(size)?.to_vec();
            if cursor.u64()? != BITMAP_MARK {
                return Err(Halt::Wrong(ReturnPathError::Recovery { kind }));
            }
            Ok(Message::Bitmap { block, bits })
        }
        (RESUME_ACK, 4) if bitmap_bytes_max.is_some() => {
            if cursor.u32()? != RESUME_VALUE {
                return Err(Halt::Wrong(ReturnPathError::Recovery { kind }));
            }
            Ok(Message::ResumeAck)
        }
        (RECV_BITMAP | RESUME_ACK, _) => Err(Halt::Wrong(ReturnPathError::Recovery { kind })),
        _ => Err(malformed),
    }
}
