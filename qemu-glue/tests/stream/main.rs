//! Tests of the migration stream's codec: captures of real QEMUs, the format byte by byte, and
//! properties that hold for any input.

mod codecs;
mod format;
mod golden;
mod properties;
mod sample;

use qemu_glue::stream::{Event, Limits, Parser, StreamError};

/// An event without its bytes, and a copy of what is needed of them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Head(usize),
    Command(qemu_glue::stream::Command),
    Blocks(Vec<(String, u32)>),
    RamBegin(qemu_glue::stream::Phase),
    Page(u16, u32, u8),
    Zero(u16, u32),
    Xbzrle(u16, u32, Vec<u8>),
    MultifdFlush,
    RamEnd(qemu_glue::stream::Phase, u64),
    GuestStopped,
    Section(qemu_glue::stream::Phase, usize, bool),
    Tail(usize),
}

impl From<Event<'_>> for Seen {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Head(bytes) => Self::Head(bytes.len()),
            Event::Command(command) => Self::Command(command),
            Event::Blocks { blocks, .. } => {
                Self::Blocks(blocks.iter().map(|b| (b.name.clone(), b.pages)).collect())
            }
            Event::RamBegin(phase) => Self::RamBegin(phase),
            Event::Page {
                block,
                page,
                content,
            } => Self::Page(block, page, content[0]),
            Event::Zero { block, page } => Self::Zero(block, page),
            Event::Xbzrle {
                block,
                page,
                encoded,
            } => Self::Xbzrle(block, page, encoded.to_vec()),
            Event::MultifdFlush => Self::MultifdFlush,
            Event::RamEnd { phase, pages } => Self::RamEnd(phase, pages),
            Event::GuestStopped => Self::GuestStopped,
            Event::Section { phase, bytes, last } => Self::Section(phase, bytes.len(), last),
            Event::Tail(bytes) => Self::Tail(bytes.len()),
        }
    }
}

/// Parses `bytes` in pieces of `piece`; what was seen, how it went, and the parser.
fn parse(bytes: &[u8], piece: usize) -> (Vec<Seen>, Result<(), StreamError>, Parser) {
    let mut parser = Parser::new(Limits::default());
    let mut seen = Vec::new();
    let result = bytes.chunks(piece).try_for_each(|chunk| {
        parser.push(chunk, &mut |event| {
            seen.push(Seen::from(event));
            Ok::<(), StreamError>(())
        })
    });
    (seen, result, parser)
}
