//! Captures of real QEMUs (`testdata/README.md` says how they were made).

use qemu_glue::stream::{
    Command, EndWatch, Event, Limits, PAGE_SIZE, Parser, Phase, StreamError, TailState, Writer,
    xbzrle,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// A stream that is parsed and written again is the same, whatever pieces it comes in.
#[test]
fn every_capture_is_written_again_byte_for_byte() {
    for (name, bytes) in captures() {
        for piece in [1, 7, 4096, bytes.len()] {
            let mut writer = Writer::new();
            let mut written = Vec::new();
            let mut parser = Parser::new(Limits::default());
            for chunk in bytes.chunks(piece) {
                let result = parser.push(chunk, &mut |event| {
                    writer
                        .event(event)
                        .expect("the parser's order is the writer's");
                    Ok::<(), StreamError>(())
                });
                assert_eq!(result, Ok(()), "{name} in pieces of {piece}");
                written.append(&mut writer.take());
            }
            assert!(written == bytes, "{name} differs in pieces of {piece}");
        }
    }
}

/// The end is found at the last byte and nowhere before it, by a relay too, which sees all bytes.
#[test]
fn the_end_of_every_capture_is_its_last_byte() {
    for (name, bytes) in captures() {
        let described = !name.contains("no-description");
        let mut parser = Parser::new(Limits::default());
        let mut ends = Vec::new();
        let mut relay = EndWatch::new();
        for (at, chunk) in bytes.chunks(1).enumerate() {
            push(&mut parser, chunk);
            relay.push(chunk);
            let complete = parser.tail_state() == TailState::Complete;
            assert_eq!(
                relay.state() == TailState::Complete,
                complete,
                "{name} at {at}"
            );
            if parser.tail_state() == TailState::Complete {
                ends.push(at + 1);
            }
        }
        let expected = if described {
            vec![bytes.len()]
        } else {
            Vec::new()
        };
        assert_eq!(ends, expected, "{name}");
        let end = if described {
            Ok(())
        } else {
            Err(StreamError::NoDescription)
        };
        assert_eq!(parser.finish(), end, "{name}");
    }
}

/// A capture cut anywhere is an error that says so.
#[test]
fn a_cut_capture_is_an_error() {
    for (name, bytes) in captures() {
        let mut parser = Parser::new(Limits::default());
        // Every length in the head, around it and at the end; a prime step between.
        let mut at = 0;
        while at < bytes.len() {
            let step = if at < 2000 || at + 2000 > bytes.len() {
                1
            } else {
                997
            };
            let next = (at + step).min(bytes.len());
            assert!(
                matches!(
                    parser.finish(),
                    Err(StreamError::Truncated(_) | StreamError::NoDescription)
                ),
                "{name} cut at {at}"
            );
            push(&mut parser, &bytes[at..next]);
            at = next;
        }
    }
}

/// What each kind of capture is there to show is in it.
#[test]
fn captures_hold_what_they_are_for() {
    for (name, bytes) in captures() {
        let told = told(&bytes);
        assert_eq!(told.stopped, 1, "{name}");
        assert!(told.pages > 50 && told.zeroes > 1000, "{name}: {told:?}");
        let opens = told.commands.first() == Some(&Command::OpenReturnPath);
        assert_eq!(
            opens,
            name.contains("return-path"),
            "{name}: {:?}",
            told.commands
        );
        let announced = told.commands.contains(&Command::SwitchoverStart);
        assert_eq!(
            announced,
            name.contains("qemu-10.0"),
            "{name}: {:?}",
            told.commands
        );
        assert_eq!(
            told.changes > 0,
            name.contains("xbzrle"),
            "{name}: {told:?}"
        );
        let advised = told.commands.contains(&Command::PostcopyAdviseBitmaps);
        assert_eq!(
            advised,
            name.contains("dirty-bitmap"),
            "{name}: {:?}",
            told.commands
        );
        // QEMU sends bitmaps before the guest stops only in postcopy.
        let sections: &[&str] = if advised { &["complete", "setup"] } else { &[] };
        assert_eq!(
            told.sections.keys().copied().collect::<Vec<_>>(),
            sections,
            "{name}"
        );
    }
}

/// The changes of an xbzrle capture apply to the pages sent before, and the pages of the guest's
/// program hold at the end what it writes.
#[test]
fn changes_apply_to_the_versions_sent_before() {
    for (name, bytes) in captures()
        .into_iter()
        .filter(|(name, _)| name.contains("xbzrle"))
    {
        let mut pages = BTreeMap::<(u16, u32), Box<[u8; PAGE_SIZE]>>::new();
        let mut parser = Parser::new(Limits::default());
        let mut changes = 0;
        let result = parser.push(&bytes, &mut |event| {
            match event {
                Event::Page {
                    block,
                    page,
                    content,
                } => {
                    pages.insert((block, page), Box::new(*content));
                }
                Event::Zero { block, page } => {
                    pages.insert((block, page), Box::new([0; PAGE_SIZE]));
                }
                Event::Xbzrle {
                    block,
                    page,
                    encoded,
                } => {
                    let known = pages.get_mut(&(block, page)).expect("a page sent before");
                    xbzrle::apply(known, encoded).expect("a change that fits");
                    changes += 1;
                }
                Event::Head(_)
                | Event::Command(_)
                | Event::Blocks { .. }
                | Event::RamBegin(_)
                | Event::MultifdFlush
                | Event::RamEnd { .. }
                | Event::GuestStopped
                | Event::Section { .. }
                | Event::Tail(_) => {}
            }
            Ok::<(), StreamError>(())
        });
        assert_eq!(result, Ok(()), "{name}");
        assert!(changes > 10, "{name}: {changes} changes");
        // The guest adds one to each byte of eight pages in turn, then again: at any instant two of
        // them differ by at most one.
        for pages_written in [0x20..0x28, 0x28..0x30] {
            let first = pages[&(0, pages_written.start)][0];
            let all = pages_written.flat_map(|page| pages[&(0, page)].iter());
            let steps: BTreeSet<u8> = all.map(|byte| byte.wrapping_sub(first)).collect();
            let near = [0, 1, 255]
                .iter()
                .filter(|step| steps.contains(step))
                .count();
            assert!(near == steps.len() && near < 3, "{name}: {steps:?}");
        }
    }
}

/// What a capture contains.
#[derive(Debug, Default)]
struct Told {
    commands: Vec<Command>,
    pages: u64,
    zeroes: u64,
    changes: u64,
    stopped: u32,
    sections: BTreeMap<&'static str, usize>,
}

fn told(bytes: &[u8]) -> Told {
    let mut told = Told::default();
    let mut parser = Parser::new(Limits::default());
    let result = parser.push(bytes, &mut |event| {
        match event {
            Event::Command(command) => told.commands.push(command),
            Event::Page { .. } => told.pages += 1,
            Event::Zero { .. } => told.zeroes += 1,
            Event::Xbzrle { .. } => told.changes += 1,
            Event::GuestStopped => told.stopped += 1,
            Event::Section { phase, bytes, .. } => {
                let phase = match phase {
                    Phase::Setup => "setup",
                    Phase::Iterate => "iterate",
                    Phase::Complete => "complete",
                };
                *told.sections.entry(phase).or_default() += bytes.len();
            }
            Event::Head(_)
            | Event::Blocks { .. }
            | Event::RamBegin(_)
            | Event::MultifdFlush
            | Event::RamEnd { .. }
            | Event::Tail(_) => {}
        }
        Ok::<(), StreamError>(())
    });
    assert_eq!(result, Ok(()));
    told
}

fn push(parser: &mut Parser, bytes: &[u8]) {
    let result = parser.push(bytes, &mut |_| Ok::<(), StreamError>(()));
    assert_eq!(result, Ok(()));
}

/// Every capture's name and bytes.
fn captures() -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/streams");
    let mut captures = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("captures are in the repository") {
        let path = entry.expect("a folder that can be read").path();
        let name = path
            .file_stem()
            .expect("read_dir gives names")
            .to_string_lossy()
            .into_owned();
        let file = std::fs::File::open(&path).expect("a file that can be read");
        captures.push((name, zstd::decode_all(file).expect("captures are whole")));
    }
    captures.sort();
    assert_eq!(captures.len(), 9, "captures in {}", folder.display());
    captures
}
