//! Properties that hold for any input.

use super::{Seen, parse};
use proptest::prelude::*;
use qemu_glue::stream::{
    Command, Limits, PAGE_SIZE, Parser, Phase, RamBlock, StreamError, Writer, return_path, xbzrle,
};

proptest! {
    /// Random bytes, alone and behind a proper beginning, end in an error or in more to come.
    #[test]
    fn any_bytes_are_parsed_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..4096),
        piece in 1_usize..100,
        start in 0_usize..5,
    ) {
        let mut stream = written(&calls(), start);
        stream.extend(bytes);
        let (_, whole, _) = parse(&stream, stream.len().max(1));
        let (_, pieces, _) = parse(&stream, piece);
        prop_assert_eq!(whole, pieces);
    }

    /// A proper stream with some bytes changed behaves the same in any pieces.
    #[test]
    fn changed_streams_do_not_depend_on_the_split(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        piece in 1_usize..5000,
    ) {
        let mut stream = written(&calls(), usize::MAX);
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let (seen, whole, _) = parse(&stream, stream.len());
        let (seen_in_pieces, pieces, _) = parse(&stream, piece);
        prop_assert_eq!(whole, pieces);
        prop_assert_eq!(joined(seen), joined(seen_in_pieces));
    }

    /// What is written is read again, in any pieces.
    #[test]
    fn what_is_written_is_read(calls in any_calls(), piece in 1_usize..5000) {
        let stream = written(&calls, usize::MAX);
        let (seen, result, _) = parse(&stream, piece);
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(seen, calls);
    }

    /// A stream that is read and written again is the same.
    #[test]
    fn what_is_read_is_written_again(calls in any_calls()) {
        let stream = written(&calls, usize::MAX);
        let (mut parser, mut writer) = (Parser::new(Limits::default()), Writer::new());
        let result = parser.push(&stream, &mut |event| {
            writer.event(event).unwrap();
            Ok::<(), StreamError>(())
        });
        prop_assert_eq!(result, Ok(()));
        prop_assert!(writer.take() == stream);
    }

    /// A change that is encoded leads from the old page to the new one.
    #[test]
    fn changes_are_applied(
        before in any::<u8>(),
        runs in prop::collection::vec((0..PAGE_SIZE, 1_usize..200, any::<u8>()), 0..20),
    ) {
        let before = [before; PAGE_SIZE];
        let mut after = before;
        for (at, length, byte) in runs {
            let end = (at + length).min(PAGE_SIZE);
            after[at..end].fill(byte);
        }
        match xbzrle::encode(&before, &after) {
            None => prop_assert!(before == after || after.iter().filter(|b| **b != before[0]).count() > 1000),
            Some(encoded) => {
                prop_assert!(encoded.len() < PAGE_SIZE);
                let mut page = before;
                prop_assert_eq!(xbzrle::apply(&mut page, &encoded), Ok(()));
                prop_assert!(page == after);
            }
        }
    }

    /// Any bytes as a change: refused, or applied.
    #[test]
    fn any_change_is_applied_or_refused(encoded in prop::collection::vec(any::<u8>(), 0..5000)) {
        let mut page = [0; PAGE_SIZE];
        match xbzrle::apply(&mut page, &encoded) {
            Ok(()) => prop_assert!(encoded.len() <= 3 * PAGE_SIZE),
            Err(error) => prop_assert!(error.at <= encoded.len()),
        }
    }

    /// Messages of the return path are read as they were written, in any pieces.
    #[test]
    fn messages_are_read(
        messages in prop::collection::vec(any_message(), 0..20),
        piece in 1_usize..50,
    ) {
        let mut bytes = Vec::new();
        for message in &messages {
            message.encode(&mut bytes);
        }
        let (mut parser, mut seen) = (return_path::Parser::new(), Vec::new());
        for chunk in bytes.chunks(piece) {
            prop_assert_eq!(parser.push(chunk, &mut |message| seen.push(message)), Ok(()));
        }
        prop_assert_eq!(seen, messages);
        prop_assert_eq!(parser.finish(), Ok(()));
    }

    /// Any bytes on the return path behave the same in any pieces.
    #[test]
    fn any_message_is_read_or_refused(
        bytes in prop::collection::vec(prop_oneof![0_u8..14, any::<u8>()], 0..400),
        piece in 1_usize..50,
    ) {
        let read = |piece: usize| {
            let (mut parser, mut seen) = (return_path::Parser::new(), Vec::new());
            let result = bytes
                .chunks(piece)
                .try_for_each(|chunk| parser.push(chunk, &mut |message| seen.push(message)));
            (seen, result)
        };
        prop_assert_eq!(read(piece), read(bytes.len().max(1)));
    }
}

