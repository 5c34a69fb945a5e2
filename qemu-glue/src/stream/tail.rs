//! Where the stream ends.
//!
//! Device state has no lengths, and with a return path the source keeps its socket open after the
//! last byte. What ends the stream is `00` (EOF), `06`, be32 length, and JSON of that length that
//! describes the devices:
//!
//! ```text
//! .. devices | 00 | 06 | be32 n | {"page_size": 4096, "devices": [..]}      n bytes
//! ```
//!
//! The watch looks for that, byte by byte, with no memory of the bytes: a candidate begins at
//! `00 06 n '{'` with one of the two known beginnings of the JSON, dies at the first control
//! character (QEMU escapes them inside JSON) or when its braces do not close exactly at byte `n`, and
//! is complete only as long as nothing follows it. Bytes of a guest that imitate a description are
//! therefore a candidate that dies, or one that more bytes turn into nothing: the last candidate is
//! always the true one, because a true description contains no `00`. The caller takes
//! [`TailState::Complete`] as the end when the source has also gone quiet.

/// How far the end of the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TailState {
    /// RAM has not ended.
    NotReached,
    /// More bytes must come.
    Open,
    /// The bytes received so far end with a whole description of the devices. Unless a device's
    /// state imitates one, the stream is complete; more bytes set this back to `Open`.
    Complete,
}

/// Longest description that is believed (a large machine's is below 1 MiB).
const DESCRIPTION_MAX: u32 = 64 << 20;

/// What a description can begin with (savevm.c, `qemu_savevm_state_setup`).
const BEGINNINGS: [&[u8]; 2] = [b"{\"configuration\": {", b"{\"page_size\": "];

/// The JSON of a candidate.
#[derive(Debug)]
struct Json {
    left: u32,
    read: usize,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// Which of [`BEGINNINGS`] it still can be.
    beginning: [bool; 2],
}

/// Looks for the end of a stream: inside [`super::Parser`] from the device state on, and for a relay
/// that knows nothing of its bytes from the first byte on.
#[derive(Debug, Default)]
pub struct EndWatch {
    /// The last eight bytes.
    window: u64,
    candidate: Option<Json>,
    complete: bool,
    bytes: u64,
}

impl EndWatch {
    /// A watch at the first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// `Open` or `Complete`.
    pub fn state(&self) -> TailState {
        if self.complete {
            TailState::Complete
        } else {
            TailState::Open
        }
    }

    /// Whether the last byte can be the EOF of a stream without description.
    pub(super) fn ends_with_eof(&self) -> bool {
        self.bytes > 0 && self.window & 0xff == 0 && self.candidate.is_none()
    }

    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.push_byte(byte);
        }
        self.bytes += bytes.len() as u64;
    }

    fn push_byte(&mut self, byte: u8) {
        self.window = (self.window << 8) | u64::from(byte);
        self.complete = false;
        if let Some(json) = &mut self.candidate {
            match json.push(byte) {
                JsonState::Open => return,
                JsonState::Complete => {
                    self.complete = true;
                    self.candidate = None;
                    return;
                }
                JsonState::Dead => self.candidate = None,
            }
        }
        // 00 06 n n n n '{'
        let [_, eof, kind, length @ .., brace] = self.window.to_be_bytes();
        if (eof, kind, brace) == (super::TYPE_EOF, super::TYPE_DESCRIPTION, b'{') {
            self.candidate = Json::begin(u32::from_be_bytes(length));
        }
    }
}

enum JsonState {
    Open,
    Complete,
    Dead,
}

impl Json {
    /// A candidate of `length` bytes whose first byte was an opening brace.
    fn begin(length: u32) -> Option<Self> {
        let believed = (2..=DESCRIPTION_MAX).contains(&length);
        believed.then(|| Self {
            left: length - 1,
            read: 1,
            depth: 1,
            in_string: false,
            escaped: false,
            beginning: [true; 2],
        })
    }

    fn push(&mut self, byte: u8) -> JsonState {
        if byte < b' ' || !self.begins_well(byte) {
            return JsonState::Dead;
        }
        self.left -= 1;
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth -= 1,
                _ => {}
            }
        }
        match (self.depth, self.left) {
            (0, 0) => JsonState::Complete,
            (0, _) | (_, 0) => JsonState::Dead,
            _ => JsonState::Open,
        }
    }

    /// Compares with the known beginnings as long as they last.
    fn begins_well(&mut self, byte: u8) -> bool {
        for (possible, beginning) in self.beginning.iter_mut().zip(BEGINNINGS) {
            *possible &= beginning
                .get(self.read)
                .is_none_or(|&expected| expected == byte);
        }
        self.read = self.read.saturating_add(1);
        self.beginning.contains(&true)
    }
}
