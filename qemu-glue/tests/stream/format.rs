//! The format byte by byte, and what is refused.

use super::sample::{DEVICES, TAIL, after_first_part, first_record, ram_start, sample};
use super::{Seen, parse};
use qemu_glue::stream::{
    Command, Event, Limits, PAGE_SIZE, Parser, Phase, Place, RamBlock, StreamError, TailState,
    WriteError, Writer,
};

/// A stream as 10.0 sends it with a return path, written by hand.
#[test]
fn an_annotated_stream() {
    let stream = sample();
    let expected = [
        Seen::Head(24 + 40),
        Seen::Command(Command::OpenReturnPath),
        Seen::Command(Command::Ping(1)),
        Seen::Blocks(vec![("pc.ram".into(), 4), ("pc.rom".into(), 1)]),
        Seen::RamEnd(Phase::Setup, 0),
        Seen::RamBegin(Phase::Iterate),
        Seen::Page(0, 0, 0x53),
        Seen::Zero(0, 1),
        Seen::Zero(1, 0),
        Seen::RamEnd(Phase::Iterate, 3),
        Seen::RamBegin(Phase::Iterate),
        Seen::Zero(1, 0),
        Seen::Xbzrle(0, 0, vec![0x00, 0x01, 0x54]),
        Seen::RamEnd(Phase::Iterate, 2),
        Seen::Command(Command::SwitchoverStart),
        Seen::GuestStopped,
        Seen::RamBegin(Phase::Complete),
        Seen::RamEnd(Phase::Complete, 0),
        Seen::Tail(TAIL),
    ];
    let (seen, result, parser) = parse(&stream, stream.len());
    assert_eq!((seen.as_slice(), result), (expected.as_slice(), Ok(())));
    assert_eq!(parser.tail_state(), TailState::Complete);
    assert_eq!(parser.finish(), Ok(()));
}

/// Every cut names the place.
#[test]
fn a_cut_says_where() {
    let stream = sample();
    let place = |cut: usize| parse(&stream[..cut], stream.len()).2.finish();
    assert_eq!(place(0), Err(StreamError::Truncated(Place::Head)));
    assert_eq!(place(24), Err(StreamError::Truncated(Place::Head)));
    assert_eq!(place(66), Err(StreamError::Truncated(Place::Sections)));
    assert_eq!(place(130), Err(StreamError::Truncated(Place::Ram)));
    assert_eq!(
        place(stream.len() - 1),
        Err(StreamError::Truncated(Place::Tail))
    );
    assert_eq!(
        place(stream.len() - TAIL + DEVICES + 1),
        Err(StreamError::NoDescription)
    );
}

/// A section that is not known is named, and nothing of the stream is lost for a relay.
#[test]
fn an_unknown_section_before_the_first_page_keeps_the_prelude() {
    let mut stream = sample()[..ram_start()].to_vec();
    stream.extend([0x01, 0, 0, 0, 9, 4]);
    stream.extend(b"skey\0\0\0\0\0\0\0\x01some bytes of it");
    for piece in [1, 7, stream.len()] {
        let (_, result, mut parser) = parse(&stream, piece);
        let error = result.unwrap_err();
        let section = StreamError::UnsupportedSection {
            name: "skey".into(),
            instance: 0,
            version: 1,
        };
        assert_eq!(error, section);
        assert!(error.may_relay() && parser.is_before_first_page());
        let prelude = parser.take_prelude().unwrap();
        assert!(stream.starts_with(&prelude) && prelude.len() >= ram_start() + 18);
        let again = parser.push(b"x", &mut |_| Ok::<(), StreamError>(()));
        assert_eq!(again, Err(StreamError::AlreadyFailed));
    }
}

/// The same section after the first page ends the migration.
#[test]
fn an_unknown_section_after_a_page_has_no_prelude() {
    let stream = sample();
    let (_, result, mut parser) = parse(&stream[..after_first_part()], 11);
    assert_eq!((result, parser.take_prelude()), (Ok(()), None));
    let result = parser.push(b"\x01\0\0\0\x09\x04skey\0\0\0\0\0\0\0\x01", &mut |_| Ok(()));
    assert!(matches!(
        result,
        Err(StreamError::UnsupportedSection { .. })
    ));
}

