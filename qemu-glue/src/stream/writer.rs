//! Writes a migration stream for a target QEMU.
//!
//! ```text
//! head, command*, ram_start, ram_end, { section | command | ram_begin(Iterate) page* ram_end }*,
//! ram_begin(Complete), page*, ram_end, section*, tail*
//! ```
//!
//! A target takes pages in any order, many times, in sections of any size. Bytes gather in a
//! buffer that the caller drains with [`Writer::take`]; it bounds them by looking at
//! [`Writer::len`] between calls, each of which adds at most one page and a block's name (or the
//! caller's own bytes).

use super::{
    COMMAND_OPEN_RETURN_PATH, COMMAND_PING, COMMAND_POSTCOPY_ADVISE, COMMAND_SWITCHOVER_START,
    Command, Event, PAGE_SIZE, PAGE_SIZE_U64, Phase, RAM_CONTINUE, RAM_EOS, RAM_MEM_SIZE,
    RAM_MULTIFD_FLUSH, RAM_PAGE, RAM_SECTION, RAM_SECTION_VERSION, RAM_XBZRLE, RAM_ZERO, RamBlock,
    TYPE_COMMAND, TYPE_END, TYPE_FOOTER, TYPE_PART, TYPE_START,
};

/// A call that would have made a stream that the target refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// No such block, or no such page in it.
    #[error("page {page} of block {block} does not exist")]
    NoSuchPage {
        /// Index in the block list.
        block: u16,
        /// Page number.
        page: u32,
    },
    /// The call does not fit what was written before it.
    #[error("{0} is out of order")]
    OutOfOrder(&'static str),
    /// The block list cannot be written: empty, a name too long, too many or too large blocks.
    #[error("the block list cannot be written")]
    Blocks,
    /// A change that is empty or larger than a page.
    #[error("a change of {0} bytes")]
    XbzrleLength(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    Ram,
    RamEnded,
}

/// Writer of one connection's stream.
#[derive(Debug)]
pub struct Writer {
    pub(super) out: Vec<u8>,
    state: State,
    /// Number of the ram section, and the last section's phase.
    pub(super) section_id: u32,
    pub(super) phase: Option<Phase>,
    pub(super) blocks: Vec<RamBlock>,
    last_block: Option<u16>,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// A writer at the first byte of a stream.
    pub fn new() -> Self {
        Self {
            out: Vec::new(),
            state: State::Between,
            section_id: 0,
            phase: None,
            blocks: Vec::new(),
            last_block: None,
        }
    }

    /// The block list that pages are named by.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Bytes that wait for [`Writer::take`].
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// No bytes wait.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Everything written since the last call, with room for about as much again.
    pub fn take(&mut self) -> Vec<u8> {
        let capacity = self.out.len();
        std::mem::replace(&mut self.out, Vec::with_capacity(capacity))
    }

    /// Header and configuration, as the source sent them.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] after anything else was written.
    pub fn head(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.between("the head")?;
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    /// A command.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] inside a ram section.
    pub fn command(&mut self, command: Command) -> Result<(), WriteError> {
        if self.state == State::Ram {
            return Err(WriteError::OutOfOrder("a command"));
        }
        let (number, payload) = match command {
            Command::OpenReturnPath => (COMMAND_OPEN_RETURN_PATH, None),
            Command::Ping(value) => (COMMAND_PING, Some(value)),
            Command::PostcopyAdviseBitmaps => (COMMAND_POSTCOPY_ADVISE, None),
            Command::SwitchoverStart => (COMMAND_SWITCHOVER_START, None),
        };
        self.out.push(TYPE_COMMAND);
        self.out.extend_from_slice(&number.to_be_bytes());
        match payload {
            None => self.out.extend_from_slice(&0_u16.to_be_bytes()),
            Some(value) => {
                self.out.extend_from_slice(&4_u16.to_be_bytes());
                self.out.extend_from_slice(&value.to_be_bytes());
            }
        }
        Ok(())
    }

    /// Begins the ram section with the block list; [`Writer::ram_end`] ends this first part too.
    /// `section_id` must differ from the numbers in other sections' bytes: take the source's.
    ///
    /// # Errors
    /// [`WriteError::Blocks`], or [`WriteError::OutOfOrder`] the second time.
    pub fn ram_start(&mut self, section_id: u32, blocks: &[RamBlock]) -> Result<(), WriteError> {
        self.between("the block list")?;
        if self.phase.is_some() {
            return Err(WriteError::OutOfOrder("the block list"));
        }
        let named = |block: &RamBlock| (1..=255).contains(&block.name.len()) && block.pages > 0;
        let count = u16::try_from(blocks.len()).map_err(|_| WriteError::Blocks)?;
        if count == 0 || !blocks.iter().all(named) {
            return Err(WriteError::Blocks);
        }
        // At most 2^16 blocks of 2^32 pages of 2^12 bytes: below 2^60.
        let total: u64 = blocks.iter().map(bytes_of).sum();
        self.out.push(TYPE_START);
        self.out.extend_from_slice(&section_id.to_be_bytes());
        push_name(&mut self.out, RAM_SECTION);
        self.out.extend_from_slice(&0_u32.to_be_bytes());
        self.out
            .extend_from_slice(&RAM_SECTION_VERSION.to_be_bytes());
        self.out
            .extend_from_slice(&(total | RAM_MEM_SIZE).to_be_bytes());
        for block in blocks {
            push_name(&mut self.out, block.name.as_bytes());
            self.out.extend_from_slice(&bytes_of(block).to_be_bytes());
        }
        self.section_id = section_id;
        self.blocks = blocks.to_vec();
        self.state = State::Ram;
        self.phase = Some(Phase::Setup);
        Ok(())
    }

    /// Begins a ram section for pages: [`Phase::Iterate`] as often as wanted, [`Phase::Complete`]
    /// once, at the end.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] before [`Writer::ram_start`], inside a section, after the last.
    pub fn ram_begin(&mut self, phase: Phase) -> Result<(), WriteError> {
        self.between("a ram section")?;
        let kind = match (phase, self.phase) {
            (Phase::Setup, _) | (_, None | Some(Phase::Complete)) => {
                return Err(WriteError::OutOfOrder("a ram section"));
            }
            (Phase::Iterate, Some(_)) => TYPE_PART,
            (Phase::Complete, Some(_)) => TYPE_END,
        };
        self.out.push(kind);
        self.out.extend_from_slice(&self.section_id.to_be_bytes());
        self.state = State::Ram;
        self.phase = Some(phase);
        Ok(())
    }

    /// A page's content.
    ///
    /// # Errors
    /// [`WriteError::NoSuchPage`], or [`WriteError::OutOfOrder`] outside a ram section.
    pub fn page(
        &mut self,
        block: u16,
        page: u32,
        content: &[u8; PAGE_SIZE],
    ) -> Result<(), WriteError> {
        self.record(block, page, RAM_PAGE)?;
        self.out.extend_from_slice(content);
        Ok(())
    }

    /// A page that is all zero.
    ///
    /// # Errors
    /// As [`Writer::page`].
    pub fn zero(&mut self, block: u16, page: u32) -> Result<(), WriteError> {
        self.record(block, page, RAM_ZERO)?;
        self.out.push(0);
        Ok(())
    }

    /// A change of a page that the target has in the version that the source sent last.
    ///
    /// # Errors
    /// [`WriteError::XbzrleLength`]; else as [`Writer::page`].
    pub fn xbzrle(&mut self, block: u16, page: u32, encoded: &[u8]) -> Result<(), WriteError> {
        let length = match u16::try_from(encoded.len()) {
            Ok(length) if (1..=PAGE_SIZE).contains(&encoded.len()) => length,
            _ => return Err(WriteError::XbzrleLength(encoded.len())),
        };
        self.record(block, page, RAM_XBZRLE)?;
        self.out.push(1);
        self.out.extend_from_slice(&length.to_be_bytes());
        self.out.extend_from_slice(encoded);
        Ok(())
    }

    /// Makes a target that uses multifd wait for its other channels.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] outside a ram section.
    pub fn multifd_flush(&mut self) -> Result<(), WriteError> {
        self.in_ram("a multifd flush")?;
        self.out.extend_from_slice(&RAM_MULTIFD_FLUSH.to_be_bytes());
        Ok(())
    }

    /// Ends the ram section that is open.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] outside a ram section.
    pub fn ram_end(&mut self) -> Result<(), WriteError> {
        self.in_ram("a ram section's end")?;
        self.out.extend_from_slice(&RAM_EOS.to_be_bytes());
        self.out.push(TYPE_FOOTER);
        self.out.extend_from_slice(&self.section_id.to_be_bytes());
        let ended = self.phase == Some(Phase::Complete);
        self.state = if ended {
            State::RamEnded
        } else {
            State::Between
        };
        Ok(())
    }

    /// Bytes of whole sections other than ram, or of the tail, as the source sent them.
    ///
    /// # Errors
    /// [`WriteError::OutOfOrder`] inside a ram section.
    pub fn relayed(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.state == State::Ram {
            return Err(WriteError::OutOfOrder("another section"));
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes what the parser read: the same bytes again, in the end.
    ///
    /// # Errors
    /// Those of the method that the event stands for.
    pub fn event(&mut self, event: Event<'_>) -> Result<(), WriteError> {
        match event {
            Event::Head(bytes) => self.head(bytes),
            Event::Command(command) => self.command(command),
            Event::Blocks { section_id, blocks } => self.ram_start(section_id, blocks),
            Event::RamBegin(phase) => self.ram_begin(phase),
            Event::Page {
                block,
                page,
                content,
            } => self.page(block, page, content),
            Event::Zero { block, page } => self.zero(block, page),
            Event::Xbzrle {
                block,
                page,
                encoded,
            } => self.xbzrle(block, page, encoded),
            Event::MultifdFlush => self.multifd_flush(),
            Event::RamEnd { .. } => self.ram_end(),
            Event::GuestStopped => Ok(()),
            Event::Section { bytes, .. } | Event::Tail(bytes) => self.relayed(bytes),
        }
    }

    fn record(&mut self, block: u16, page: u32, kind: u64) -> Result<(), WriteError> {
        self.in_ram("a page")?;
        let known = self
            .blocks
            .get(usize::from(block))
            .filter(|known| page < known.pages);
        let known = known.ok_or(WriteError::NoSuchPage { block, page })?;
        let offset = u64::from(page) * PAGE_SIZE_U64;
        if self.last_block == Some(block) {
            self.out
                .extend_from_slice(&(offset | kind | RAM_CONTINUE).to_be_bytes());
        } else {
            self.out.extend_from_slice(&(offset | kind).to_be_bytes());
            push_name(&mut self.out, known.name.as_bytes());
            self.last_block = Some(block);
        }
        Ok(())
    }

    fn in_ram(&self, what: &'static str) -> Result<(), WriteError> {
        if self.state == State::Ram {
            Ok(())
        } else {
            Err(WriteError::OutOfOrder(what))
        }
    }

    pub(super) fn between(&self, what: &'static str) -> Result<(), WriteError> {
        if self.state == State::Between {
            Ok(())
        } else {
            Err(WriteError::OutOfOrder(what))
        }
    }
}

fn bytes_of(block: &RamBlock) -> u64 {
    u64::from(block.pages) * PAGE_SIZE_U64
}

/// Callers have checked that a name has at most 255 bytes.
pub(super) fn push_name(out: &mut Vec<u8>, name: &[u8]) {
    out.push(u8::try_from(name.len()).expect("names have at most 255 bytes"));
    out.extend_from_slice(name);
}
