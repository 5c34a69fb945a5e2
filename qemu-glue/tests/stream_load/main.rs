//! Streams made by the writer, loaded by a real QEMU: one version of each page, in an order of our
//! own, with a return path that the source did not ask for. What QEMU then holds is read back by
//! migrating it out again and compared page by page.
//!
//! Needs QEMU 10 as `qemu-system-x86_64`; without it the tests say so, and fail with REQUIRE_ALL=1.

mod postcopy;

use qemu_glue::stream::return_path::{self, Message};
use qemu_glue::stream::{
    Command, Event, Limits, PAGE_SIZE, Parser, Phase, RamBlock, StreamError, TailState, Writer,
    xbzrle,
};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

const DEVICES: &[&str] = &[
    "-device",
    "VGA,vgamem_mb=1",
    "-device",
    "virtio-balloon-pci",
    "-netdev",
    "socket,id=n0,udp=127.0.0.1:9,localaddr=127.0.0.1:0",
    "-device",
    "virtio-net-pci,netdev=n0,romfile=",
    "-uuid",
    "11223344-5566-7788-99aa-bbccddeeff00",
];
const DISK: &[&str] = &[
    "-blockdev",
    "null-co,node-name=disk,size=1073741824,read-zeroes=on",
    "-device",
    "virtio-blk-pci,drive=disk",
];
/// Longest wait for QEMU: it needs well below a second on an idle machine.
const WAIT: Duration = Duration::from_secs(60);
/// Questions until QEMU must have reached a state: it answers some thousand a second.
const ASK_MAX: usize = 200_000;

/// A stream of 10.0 without a return path.
#[test]
fn qemu_10_loads_pages_in_our_order() {
    loads("qemu-10.0-plain", "pc-q35-10.0", DEVICES, &[]);
}

/// A stream of 7.2, loaded by 10.0 as that machine.
#[test]
fn qemu_10_loads_a_stream_of_7_2() {
    loads("qemu-7.2-plain", "pc-q35-7.2", DEVICES, &[]);
}

/// A stream with dirty bitmaps: they are there afterwards.
#[test]
fn qemu_10_loads_dirty_bitmaps() {
    let named = ["\"name\": \"changed\"", "\"name\": \"untouched\""];
    loads("qemu-10.0-dirty-bitmap", "pc-i440fx-10.0", DISK, &named);
}

/// Changes, applied here, against QEMU's own pages: the stream is loaded as it was captured.
#[test]
fn qemu_10_applies_the_same_changes() {
    let Some(mut qemu) = Qemu::start("xbzrle", "pc-i440fx-10.0", &[]) else {
        return;
    };
    let bytes = capture("qemu-10.0-xbzrle");
    let image = Image::of(&bytes);
    qemu.ask(
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#,
    );
    let mut socket = qemu.incoming();
    socket.write_all(&bytes).expect("QEMU reads the stream");
    drop(socket);
    qemu.wait_until_loaded();
    image.compare(&Image::of(&qemu.migrate_out()));
}

