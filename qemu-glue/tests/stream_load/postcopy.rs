//! A plain capture, written to QEMU as a post-copy stream: a third of the pages is wrong at first and
//! thrown away, the guest's memory is read before they are there, and QEMU asks for them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use qemu_glue::stream::return_path::{Message, Parser};
use qemu_glue::stream::{Command, PAGE_SIZE, Phase, Writer, devices_of};

use super::{DEVICES, Image, Qemu, WAIT, capture};

const PING: u32 = 5;
/// Where the memory is read that is not there: below the first MiB's holes, above, and far up.
const READS: [u64; 3] = [0x5000, 0x10_2000, 0xf0_3000];

/// Pages that the target lacks.
type Lacking = BTreeSet<(u16, u32)>;

/// What is asked for is answered, the rest follows; the guest then has every page.
#[test]
fn qemu_10_gets_missing_pages_on_demand() {
    let Some(mut qemu) = start("postcopy") else {
        return;
    };
    let mut feed = Feed::begin(&mut qemu);
    feed.until(&Message::Pong(PING));
    let (tell, told) = sync_channel(1);
    let server = std::thread::spawn(move || feed.serve(&told));
    assert_listening(&mut qemu);
    read_memory(&mut qemu);
    tell.send(()).expect("the server runs");
    let asked = server.join().expect("all pages were fed");
    assert!(asked.len() >= READS.len(), "asked for {asked:?}");
    assert_whole(&mut qemu);
}

/// The connection breaks while pages are missing. QEMU waits, says on another connection what it has,
/// and gets exactly the rest.
#[test]
fn qemu_10_goes_on_after_a_broken_stream() {
    let Some(mut qemu) = start("postcopy-again") else {
        return;
    };
    let mut feed = Feed::begin(&mut qemu);
    feed.until(&Message::Pong(PING));
    assert_listening(&mut qemu);
    let half: Lacking = feed.lacking.iter().copied().step_by(2).collect();
    feed.pages(&half);
    feed.ping_through();
    let (image, lacking) = (feed.image.clone(), feed.lacking.clone());
    let blocks = image.blocks.clone();
    drop(feed);
    qemu.wait_for_status("postcopy-paused");

    let socket = qemu.listen("again", |uri| {
        format!(r#"{{"execute":"migrate-recover","arguments":{{"uri":"unix:{uri}"}}}}"#)
    });
    let mut again = Feed {
        socket,
        writer: Writer::postcopy_again(image.section_id, &blocks),
        parser: Parser::in_recovery(1 << 20),
        image,
        lacking,
        asked: Vec::new(),
        last_block: None,
        is_polling: false,
    };
    for block in 0..blocks.len() {
        let block = u16::try_from(block).expect("few blocks");
        again.writer.postcopy_ask_bitmap(block).expect("in order");
    }
    again.write();
    let bitmaps = again.bitmaps(blocks.len());
    for (number, block) in blocks.iter().enumerate() {
        let number = u16::try_from(number).expect("few blocks");
        let has = |page: u32| bitmaps[&block.name][page as usize / 8] >> (page % 8) & 1 == 1;
        for page in 0..block.pages {
            let expected = !again.lacking.contains(&(number, page));
            assert_eq!(has(page), expected, "{} page {page}", block.name);
        }
    }
    again.writer.postcopy_resume().expect("in order");
    again.write();
    again.until(&Message::ResumeAck);
    qemu.wait_for_status("postcopy-active");
    let (tell, told) = sync_channel(1);
    let server = std::thread::spawn(move || again.serve(&told));
    tell.send(()).expect("the server runs");
    server.join().expect("all pages were fed");
    assert_whole(&mut qemu);
}

fn start(name: &str) -> Option<Qemu> {
    let mut qemu = Qemu::start(name, "pc-q35-10.0", DEVICES)?;
    qemu.ask(
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"postcopy-ram","state":true}]}}"#,
    );
    Some(qemu)
}

fn assert_listening(qemu: &mut Qemu) {
    qemu.wait_for_status("postcopy-active");
    let mut status = qemu.ask(r#"{"execute":"query-status"}"#);
    while status.contains("inmigrate") {
        status = qemu.ask(r#"{"execute":"query-status"}"#);
    }
    assert!(status.contains("\"paused\""), "{status}");
}

/// Reads guest memory through the monitor, which waits until it is there.
fn read_memory(qemu: &mut Qemu) {
    let image = Image::of(&capture("qemu-10.0-plain"));
    for address in READS {
        let line = format!(
            r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"xp /4xb {address:#x}"}}}}"#
        );
        let answer = qemu.ask(&line);
        let page = u32::try_from(address / 4096).expect("16 MiB");
        let expected = image.pages[&(0, page)][..4]
            .iter()
            .map(|byte| format!("0x{byte:02x}"));
        let expected: Vec<_> = expected.collect();
        assert!(
            answer.contains(&expected.join(" ")),
            "{answer} {expected:?}"
        );
    }
}

/// `completed`, and every page is the captured one.
fn assert_whole(qemu: &mut Qemu) {
    qemu.wait_for_status("completed");
    qemu.ask(
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"postcopy-ram","state":false}]}}"#,
    );
    Image::of(&capture("qemu-10.0-plain")).compare(&Image::of(&qemu.migrate_out()));
}

struct Feed {
    socket: UnixStream,
    writer: Writer,
    parser: Parser,
    image: Image,
    lacking: Lacking,
    asked: Vec<(u16, u32)>,
    last_block: Option<Vec<u8>>,
    is_polling: bool,
}

