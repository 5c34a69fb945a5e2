//! The push parser: any split of the input, events in order.
//!
//! ```text
//! Head -> Between -> Ram(setup) -> Blocks -> Ram -> Footer -> Between -> ..
//!                 -> Bitmap -> BitmapBytes -> Bitmap .. -> Footer -> Between
//!                 -> Tail                       (first FULL or EOF after ram's END)
//! any -> Failed
//! ```
//!
//! Each step reads one record from its first byte. A record that the input cuts is collected in
//! `carry`, which never holds more than that one record: a step that lacks bytes names a number
//! that the record surely has.

mod steps;

use super::cursor::{Cursor, Need, Stop};
use super::ram::Blocks;
use super::tail::EndWatch;
use super::{Event, Phase, Place, StreamError, TailState};

/// What the parser believes at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of header and configuration. Default 64 KiB; real ones are below 200 bytes.
    pub head_bytes_max: usize,
    /// Bytes before the first page, kept for a relay. Default 1 MiB; real ones are below 4 KiB.
    pub prelude_bytes_max: usize,
    /// RAM blocks. Default 4096; a machine with 256 memory slots has fewer than 400.
    pub blocks_max: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes_max: 64 << 10,
            prelude_bytes_max: 1 << 20,
            blocks_max: 4096,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    HeadStart,
    HeadNext,
    Between,
    Ram(Phase),
    BlockList { bytes_left: u64 },
    RamFooter(Phase),
    Bitmap(Phase),
    BitmapBytes { phase: Phase, left: u64, last: bool },
    BitmapFooter(Phase),
    Tail,
    Failed,
}

/// Where a section that can come many times stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Iterable {
    Unseen,
    Started { id: u32 },
    Ended { id: u32 },
}

/// Parser of one connection's stream.
#[derive(Debug)]
pub struct Parser {
    limits: Limits,
    state: State,
    /// The beginning of a record that the input cut, and the bytes that it has at least.
    carry: Vec<u8>,
    wanted: usize,
    head: Vec<u8>,
    /// Every byte so far, until the first page.
    prelude: Option<Vec<u8>>,
    blocks: Blocks,
    ram: Iterable,
    bitmap: Iterable,
    guest_stopped: bool,
    section_pages: u64,
    tail: EndWatch,
}