/// Writes the capture anew, lets QEMU load it, and compares; `named` must be in its block nodes.
fn loads(name: &str, machine: &str, arguments: &[&str], named: &[&str]) {
    let Some(mut qemu) = Qemu::start(name, machine, arguments) else {
        return;
    };
    let image = Image::of(&capture(name));
    let mut socket = qemu.incoming();
    socket
        .write_all(&image.write_anew())
        .expect("QEMU reads the stream");
    let messages = answers(&mut socket);
    assert_eq!(
        messages,
        [Message::Pong(7), Message::Pong(8), Message::Shut(0)],
        "{name}"
    );
    let nodes = qemu.ask(r#"{"execute":"query-named-block-nodes"}"#);
    for name in named {
        assert!(nodes.contains(name), "{name} in {nodes}");
    }
    image.compare(&Image::of(&qemu.migrate_out()));
}

/// The messages of a target up to its SHUT.
fn answers(socket: &mut UnixStream) -> Vec<Message> {
    let mut parser = return_path::Parser::new();
    let mut messages = Vec::new();
    let mut bytes = [0; 64];
    while !matches!(messages.last(), Some(Message::Shut(_))) {
        let count = socket.read(&mut bytes).expect("QEMU answers in time");
        assert_ne!(count, 0, "QEMU closed after {messages:?}");
        let result = parser.push(&bytes[..count], &mut |message| messages.push(message));
        assert_eq!(result, Ok(()));
    }
    messages
}

/// What a stream says: its parts, and each page's last version.
#[derive(Clone, Default)]
struct Image {
    head: Vec<u8>,
    section_id: u32,
    blocks: Vec<RamBlock>,
    pages: BTreeMap<(u16, u32), Box<[u8; PAGE_SIZE]>>,
    setup: Vec<u8>,
    complete: Vec<u8>,
    tail: Vec<u8>,
}

impl Image {
    fn of(stream: &[u8]) -> Self {
        let mut image = Self::default();
        let mut parser = Parser::new(Limits::default());
        let result = parser.push(stream, &mut |event| {
            image.take(event);
            Ok::<(), StreamError>(())
        });
        assert_eq!(result, Ok(()));
        assert_eq!(parser.tail_state(), TailState::Complete);
        image
    }

    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Head(bytes) => self.head.extend(bytes),
            Event::Blocks { section_id, blocks } => {
                (self.section_id, self.blocks) = (section_id, blocks.to_vec());
            }
            Event::Page {
                block,
                page,
                content,
            } => {
                self.pages.insert((block, page), Box::new(*content));
            }
            Event::Zero { block, page } => {
                self.pages.insert((block, page), Box::new([0; PAGE_SIZE]));
            }
            Event::Xbzrle {
                block,
                page,
                encoded,
            } => {
                let known = self
                    .pages
                    .get_mut(&(block, page))
                    .expect("a page sent before");
                xbzrle::apply(known, encoded).expect("a change that fits");
            }
            Event::Section {
                phase: Phase::Complete,
                bytes,
                ..
            } => self.complete.extend(bytes),
            Event::Section { bytes, .. } => self.setup.extend(bytes),
            Event::Tail(bytes) => self.tail.extend(bytes),
            Event::Command(_) | Event::RamBegin(_) | Event::RamEnd { .. } => {}
            Event::MultifdFlush | Event::GuestStopped => {}
        }
    }

    /// Every page once, the highest first and block after block in turn, in sections of 100; zero
    /// pages of the main memory left out; a return path and two pings put in.
    fn write_anew(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        self.try_write_anew(&mut writer).expect("calls in order");
        writer.take()
    }

    fn try_write_anew(&self, writer: &mut Writer) -> Result<(), qemu_glue::stream::WriteError> {
        writer.head(&self.head)?;
        writer.command(Command::OpenReturnPath)?;
        writer.command(Command::Ping(7))?;
        writer.ram_start(self.section_id, &self.blocks)?;
        writer.ram_end()?;
        let mut order: Vec<_> = self.pages.iter().collect();
        order.sort_by_key(|((block, page), _)| (std::cmp::Reverse(*page), *block));
        for section in order.chunks(100) {
            writer.ram_begin(Phase::Iterate)?;
            for ((block, page), content) in section {
                let zero = content.iter().all(|byte| *byte == 0);
                match (zero, *block) {
                    (true, 0) => {}
                    (true, block) => writer.zero(block, *page)?,
                    (false, block) => writer.page(block, *page, content)?,
                }
            }
            writer.ram_end()?;
        }
        writer.command(Command::Ping(8))?;
        writer.ram_begin(Phase::Complete)?;
        writer.ram_end()?;
        // Behind RAM, as they come: a target asks neither for their place nor for the advice.
        writer.relayed(&self.setup)?;
        writer.relayed(&self.complete)?;
        writer.relayed(&self.tail)
    }

    /// Fails with the first pages that differ.
    fn compare(&self, other: &Self) {
        let named = |image: &Self| -> BTreeMap<(String, u32), Box<[u8; PAGE_SIZE]>> {
            let name = |block: u16| image.blocks[usize::from(block)].name.clone();
            let pages = image.pages.iter();
            pages
                .map(|((block, page), content)| ((name(*block), *page), content.clone()))
                .collect()
        };
        let (here, there) = (named(self), named(other));
        assert!(here.len() > 4000, "{} pages", here.len());
        let differing: Vec<_> = here
            .iter()
            .filter(|(at, page)| there.get(at) != Some(page))
            .collect();
        let places: Vec<_> = differing.iter().map(|(at, _)| at).take(10).collect();
        assert!(
            differing.is_empty(),
            "{} pages differ, such as {places:?}",
            differing.len()
        );
        assert_eq!(here.len(), there.len());
    }
}

fn capture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/streams");
    let file = std::fs::File::open(folder.join(format!("{name}.zst")));
    zstd::decode_all(file.expect("captures are in the repository")).expect("captures are whole")
}