impl Feed {
    /// Everything up to RUN.
    fn begin(qemu: &mut Qemu) -> Self {
        let image = Image::of(&capture("qemu-10.0-plain"));
        let socket = qemu.incoming();
        let lacks =
            |at: &&(u16, u32)| at.1.is_multiple_of(3) || READS.contains(&(u64::from(at.1) * 4096));
        let lacking: Lacking = image.pages.keys().filter(lacks).copied().collect();
        let mut feed = Self {
            socket,
            writer: Writer::new(),
            parser: Parser::new(),
            image,
            lacking,
            asked: Vec::new(),
            last_block: None,
            is_polling: false,
        };
        feed.write_begin().expect("calls in order");
        feed.write();
        feed
    }

    fn write_begin(&mut self) -> Result<(), qemu_glue::stream::WriteError> {
        let (writer, image, lacking) = (&mut self.writer, &self.image, &self.lacking);
        writer.head(&image.head)?;
        writer.command(Command::OpenReturnPath)?;
        writer.postcopy_advise()?;
        writer.command(Command::Ping(1))?;
        writer.ram_start(image.section_id, &image.blocks)?;
        writer.ram_end()?;
        writer.ram_begin(Phase::Iterate)?;
        for ((block, page), content) in &image.pages {
            // Of those that it will lack every second one is wrong, every other never sent.
            match (lacking.contains(&(*block, *page)), page % 2) {
                (true, 0) => writer.page(*block, *page, &[0xee; PAGE_SIZE])?,
                (true, _) => {}
                (false, _) => writer.page(*block, *page, content)?,
            }
        }
        writer.ram_end()?;
        for (block, _) in (0_u16..).zip(&image.blocks) {
            let pages = lacking.iter().filter(|at| at.0 == block);
            let runs: Vec<_> = pages.map(|at| (at.1, 1)).collect();
            writer.postcopy_discard(block, &runs)?;
        }
        let mut sections = image.setup.clone();
        sections.extend(&image.complete);
        sections.extend(devices_of(&image.tail).unwrap_or_default());
        writer.postcopy_package(&sections, PING)
    }

    fn write(&mut self) {
        self.socket
            .write_all(&self.writer.take())
            .expect("QEMU reads the stream");
    }

    fn pages(&mut self, pages: &Lacking) {
        let (writer, image) = (&mut self.writer, &self.image);
        writer.ram_begin(Phase::Iterate).expect("in order");
        for (block, page) in pages {
            assert!(self.lacking.remove(&(*block, *page)), "each page once");
            let content = &image.pages[&(*block, *page)];
            match content.iter().all(|byte| *byte == 0) {
                true => writer.zero(*block, *page).expect("a page"),
                false => writer.page(*block, *page, content).expect("a page"),
            }
        }
        writer.ram_end().expect("in order");
        self.write();
    }

    /// Returns once QEMU has consumed everything.
    fn ping_through(&mut self) {
        self.writer.command(Command::Ping(99)).expect("in order");
        self.write();
        self.until(&Message::Pong(99));
    }

    /// The next messages; pages that are asked for are fed, once.
    fn messages(&mut self) -> Vec<Message> {
        let mut bytes = [0; 4096];
        let count = match self.socket.read(&mut bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && self.is_polling => {
                return Vec::new();
            }
            read => read.expect("QEMU answers in time"),
        };
        assert_ne!(count, 0, "QEMU closed");
        let mut messages = Vec::new();
        let pushed = self
            .parser
            .push(&bytes[..count], &mut |message| messages.push(message));
        assert_eq!(pushed, Ok(()));
        messages.retain(|message| {
            !matches!(message, Message::RequestPages { .. }) || self.answer(message)
        });
        messages
    }

    /// Returns false: the message is dealt with.
    fn answer(&mut self, message: &Message) -> bool {
        let at = self.request(message);
        self.asked.push(at);
        if self.lacking.contains(&at) {
            self.pages(&Lacking::from([at]));
        }
        false
    }

    /// Waits for a message.
    fn until(&mut self, wanted: &Message) {
        while !self.messages().contains(wanted) {}
    }

    fn bitmaps(&mut self, count: usize) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        while found.len() < count {
            for message in self.messages() {
                let Message::Bitmap { block, bits } = message else {
                    panic!("{message:?} in place of a bitmap");
                };
                found.insert(String::from_utf8(block).expect("a name"), bits);
            }
        }
        found
    }

    /// Answers requests until it is told to go on, then feeds the rest. Returns what was asked for.
    fn serve(mut self, told: &Receiver<()>) -> Vec<(u16, u32)> {
        self.wait_at_most(Duration::from_millis(20), true);
        while told.try_recv().is_err() {
            let rest = self.messages();
            assert_eq!(rest, []);
        }
        let rest = self.lacking.clone();
        self.pages(&rest);
        self.writer.postcopy_end().expect("in order");
        self.write();
        self.wait_at_most(WAIT, false);
        self.until(&Message::Shut(0));
        self.asked
    }

    fn wait_at_most(&mut self, time: Duration, is_polling: bool) {
        self.is_polling = is_polling;
        let set = self.socket.set_read_timeout(Some(time));
        set.expect("a valid duration");
    }

    fn request(&mut self, message: &Message) -> (u16, u32) {
        let Message::RequestPages {
            block,
            start,
            length: 4096,
        } = message
        else {
            panic!("{message:?} in place of a request");
        };
        let name = block.clone().or(self.last_block.take()).expect("a block");
        let is_it = |known: &qemu_glue::stream::RamBlock| known.name.as_bytes() == name;
        let place = self.image.blocks.iter().position(is_it).expect("a block");
        self.last_block = Some(name);
        let page = u32::try_from(start / 4096).expect("16 MiB");
        (u16::try_from(place).expect("few blocks"), page)
    }
}
