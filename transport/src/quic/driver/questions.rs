//! Runs ahead of the lanes and asks the target which pages it holds elsewhere.
//!
//! ```text
//! dirty set (looked at, not taken) -> hash -> Query (bulk) ==link==> Known -> table of known pages
//! ```
//!
//! Nothing waits for an answer: a page that is sent before its answer came costs what it would cost
//! without this. What is read here counts for nothing else (S7): a page is read and hashed again when
//! it is taken.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::block::{
    Contents, DirtySet, KnownTable, PAGE_SIZE, PageAddress, PageHash, PageHasher, RANGE_PAGES,
};
use crate::wire::Frame;

/// Pages of one question frame: 16 KiB of prefixes.
const FRAME_PAGES: usize = 2048;
/// Frames without an answer: at 80 ms of RTT enough to stay ahead of a link of 5 Gbit/s.
const UNANSWERED_MAX: usize = 4;
/// How long to wait for pages that QEMU has not announced yet.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// First bytes of a page hash, as asked.
type Prefix = [u8; 8];

/// The questions of one attempt. Dropping it ends them.
#[derive(Debug)]
pub struct Questions {
    answers: SyncSender<Answer>,
}

/// What the target said.
#[derive(Debug)]
struct Answer {
    first: u32,
    numbers: Vec<Option<u32>>,
}

impl Questions {
    /// Starts asking; frames to send come out of `frames`, whose end is the end of the questions.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub fn start(
        dirty: &Arc<DirtySet>,
        contents: &Arc<dyn Contents>,
        key: &[u8; 32],
        known: &Arc<KnownTable>,
        frames: mpsc::Sender<Frame>,
    ) -> std::io::Result<Questions> {
        let (answers, answered) = sync_channel(UNANSWERED_MAX);
        let asker = Asker {
            asked: vec![false; usize::try_from(dirty.layout().ranges_total()).unwrap_or(0) * SLOTS],
            dirty: dirty.clone(),
            contents: contents.clone(),
            hasher: PageHasher::new(key),
            known: known.clone(),
            frames,
            answered,
            next: 0,
            prefixes: Vec::with_capacity(FRAME_PAGES),
            unanswered: VecDeque::new(),
        };
        std::thread::Builder::new()
            .name("questions".into())
            .spawn(move || {
                let ended = asker.run();
                tracing::debug!(?ended, "questions ended");
            })?;
        Ok(Questions { answers })
    }

    /// The target has answered.
    pub fn answered(&self, first: u32, numbers: Vec<Option<u32>>) {
        // A thread that has ended asks nothing more; answers beyond the questions count for nothing.
        drop(self.answers.try_send(Answer { first, numbers }));
    }
}

/// Why asking ends.
#[derive(Debug)]
enum Ended {
    /// The session is over, or asks no more.
    Session,
    /// A page cannot be read; the lanes will say so.
    Contents,
    /// The answers fit no question.
    Peer,
}

const SLOTS: usize = RANGE_PAGES as usize;

struct Asker {
    dirty: Arc<DirtySet>,
    contents: Arc<dyn Contents>,
    hasher: PageHasher,
    known: Arc<KnownTable>,
    frames: mpsc::Sender<Frame>,
    answered: Receiver<Answer>,
    /// One flag for each page: it is asked for once in an attempt.
    asked: Vec<bool>,
    /// Number of the first question of the next frame.
    next: u32,
    prefixes: Vec<Prefix>,
    unanswered: VecDeque<(u32, Vec<Prefix>)>,
}

impl Asker {
    fn run(mut self) -> Ended {
        match self.ask_all() {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    fn ask_all(&mut self) -> Result<std::convert::Infallible, Ended> {
        let mut pages = Vec::with_capacity(SLOTS);
        loop {
            for range in 0..self.dirty.layout().ranges_total() {
                pages.clear();
                self.dirty.peek_data(range, &mut |at| pages.push(at));
                for at in pages.drain(..) {
                    self.page(range, at)?;
                }
            }
            self.send()?;
            self.listen(LOOK_INTERVAL)?;
        }
    }

    fn page(&mut self, range: u32, at: PageAddress) -> Result<(), Ended> {
        let slot = crate::block::index(at.page) % SLOTS;
        let asked = &mut self.asked[crate::block::index(range) * SLOTS + slot];
        if std::mem::replace(asked, true) {
            return Ok(());
        }
        let mut content = [0; PAGE_SIZE];
        self.contents
            .read(at, &mut content)
            .map_err(|_| Ended::Contents)?;
        let PageHash(hash) = self.hasher.hash(&content);
        let (prefix, _) = hash.split_first_chunk().ok_or(Ended::Contents)?;
        self.prefixes.push(*prefix);
        if self.prefixes.len() == FRAME_PAGES {
            self.send()?;
        }
        Ok(())
    }

    /// Sends what is gathered, then waits while too much is without an answer.
    fn send(&mut self) -> Result<(), Ended> {
        if self.prefixes.is_empty() {
            return Ok(());
        }
        let prefixes = std::mem::take(&mut self.prefixes);
        let first = self.next;
        self.next = first.wrapping_add(crate::block::length_u32(prefixes.len()));
        self.unanswered.push_back((first, prefixes.clone()));
        self.frames
            .blocking_send(Frame::Query { first, prefixes })
            .map_err(|_| Ended::Session)?;
        while self.unanswered.len() >= UNANSWERED_MAX {
            let answer = self.answered.recv().map_err(|_| Ended::Session)?;
            self.take(answer)?;
        }
        Ok(())
    }

    /// Takes the answers that are there, and waits a moment for one.
    fn listen(&mut self, wait: Duration) -> Result<(), Ended> {
        match self.answered.recv_timeout(wait) {
            Ok(answer) => self.take(answer),
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(Ended::Session),
        }
    }

    fn take(&mut self, answer: Answer) -> Result<(), Ended> {
        let (first, prefixes) = self.unanswered.pop_front().ok_or(Ended::Peer)?;
        if answer.first != first || answer.numbers.len() != prefixes.len() {
            return Err(Ended::Peer);
        }
        let held = prefixes.into_iter().zip(answer.numbers);
        for (prefix, number) in held {
            if let Some(number) = number {
                self.known.insert(prefix, number);
            }
        }
        Ok(())
    }
}