/// What is wrong with the frame is said exactly.
#[test]
fn wrong_frames_are_refused() {
    let ram = ram_start();
    let not_a_stream = |magic, version| StreamError::NotAStream { magic, version };
    check(0, b"QEVN", not_a_stream(0x5145_564e, 3));
    check(7, &[4], not_a_stream(0x5145_564d, 4));
    check(8, &[8], StreamError::SectionType(8));
    check(9, &[1], StreamError::HeadTooLarge { max: 1024 });
    let name = "Configuration/uuid".to_owned();
    check(26, b"C", StreamError::UnsupportedConfiguration { name });
    check(
        66,
        &[7],
        StreamError::UnsupportedCommand {
            number: 7,
            length: 0,
        },
    );
    check(
        68,
        &[9],
        StreamError::UnsupportedCommand {
            number: 1,
            length: 9,
        },
    );
    let (name, instance) = ("ram".to_owned(), 0);
    check(
        ram - 52,
        &[5],
        StreamError::UnsupportedSection {
            name,
            instance,
            version: 5,
        },
    );
    check(ram - 5, &[0x7d], StreamError::Footer { expected: 2 });
    check(ram - 1, &[3], StreamError::Footer { expected: 2 });
    check(ram + 4, &[3], StreamError::SectionNumber(3));
    check(ram, &[0x7e], StreamError::SectionType(0x7e));
    check(ram, &[0x00], StreamError::SectionType(0x00));
}

/// What is wrong with a record is said exactly.
#[test]
fn wrong_records_are_refused() {
    let part = first_record();
    let wrong = StreamError::RamRecord;
    let unsupported = |flags| StreamError::UnsupportedRamRecord { flags };
    check(part, &[1], wrong("a page outside its block"));
    check(part + 5, &[0, 0x40], wrong("a page outside its block"));
    check(part + 7, &[0x28], wrong("no block to continue"));
    check(part + 6, &[0x01, 0x08], unsupported(0x108));
    check(part + 7, &[0x0a], unsupported(0x00a));
    check(
        part + 7,
        &[0x04],
        StreamError::Blocks("a second or an empty list"),
    );
    check(part + 9, b"qc.ram", wrong("an unknown block"));
    let filled = part + 8 + 7 + PAGE_SIZE + 8;
    check(filled, &[1], wrong("a filled page that is not zero"));
}

/// Nothing stands in the ram section before its block list.
#[test]
fn records_before_the_block_list_are_refused() {
    for record in [b"\0\0\0\0\0\0\x02\0", b"\0\0\0\0\0\0\0\x10"] {
        check(ram_start() - 51, record, StreamError::Blocks("no list"));
    }
}

/// A block list that lies is refused.
#[test]
fn block_lists_are_checked() {
    let list = |total: u64, blocks: &[(&[u8], u64)]| {
        let mut bytes = sample()[..ram_start() - 51].to_vec();
        bytes.extend((total | 4).to_be_bytes());
        for (name, size) in blocks {
            bytes.push(u8::try_from(name.len()).unwrap());
            bytes.extend(*name);
            bytes.extend(size.to_be_bytes());
        }
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2]);
        parse(&bytes, 3).1
    };
    let wrong = |what| Err(StreamError::Blocks(what));
    let huge = 1 << 44;
    assert_eq!(list(0x2000, &[(b"a", 0x1000), (b"b", 0x1000)]), Ok(()));
    assert_eq!(
        list(0x2000, &[(b"a", 0x1000), (b"a", 0x1000)]),
        wrong("two blocks of one name")
    );
    assert_eq!(
        list(0x1000, &[(b"a", 0x2000)]),
        wrong("blocks larger than their total")
    );
    let unaligned = wrong("a size that is not a multiple of the page size");
    assert_eq!(list(0x1000, &[(b"a", 0x800)]), unaligned);
    assert_eq!(list(0x1000, &[(b"a", 0)]), unaligned);
    assert_eq!(
        list(0x1000, &[(b"", 0x1000)]),
        wrong("a block without a name")
    );
    assert_eq!(
        list(0x1000, &[(b"\xff", 0x1000)]),
        wrong("a name that is not text")
    );
    assert_eq!(list(huge, &[(b"a", huge)]), wrong("a block too large"));
    assert_eq!(list(0, &[]), wrong("a second or an empty list"));
}

/// Each limit holds.
#[test]
fn limits_are_reached() {
    let push = |limits: Limits, bytes: &[u8], piece: usize| {
        let mut parser = Parser::new(limits);
        let mut sink = |_: Event<'_>| Ok::<(), StreamError>(());
        bytes
            .chunks(piece)
            .try_for_each(|chunk| parser.push(chunk, &mut sink))
    };
    let stream = sample();
    let (head_bytes_max, prelude_bytes_max) = (63, 200);
    let limits = Limits {
        head_bytes_max,
        ..Limits::default()
    };
    assert_eq!(
        push(limits, &stream, 10),
        Err(StreamError::HeadTooLarge { max: 63 })
    );
    let limits = Limits {
        blocks_max: 1,
        ..Limits::default()
    };
    assert_eq!(
        push(limits, &stream, 10),
        Err(StreamError::Blocks("too many blocks"))
    );
    let limits = Limits {
        prelude_bytes_max,
        ..Limits::default()
    };
    let mut pings = stream[..64].to_vec();
    for _ in 0..20 {
        pings.extend(b"\x08\0\x02\0\x04\0\0\0\x01");
    }
    assert_eq!(
        push(limits, &pings, 10),
        Err(StreamError::PreludeTooLarge { max: 200 })
    );
}