impl Parser {
    /// A parser that expects the first byte of a stream.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::HeadStart,
            carry: Vec::new(),
            wanted: 0,
            head: Vec::new(),
            prelude: Some(Vec::new()),
            blocks: Blocks::default(),
            ram: Iterable::Unseen,
            bitmap: Iterable::Unseen,
            guest_stopped: false,
            section_pages: 0,
            tail: EndWatch::new(),
        }
    }

    /// Takes the next bytes of the stream and gives what they complete to `sink`.
    ///
    /// # Errors
    /// A [`StreamError`], or the sink's own error. Either ends the stream: later calls fail with
    /// [`StreamError::AlreadyFailed`].
    pub fn push<E: From<StreamError>>(
        &mut self,
        input: &[u8],
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.state == State::Failed {
            return Err(StreamError::AlreadyFailed.into());
        }
        let result = self
            .keep_prelude(input)
            .and_then(|()| self.parse(input, sink));
        if result.is_err() {
            self.state = State::Failed;
        }
        result
    }

    /// Every byte of the stream so far, the whole input of a failed [`Parser::push`] included, as
    /// long as no page was seen. With it a stream that [`StreamError::may_relay`] goes on as a relay.
    pub fn take_prelude(&mut self) -> Option<Vec<u8>> {
        self.prelude.take()
    }

    /// No page has been seen.
    pub fn is_before_first_page(&self) -> bool {
        self.prelude.is_some()
    }

    /// The guest is known to be stopped.
    pub fn is_guest_stopped(&self) -> bool {
        self.guest_stopped
    }

    /// How far the end of the stream is; see there what must confirm `Complete`.
    pub fn tail_state(&self) -> TailState {
        if self.state == State::Tail {
            self.tail.state()
        } else {
            TailState::NotReached
        }
    }

    /// The source closed its socket: was the stream complete?
    ///
    /// # Errors
    /// [`StreamError::Truncated`], or [`StreamError::NoDescription`] when the stream may be whole
    /// but says nothing that proves it.
    pub fn finish(&self) -> Result<(), StreamError> {
        let place = match self.state {
            State::HeadStart | State::HeadNext => Place::Head,
            State::Between => Place::Sections,
            State::Ram(_) | State::BlockList { .. } | State::RamFooter(_) => Place::Ram,
            State::Bitmap(_) | State::BitmapBytes { .. } | State::BitmapFooter(_) => {
                Place::DirtyBitmap
            }
            State::Tail => match self.tail.state() {
                TailState::Complete => return Ok(()),
                TailState::NotReached | TailState::Open if self.tail.ends_with_eof() => {
                    return Err(StreamError::NoDescription);
                }
                TailState::NotReached | TailState::Open => Place::Tail,
            },
            State::Failed => return Err(StreamError::AlreadyFailed),
        };
        Err(StreamError::Truncated(place))
    }

    fn keep_prelude<E: From<StreamError>>(&mut self, input: &[u8]) -> Result<(), E> {
        let Some(prelude) = &mut self.prelude else {
            return Ok(());
        };
        // One input that holds the first pages too may be larger than the limit: what counts is
        // what was there before it. Callers read from a socket in bounded pieces.
        let max = self.limits.prelude_bytes_max;
        if prelude.len() > max {
            return Err(StreamError::PreludeTooLarge { max }.into());
        }
        prelude.extend_from_slice(input);
        Ok(())
    }

    fn parse<E: From<StreamError>>(
        &mut self,
        mut input: &[u8],
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            if self.carry.is_empty() {
                if input.is_empty() {
                    return Ok(());
                }
                match self.step(input, sink)? {
                    Step::Consumed(count) => input = &input[count..],
                    Step::Need(wanted) => {
                        self.wanted = wanted;
                        self.carry.extend_from_slice(input);
                        return Ok(());
                    }
                }
                continue;
            }
            let missing = self.wanted - self.carry.len();
            let (more, rest) = input.split_at(missing.min(input.len()));
            self.carry.extend_from_slice(more);
            input = rest;
            if self.carry.len() < self.wanted {
                return Ok(());
            }
            let carry = std::mem::take(&mut self.carry);
            match self.step(&carry, sink)? {
                Step::Consumed(count) => self.keep_rest(carry, count),
                Step::Need(wanted) => {
                    assert!(
                        wanted > carry.len(),
                        "a step asks for more than it was given"
                    );
                    (self.carry, self.wanted) = (carry, wanted);
                }
            }
        }
    }

    /// A step on the carried bytes consumed them all, or nothing but its state (a byte that only
    /// tells what does not follow).
    fn keep_rest(&mut self, mut carry: Vec<u8>, consumed: usize) {
        if consumed == carry.len() {
            carry.clear();
            self.carry = carry;
        } else {
            assert_eq!(consumed, 0, "a step asked for bytes beyond its record");
            self.wanted = carry.len();
            self.carry = carry;
        }
    }

    /// One record, or the request for more bytes.
    fn step<E: From<StreamError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Result<Step, E> {
        let mut cursor = Cursor::new(bytes);
        let done = match self.state {
            State::Ram(phase) => self.ram_record(&mut cursor, phase, sink),
            State::HeadStart => self.head_start(&mut cursor),
            State::HeadNext => self.head_next(&mut cursor, sink),
            State::Between => self.between(&mut cursor, sink),
            State::BlockList { bytes_left } => self.block_entry(&mut cursor, bytes_left, sink),
            State::RamFooter(phase) => self.ram_footer(&mut cursor, phase, sink),
            State::Bitmap(phase) => self.bitmap_chunk(&mut cursor, phase, sink),
            State::BitmapBytes { phase, left, last } => {
                self.bitmap_bytes(&mut cursor, phase, left, last, sink)
            }
            State::BitmapFooter(phase) => self.bitmap_footer(&mut cursor, phase, sink),
            State::Tail => self.tail_bytes(&mut cursor, sink),
            State::Failed => Err(StreamError::AlreadyFailed.into()),
        };
        match done {
            Ok(()) => Ok(Step::Consumed(cursor.at())),
            Err(Halt::Need(Need(wanted))) => Ok(Step::Need(wanted)),
            Err(Halt::Failed(error)) => Err(error),
        }
    }
}

impl Iterable {
    fn id(self) -> Option<u32> {
        match self {
            Self::Unseen => None,
            Self::Started { id } | Self::Ended { id } => Some(id),
        }
    }
}

/// What a step did with its bytes.
enum Step {
    Consumed(usize),
    Need(usize),
}

/// Result of reading one record for a sink with errors `E`.
type Done<E> = Result<(), Halt<E>>;

enum Halt<E> {
    Need(Need),
    Failed(E),
}

impl<E> From<Need> for Halt<E> {
    fn from(need: Need) -> Self {
        Self::Need(need)
    }
}

impl<E: From<StreamError>> From<Stop> for Halt<E> {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Need(need) => Self::Need(need),
            Stop::Wrong(error) => Self::Failed(error.into()),
        }
    }
}

impl<E: From<StreamError>> From<StreamError> for Halt<E> {
    fn from(error: StreamError) -> Self {
        Self::Failed(error.into())
    }
}
