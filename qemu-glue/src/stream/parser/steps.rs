//! One step per state: a record is read, the state changes, the sink gets its event.

use super::super::bitmap::{self, Chunk};
use super::super::cursor::Cursor;
use super::super::ram::Record;
use super::super::section::{self, Next};
use super::super::{
    BITMAP_SECTION, BITMAP_SECTION_VERSION, Command, Event, Phase, RAM_SECTION,
    RAM_SECTION_VERSION, StreamError, TYPE_EOF, TYPE_FULL, TYPE_SUBSECTION, head,
};
use super::{Done, Halt, Iterable, Parser, State};

impl Parser {
    pub(super) fn head_start<E: From<StreamError>>(&mut self, cursor: &mut Cursor<'_>) -> Done<E> {
        head::start(cursor)?;
        self.head_grows(cursor.read())?;
        self.state = State::HeadNext;
        Ok(())
    }

    pub(super) fn head_next<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        if cursor.peek()? == TYPE_SUBSECTION {
            head::subsection(cursor)?;
            self.head_grows(cursor.read())?;
            return Ok(());
        }
        self.state = State::Between;
        sink(Event::Head(&std::mem::take(&mut self.head))).map_err(Halt::Failed)
    }

    fn head_grows(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let max = self.limits.head_bytes_max;
        if self.head.len() + bytes.len() > max {
            return Err(StreamError::HeadTooLarge { max });
        }
        self.head.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn between<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let kind = cursor.peek()?;
        if matches!(self.ram, Iterable::Ended { .. }) && matches!(kind, TYPE_FULL | TYPE_EOF) {
            self.state = State::Tail;
            return Ok(());
        }
        match section::next(cursor)? {
            Next::Command(command) => {
                sink(Event::Command(command)).map_err(Halt::Failed)?;
                if command == Command::SwitchoverStart {
                    self.guest_stops(sink)?;
                }
                Ok(())
            }
            Next::Named {
                full: false,
                id,
                name: RAM_SECTION,
                instance: 0,
                version,
            } if version == RAM_SECTION_VERSION => {
                self.start(id, |parser| &mut parser.ram)?;
                self.state = State::Ram(Phase::Setup);
                Ok(())
            }
            Next::Named {
                full: false,
                id,
                name: BITMAP_SECTION,
                instance: 0,
                version,
            } if version == BITMAP_SECTION_VERSION => {
                self.start(id, |parser| &mut parser.bitmap)?;
                self.bitmap_begins(cursor.read(), Phase::Setup, sink)
            }
            Next::Named {
                name,
                instance,
                version,
                ..
            } => Err(Next::unsupported(name, instance, version).into()),
            Next::Numbered { phase, id } => self.numbered(cursor.read(), phase, id, sink),
            Next::Eof => Err(StreamError::SectionType(TYPE_EOF).into()),
        }
    }

    /// Notes the number of an iterable section; each starts once, under its own number.
    fn start(
        &mut self,
        id: u32,
        which: impl Fn(&mut Self) -> &mut Iterable,
    ) -> Result<(), StreamError> {
        let taken = self.ram.id() == Some(id) || self.bitmap.id() == Some(id);
        let iterable = which(self);
        if taken || *iterable != Iterable::Unseen {
            return Err(StreamError::SectionNumber(id));
        }
        *iterable = Iterable::Started { id };
        Ok(())
    }

    /// A PART or END section.
    fn numbered<E: From<StreamError>>(
        &mut self,
        header: &[u8],
        phase: Phase,
        id: u32,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let section = Iterable::Started { id };
        if section != self.ram && section != self.bitmap {
            return Err(StreamError::SectionNumber(id).into());
        }
        if phase == Phase::Complete {
            self.guest_stops(sink)?;
        }
        if section == self.ram {
            self.section_pages = 0;
            self.state = State::Ram(phase);
            return sink(Event::RamBegin(phase)).map_err(Halt::Failed);
        }
        self.bitmap_begins(header, phase, sink)
    }

    fn guest_stops<E>(&mut self, sink: &mut impl FnMut(Event<'_>) -> Result<(), E>) -> Done<E> {
        if std::mem::replace(&mut self.guest_stopped, true) {
            return Ok(());
        }
        sink(Event::GuestStopped).map_err(Halt::Failed)
    }

    pub(super) fn ram_record<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        phase: Phase,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let record = self.blocks.read_record(cursor)?;
        if self.blocks.is_empty() && !matches!(record, Record::BlockList { .. }) {
            return Err(StreamError::Blocks("no list").into());
        }
        let event = match record {
            Record::Page {
                block,
                page,
                content,
            } => Event::Page {
                block,
                page,
                content,
            },
            Record::Zero { block, page } => Event::Zero { block, page },
            Record::Xbzrle {
                block,
                page,
                encoded,
            } => Event::Xbzrle {
                block,
                page,
                encoded,
            },
            Record::MultifdFlush => return sink(Event::MultifdFlush).map_err(Halt::Failed),
            Record::BlockList { bytes } => {
                if phase != Phase::Setup || !self.blocks.is_empty() || bytes == 0 {
                    return Err(StreamError::Blocks("a second or an empty list").into());
                }
                self.state = State::BlockList { bytes_left: bytes };
                return Ok(());
            }
            Record::EndOfSection => {
                self.state = State::RamFooter(phase);
                return Ok(());
            }
        };
        if phase == Phase::Setup {
            return Err(StreamError::RamRecord("a page in the first section").into());
        }
        self.prelude = None;
        self.section_pages += 1;
        sink(event).map_err(Halt::Failed)
    }

    pub(super) fn block_entry<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        bytes_left: u64,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let bytes_left = self
            .blocks
            .read_entry(cursor, bytes_left, self.limits.blocks_max)?;
        if bytes_left > 0 {
            self.state = State::BlockList { bytes_left };
            return Ok(());
        }
        self.state = State::Ram(Phase::Setup);
        let section_id = self
            .ram
            .id()
            .expect("the list stands inside ram's START section");
        sink(Event::Blocks {
            section_id,
            blocks: self.blocks.list(),
        })
        .map_err(Halt::Failed)
    }

    pub(super) fn ram_footer<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        phase: Phase,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let id = self.ram.id().expect("a ram section is being read");
        section::footer(cursor, id)?;
        if phase == Phase::Complete {
            self.ram = Iterable::Ended { id };
            self.prelude = None;
        }
        self.state = State::Between;
        sink(Event::RamEnd {
            phase,
            pages: self.section_pages,
        })
        .map_err(Halt::Failed)
    }

    fn bitmap_begins<E: From<StreamError>>(
        &mut self,
        header: &[u8],
        phase: Phase,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        self.state = State::Bitmap(phase);
        sink(Event::Section {
            phase,
            bytes: header,
            last: false,
        })
        .map_err(Halt::Failed)
    }

    pub(super) fn bitmap_chunk<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        phase: Phase,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let Chunk { data_bytes, last } = bitmap::read_chunk(cursor)?;
        self.state = match (data_bytes, last) {
            (0, false) => State::Bitmap(phase),
            (0, true) => State::BitmapFooter(phase),
            (left, last) => State::BitmapBytes { phase, left, last },
        };
        sink(Event::Section {
            phase,
            bytes: cursor.read(),
            last: false,
        })
        .map_err(Halt::Failed)
    }

    pub(super) fn bitmap_bytes<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        phase: Phase,
        left: u64,
        last: bool,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let bytes = cursor.take_up_to(left)?;
        self.state = match (left - bytes.len() as u64, last) {
            (0, false) => State::Bitmap(phase),
            (0, true) => State::BitmapFooter(phase),
            (left, last) => State::BitmapBytes { phase, left, last },
        };
        sink(Event::Section {
            phase,
            bytes,
            last: false,
        })
        .map_err(Halt::Failed)
    }

    pub(super) fn bitmap_footer<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        phase: Phase,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let id = self
            .bitmap
            .id()
            .expect("a dirty-bitmap section is being read");
        section::footer(cursor, id)?;
        if phase == Phase::Complete {
            self.bitmap = Iterable::Ended { id };
        }
        self.state = State::Between;
        sink(Event::Section {
            phase,
            bytes: cursor.read(),
            last: true,
        })
        .map_err(Halt::Failed)
    }

    pub(super) fn tail_bytes<E: From<StreamError>>(
        &mut self,
        cursor: &mut Cursor<'_>,
        sink: &mut impl FnMut(Event<'_>) -> Result<(), E>,
    ) -> Done<E> {
        let bytes = cursor.take_up_to(u64::MAX)?;
        self.tail.push(bytes);
        sink(Event::Tail(bytes)).map_err(Halt::Failed)
    }
}
