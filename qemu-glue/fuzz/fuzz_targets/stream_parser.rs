//! The stream parser and writer on any bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_glue::stream::{Event, Limits, PAGE_SIZE, Parser, StreamError, Writer, xbzrle};

fuzz_target!(|input: &[u8]| {
    let Some((&piece, stream)) = input.split_first() else {
        return;
    };
    let piece = usize::from(piece) + 1;
    let (whole, result, written) = parse(stream, stream.len().max(1));
    let (pieces, result_in_pieces, _) = parse(stream, piece);
    assert_eq!(result, result_in_pieces);
    assert!(whole == pieces, "the events depend on the pieces");
    let (again, result, _) = parse(&written, piece);
    assert_eq!(result, Ok(()), "what was written is refused");
    // A head alone is not told before the byte behind it.
    assert!(whole == again || again.is_empty(), "what was written is read differently");
});

/// The events as comparable text, how it ended, and what a writer made of the events.
fn parse(stream: &[u8], piece: usize) -> (Vec<u8>, Result<(), StreamError>, Vec<u8>) {
    let mut parser = Parser::new(Limits::default());
    let mut writer = Writer::new();
    let mut told = Vec::new();
    let mut page = [0; PAGE_SIZE];
    let mut sink = |event: Event<'_>| {
        writer
            .event(event)
            .expect("the parser's order is the writer's");
        tell(&mut told, event);
        if let Event::Xbzrle { encoded, .. } = event {
            match xbzrle::apply(&mut page, encoded) {
                Ok(()) => {}
                Err(error) => assert!(error.at <= encoded.len()),
            }
        }
        Ok::<(), StreamError>(())
    };
    let result = stream
        .chunks(piece)
        .try_for_each(|chunk| parser.push(chunk, &mut sink));
    (told, result, writer.take())
}

/// Everything of an event but where its pieces begin and end.
fn tell(told: &mut Vec<u8>, event: Event<'_>) {
    match event {
        Event::Tail(bytes)
        | Event::Section {
            bytes, last: false, ..
        } => told.extend(bytes),
        Event::Page {
            block,
            page,
            content,
        } => {
            told.extend(format!("page {block} {page}").bytes());
            told.extend(content);
        }
        Event::Head(_)
        | Event::Command(_)
        | Event::Blocks { .. }
        | Event::RamBegin(_)
        | Event::Zero { .. }
        | Event::Xbzrle { .. }
        | Event::MultifdFlush
        | Event::RamEnd { .. }
        | Event::GuestStopped
        | Event::Section { last: true, .. } => told.extend(format!("{event:?}").bytes()),
    }
}
