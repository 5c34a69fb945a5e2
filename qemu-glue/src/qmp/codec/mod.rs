//! Lines of QEMU's monitor to messages: pure, push, bounded.
//!
//! [`Codec::push`] takes any split of the input. One message is one line; empty lines are skipped.
//! After an error the codec stays broken, since what follows cannot be trusted to be in step.
//! //= qemu docs/interop/qmp-spec.rst

mod message;

pub use message::{Greeting, Message, Timestamp, Version};

/// Longest line that is accepted, without its end. The largest reply known is `query-qmp-schema`
/// with about 0.25 MiB.
pub const LINE_MAX_BYTES: usize = 1 << 20;

/// Why a line is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// A line passed [`LINE_MAX_BYTES`].
    #[error("QEMU sent a line of more than {LINE_MAX_BYTES} bytes")]
    LineTooLong,
    /// A line is no JSON object with the fields of a message.
    #[error("QEMU sent a line that is no QMP message: {detail}")]
    NotAMessage {
        /// What is wrong; no content of the line.
        detail: String,
    },
    /// A reply carries an id that is not one of our numbers.
    #[error("QEMU's reply carries an id that no client of this sort sends")]
    ForeignId,
}

/// Push parser of a monitor's output.
#[derive(Debug, Default)]
pub struct Codec {
    /// The line that has begun, without its end; at most [`LINE_MAX_BYTES`].
    line: Vec<u8>,
    /// Begun by another reader: its first line may be the rest of one.
    is_mid_line: bool,
    broken: Option<CodecError>,
}

impl Codec {
    /// A codec at the start of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// A codec for a connection that another reader has left at any byte.
    pub fn mid_line() -> Self {
        Self {
            is_mid_line: true,
            ..Self::default()
        }
    }

    /// Takes the next bytes and appends the messages that they complete.
    ///
    /// # Errors
    /// The first bad line; messages before it have been appended. Every later call repeats it.
    pub fn push(&mut self, input: &[u8], messages: &mut Vec<Message>) -> Result<(), CodecError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.take(input, messages).inspect_err(|error| {
            self.line = Vec::new();
            self.broken = Some(error.clone());
        })
    }

    fn take(&mut self, mut input: &[u8], messages: &mut Vec<Message>) -> Result<(), CodecError> {
        while let Some(end) = input.iter().position(|&byte| byte == b'\n') {
            let (head, rest) = input.split_at(end);
            self.extend_line(head)?;
            match message::parse(&self.line) {
                Ok(message) => messages.extend(message),
                // No rest of a line is a message: it closes more than it opens.
                Err(_) if self.is_mid_line => {}
                Err(error) => return Err(error),
            }
            self.is_mid_line = false;
            self.line.clear();
            input = rest.get(1..).unwrap_or_default();
        }
        self.extend_line(input)
    }

    fn extend_line(&mut self, bytes: &[u8]) -> Result<(), CodecError> {
        if self.line.len() + bytes.len() > LINE_MAX_BYTES {
            return Err(CodecError::LineTooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