/// The captures' machine types end with those of 10.0.
fn has_qemu_10() -> Result<(), String> {
    let told = std::process::Command::new("qemu-system-x86_64")
        .arg("-version")
        .output();
    let told = told
        .map_err(|error| format!("qemu-system-x86_64: {error}"))?
        .stdout;
    let told = String::from_utf8_lossy(&told);
    let major = told
        .split_once("version ")
        .and_then(|(_, rest)| rest.split('.').next());
    match major.and_then(|major| major.parse::<u32>().ok()) {
        Some(10..) => Ok(()),
        _ => Err(format!("needs QEMU 10, found {told:?}")),
    }
}

/// A stopped QEMU that waits for a guest, and its monitor. It ends with the value.
struct Qemu {
    process: Child,
    monitor: ChildStdin,
    answers: BufReader<ChildStdout>,
    folder: PathBuf,
}

impl Qemu {
    /// `None`, and a word why, where there is no QEMU 10.
    fn start(name: &str, machine: &str, arguments: &[&str]) -> Option<Self> {
        if let Err(reason) = has_qemu_10() {
            assert!(std::env::var_os("REQUIRE_ALL").is_none(), "{reason}");
            eprintln!("Skipped: {reason}");
            return None;
        }
        let folder = format!("stream-load-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let process = std::process::Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                "tcg",
                "-display",
                "none",
                "-serial",
                "none",
                "-parallel",
                "none",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-m",
                "16",
                "-qmp",
                "stdio",
                "-S",
            ])
            .args(["-M", machine, "-incoming", "defer"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Some(Self::attach(
            process.expect("QEMU told its version before"),
            folder,
        ))
    }

    fn attach(mut process: Child, folder: PathBuf) -> Self {
        let monitor = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped"));
        let mut qemu = Self {
            process,
            monitor,
            answers,
            folder,
        };
        qemu.ask(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    /// One command's answer.
    fn ask(&mut self, command: &str) -> String {
        writeln!(self.monitor, "{command}").expect("QEMU runs");
        loop {
            let mut line = String::new();
            let count = self.answers.read_line(&mut line).expect("QEMU runs");
            assert!(count > 0, "QEMU ended before it answered {command}");
            assert!(!line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }

    /// A connection on which QEMU waits for a stream.
    fn incoming(&mut self) -> UnixStream {
        self.listen("incoming", |uri| {
            format!(r#"{{"execute":"migrate-incoming","arguments":{{"uri":"unix:{uri}"}}}}"#)
        })
    }

    /// A connection to a socket of this name, after the command that makes QEMU listen.
    fn listen(
        &mut self,
        name: &str,
        command: impl Fn(std::path::Display<'_>) -> String,
    ) -> UnixStream {
        let path = self.folder.join(name);
        self.ask(&command(path.display()));
        let socket = UnixStream::connect(&path).expect("QEMU listens once it has answered");
        socket
            .set_read_timeout(Some(WAIT))
            .expect("a valid duration");
        socket
            .set_write_timeout(Some(WAIT))
            .expect("a valid duration");
        socket
    }

    /// Waits until the migration is in this state.
    fn wait_for_status(&mut self, status: &str) {
        let wanted = format!("\"status\": \"{status}\"");
        let mut told = String::new();
        for _ in 0..ASK_MAX {
            told = self.ask(r#"{"execute":"query-migrate"}"#);
            if told.contains(&wanted) {
                return;
            }
        }
        panic!("not {status}: {told}");
    }

    /// Waits for the end of a load that gives no answer on its socket.
    fn wait_until_loaded(&mut self) {
        let until = "\"status\": \"completed\"";
        let mut line = String::new();
        while !line.contains(until) {
            line.clear();
            let count = self.answers.read_line(&mut line).expect("QEMU runs");
            assert!(count > 0, "QEMU ended before it had loaded");
            assert!(!line.contains("\"status\": \"failed\""), "{line}");
        }
    }

    /// The guest as QEMU holds it, in a stream of its own.
    fn migrate_out(&mut self) -> Vec<u8> {
        let path = self.folder.join("outgoing");
        let uri = path.display();
        let listener = UnixListener::bind(&path).expect("a new socket");
        self.ask(&format!(
            r#"{{"execute":"migrate","arguments":{{"uri":"unix:{uri}"}}}}"#
        ));
        let (mut socket, _) = listener.accept().expect("QEMU connects");
        socket
            .set_read_timeout(Some(WAIT))
            .expect("a valid duration");
        let mut stream = Vec::new();
        // Without a return path QEMU closes at the end.
        socket
            .read_to_end(&mut stream)
            .expect("QEMU sends its guest in time");
        stream
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        std::fs::remove_dir_all(&self.folder).ok();
    }
}