/// A writer's calls are told by what a parser should see.
fn any_calls() -> impl Strategy<Value = Vec<Seen>> {
    let pages = prop::collection::vec(1_u32..3000, 1..5);
    let sections = prop::collection::vec(
        prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8, any::<u32>()), 0..6),
        0..6,
    );
    (pages, sections, any::<u32>()).prop_map(|(pages, sections, ping)| {
        let blocks: Vec<_> = pages
            .iter()
            .enumerate()
            .map(|(at, pages)| (format!("block-{at}"), *pages))
            .collect();
        let mut calls = beginning(blocks.clone());
        let count = sections.len();
        for (index, records) in sections.into_iter().enumerate() {
            let phase = if index + 1 == count {
                Phase::Complete
            } else {
                Phase::Iterate
            };
            match phase {
                Phase::Complete => calls.push(Seen::GuestStopped),
                Phase::Setup | Phase::Iterate => calls.push(Seen::Command(Command::Ping(ping))),
            }
            calls.push(Seen::RamBegin(phase));
            let mut seen = 0;
            for (at, kind, value) in records {
                let at = at.index(blocks.len());
                let page = value % blocks[at].1;
                let block = u16::try_from(at).expect("at most four blocks");
                let byte = value.to_le_bytes()[3];
                seen += u64::from(kind != 3);
                calls.push(match kind {
                    0 => Seen::Page(block, page, byte),
                    1 => Seen::Zero(block, page),
                    2 => Seen::Xbzrle(block, page, vec![byte; usize::from(byte) + 1]),
                    _ => Seen::MultifdFlush,
                });
            }
            calls.push(Seen::RamEnd(phase, seen));
        }
        calls
    })
}

fn beginning(blocks: Vec<(String, u32)>) -> Vec<Seen> {
    vec![
        Seen::Head(HEAD.len()),
        Seen::Command(Command::OpenReturnPath),
        Seen::Command(Command::PostcopyAdviseBitmaps),
        Seen::Blocks(blocks),
        Seen::RamEnd(Phase::Setup, 0),
    ]
}

/// One fixed stream, to be changed.
fn calls() -> Vec<Seen> {
    let mut calls = beginning(vec![("pc.ram".into(), 16), ("pc.rom".into(), 2)]);
    calls.extend([
        Seen::RamBegin(Phase::Iterate),
        Seen::Page(0, 3, 1),
        Seen::Zero(1, 1),
        Seen::Xbzrle(0, 3, vec![0, 1, 1]),
        Seen::RamEnd(Phase::Iterate, 3),
        Seen::GuestStopped,
        Seen::RamBegin(Phase::Complete),
        Seen::RamEnd(Phase::Complete, 0),
    ]);
    calls
}

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

/// The bytes of the first `count` calls.
fn written(calls: &[Seen], count: usize) -> Vec<u8> {
    let mut writer = Writer::new();
    for call in calls.iter().take(count) {
        let result = match call {
            Seen::Head(_) => writer.head(HEAD),
            Seen::Command(command) => writer.command(*command),
            Seen::Blocks(blocks) => {
                let named = |(name, pages): &(String, u32)| RamBlock {
                    name: name.clone(),
                    pages: *pages,
                };
                writer.ram_start(7, &blocks.iter().map(named).collect::<Vec<_>>())
            }
            Seen::RamBegin(phase) => writer.ram_begin(*phase),
            Seen::Page(block, page, byte) => writer.page(*block, *page, &[*byte; PAGE_SIZE]),
            Seen::Zero(block, page) => writer.zero(*block, *page),
            Seen::Xbzrle(block, page, encoded) => writer.xbzrle(*block, *page, encoded),
            Seen::MultifdFlush => writer.multifd_flush(),
            Seen::RamEnd(..) => writer.ram_end(),
            Seen::GuestStopped => Ok(()),
            Seen::Section(..) | Seen::Tail(_) => unreachable!("no call makes these"),
        };
        assert_eq!(result, Ok(()));
    }
    writer.take()
}

/// Pieces of sections and tails come as the input does: joined, they are the same.
fn joined(seen: Vec<Seen>) -> Vec<Seen> {
    let mut joined: Vec<Seen> = Vec::new();
    for event in seen {
        match (joined.last_mut(), &event) {
            (Some(Seen::Tail(sum)), Seen::Tail(more)) => *sum += more,
            (Some(Seen::Section(phase, sum, last)), Seen::Section(next, more, ends))
                if phase == next && !*last =>
            {
                *sum += more;
                *last = *ends;
            }
            _ => joined.push(event),
        }
    }
    joined
}

fn any_message() -> impl Strategy<Value = return_path::Message> {
    use return_path::Message;
    let name = prop::collection::vec(any::<u8>(), 1..=255);
    prop_oneof![
        any::<u32>().prop_map(Message::Shut),
        any::<u32>().prop_map(Message::Pong),
        Just(Message::SwitchoverAck),
        (prop::option::of(name), any::<u64>(), any::<u32>()).prop_map(|(block, start, length)| {
            Message::RequestPages {
                block,
                start,
                length,
            }
        }),
    ]
}