/// A guest's device state that imitates a description does not end the stream for good.
#[test]
fn an_imitated_description_is_not_the_end() {
    let stream = sample();
    let start = stream.len() - TAIL;
    let description = &stream[start + DEVICES..];
    // Two of impossible length, a whole one, one that the true one cuts, one that is no JSON.
    let mut tail = stream[start..start + DEVICES].to_vec();
    tail.extend(b"\0\x06\0\0\0\0{\0\x06\xff\xff\xff\xff{");
    tail.extend(description);
    let imitated = tail.len();
    tail.extend(b"more device state\0\x06\0\0\x10\0{\"page_size\": 4096, ");
    tail.extend(b"\0\x06\0\0\0\x08{\"other\"}");
    tail.extend(description);
    let (_, result, mut parser) = parse(&stream[..start], 64);
    assert_eq!(result, Ok(()));
    for (at, byte) in tail.iter().enumerate() {
        parser
            .push(&[*byte], &mut |_| Ok::<(), StreamError>(()))
            .unwrap();
        let complete = at + 1 == imitated || at + 1 == tail.len();
        let expected = if complete {
            TailState::Complete
        } else {
            TailState::Open
        };
        assert_eq!(
            parser.tail_state(),
            expected,
            "after {} of {}",
            at + 1,
            tail.len()
        );
    }
}

/// A sink's error comes back and ends the stream.
#[test]
fn a_sink_can_stop_the_parser() {
    #[derive(Debug, PartialEq)]
    enum Stopped {
        Full,
        Stream(StreamError),
    }
    impl From<StreamError> for Stopped {
        fn from(error: StreamError) -> Self {
            Self::Stream(error)
        }
    }
    let mut parser = Parser::new(Limits::default());
    let mut sink = |event: Event<'_>| {
        if matches!(event, Event::Page { .. }) {
            Err(Stopped::Full)
        } else {
            Ok(())
        }
    };
    assert_eq!(parser.push(&sample(), &mut sink), Err(Stopped::Full));
    let failed = Stopped::Stream(StreamError::AlreadyFailed);
    assert_eq!(parser.push(b"", &mut sink), Err(failed));
    assert_eq!(parser.finish(), Err(StreamError::AlreadyFailed));
}

/// A writer that is used wrongly says so and writes nothing.
#[test]
fn the_writer_keeps_the_order() {
    let blocks = [RamBlock {
        name: "a".into(),
        pages: 2,
    }];
    let mut writer = Writer::new();
    assert_eq!(
        writer.ram_begin(Phase::Iterate),
        Err(WriteError::OutOfOrder("a ram section"))
    );
    assert_eq!(writer.zero(0, 0), Err(WriteError::OutOfOrder("a page")));
    assert_eq!(
        writer.ram_end(),
        Err(WriteError::OutOfOrder("a ram section's end"))
    );
    assert_eq!(writer.ram_start(1, &[]), Err(WriteError::Blocks));
    let long = [RamBlock {
        name: "a".repeat(256),
        pages: 1,
    }];
    assert_eq!(writer.ram_start(1, &long), Err(WriteError::Blocks));
    assert!(writer.is_empty());
    writer.ram_start(1, &blocks).unwrap();
    writer.ram_end().unwrap();
    assert_eq!(
        writer.ram_start(1, &blocks),
        Err(WriteError::OutOfOrder("the block list"))
    );
    writer.ram_begin(Phase::Complete).unwrap();
    let length = writer.len();
    assert_eq!(
        writer.zero(0, 2),
        Err(WriteError::NoSuchPage { block: 0, page: 2 })
    );
    assert_eq!(
        writer.zero(1, 0),
        Err(WriteError::NoSuchPage { block: 1, page: 0 })
    );
    assert_eq!(writer.xbzrle(0, 0, &[]), Err(WriteError::XbzrleLength(0)));
    assert_eq!(
        writer.command(Command::Ping(1)),
        Err(WriteError::OutOfOrder("a command"))
    );
    assert_eq!(
        writer.relayed(b"x"),
        Err(WriteError::OutOfOrder("another section"))
    );
    assert_eq!(writer.len(), length);
    writer.ram_end().unwrap();
    assert_eq!(
        writer.ram_begin(Phase::Iterate),
        Err(WriteError::OutOfOrder("a ram section"))
    );
}

/// The sample with `bytes` at `at` is refused like this.
fn check(at: usize, bytes: &[u8], expected: StreamError) {
    let mut stream = sample();
    stream[at..at + bytes.len()].copy_from_slice(bytes);
    assert_eq!(parse(&stream, 5).1, Err(expected), "{bytes:x?} at {at}");
}
