//! The source's side of a lane: dirty pages in, batches out.
//!
//! ```text
//! taken page -> private copy -> zero? -> hash -> same? -> looks random? -> raw
//!                                 |               |             |
//!                                zero          nothing       literal (one zstd frame per batch)
//! ```

use std::io;

use bytes::BytesMut;

use super::batch::{BatchDigest, Encoding, HEAD_BYTES, Head, RECORD_BYTES, Record};
use super::hash::DerivedKey;
use super::literal::{LEVEL_DEFAULT, Packer};
use super::stats::Amount;
use super::{
    BatchStats, Contents, CopyIndex, KnownTable, LedgerPart, PAGE_SIZE, PageAddress, PageHash,
    PageHasher, Replica, Taken,
};
use super::{length_u16, length_u32, raw, same, zero};
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};
use crate::wire::{LANE_FRAME_HEAD_BYTES, LaneHeader, put_batch};

/// Stages that are switched off, to measure what each is worth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disable {
    /// Send pages again whose content the target has.
    pub same: bool,
    /// Send zero pages as content.
    pub zero: bool,
    /// Send content again that another page has.
    pub copy: bool,
    /// Send content that the target holds outside the image.
    pub known: bool,
    /// Send changed pages as a whole.
    pub delta: bool,
    /// Send everything uncompressed.
    pub literal: bool,
    /// Compress even what looks random.
    pub raw: bool,
}

/// A name that is no stage which can be switched off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no stage named {0:?}; known are same, zero, copy, known, delta, literal, raw")]
pub struct UnknownStage(pub String);

impl Disable {
    /// Switches the stage of this name off.
    ///
    /// # Errors
    /// When there is no such stage.
    pub fn add(&mut self, stage: &str) -> Result<(), UnknownStage> {
        match stage {
            "same" => self.same = true,
            "zero" => self.zero = true,
            "copy" => self.copy = true,
            "known" => self.known = true,
            "delta" => self.delta = true,
            "literal" => self.literal = true,
            "raw" => self.raw = true,
            _ => return Err(UnknownStage(stage.into())),
        }
        Ok(())
    }
}

/// What an encoder may draw on for one call.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The pages as they are.
    pub contents: &'a dyn Contents,
    /// The pages as last sent: bases of deltas. What is sent is written there.
    pub replica: Option<&'a dyn Replica>,
    /// Content that the target has in the image; `None` in the last round (S10). Every lane adds
    /// to it what it sends.
    pub copies: Option<&'a CopyIndex>,
    /// Content that the target has outside the image; `None` in the last round (S10).
    pub known: Option<&'a KnownTable>,
}

impl<'a> Sources<'a> {
    /// Nothing but the pages themselves.
    pub fn of(contents: &'a dyn Contents) -> Self {
        Self {
            contents,
            replica: None,
            copies: None,
            known: None,
        }
    }
}

impl std::fmt::Debug for Sources<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources")
            .field("replica", &self.replica.is_some())
            .field("copies", &self.copies.is_some())
            .field("known", &self.known.is_some())
            .finish_non_exhaustive()
    }
}

/// One lane's encoder with its part of the ledger. One owner at a time; all buffers are made once.
#[derive(Debug)]
pub struct LaneEncoder {
    ledger: LedgerPart,
    hasher: PageHasher,
    digest_key: DerivedKey,
    disable: Disable,
    packer: Packer,
    next_seq: u32,
    /// Private copies: literal pages from the front, raw pages from the back.
    slots: Box<[u8]>,
    literal_pages: usize,
    raw_pages: usize,
    /// Pages of the batch in progress, ascending.
    entries: Vec<Entry>,
}

/// A page of the batch in progress.
#[derive(Debug, Clone, Copy)]
struct Entry {
    at: PageAddress,
    hash: PageHash,
    form: Form,
}

/// What a page will be and where its copy is.
#[derive(Debug, Clone, Copy)]
enum Form {
    Zero,
    Literal { slot: usize },
    Raw { slot: usize },
}

impl LaneEncoder {
    /// An encoder that continues a ledger part; its next batch gets the number `next_seq`, which is
    /// [`FIRST_SEQ`](super::FIRST_SEQ) at first and is never used twice for one ledger.
    ///
    /// # Errors
    /// When zstd has no memory for a context.
    pub fn new(
        ledger: LedgerPart,
        key: &[u8; 32],
        next_seq: u32,
        disable: Disable,
    ) -> io::Result<Self> {
        Ok(Self {
            ledger,
            hasher: PageHasher::new(key),
            digest_key: DerivedKey::batch(key),
            disable,
            packer: Packer::new(LEVEL_DEFAULT, BATCH_MAX_PAGES * PAGE_SIZE)?,
            next_seq,
            slots: vec![0; BATCH_MAX_PAGES * PAGE_SIZE].into(),
            literal_pages: 0,
            raw_pages: 0,
            entries: Vec::with_capacity(BATCH_MAX_RECORDS),
        })
    }

    /// The lane.
    pub fn lane(&self) -> usize {
        self.ledger.lane()
    }

    /// Header to put in front of the lane's stream for a connection.
    pub fn header(&self, incarnation: u64) -> LaneHeader {
        LaneHeader {
            lane: self.lane(),
            incarnation,
            first_seq: self.next_seq,
        }
    }

    /// Number of the latest batch; one below the first before there was any.
    pub fn last_seq(&self) -> u32 {
        self.next_seq.saturating_sub(1)
    }

    /// The ledger part: what was sent.
    pub fn ledger(&self) -> &LedgerPart {
        &self.ledger
    }

    /// The ledger part, to bring its digests up to date.
    pub fn ledger_mut(&mut self) -> &mut LedgerPart {
        &mut self.ledger
    }

    /// Sets the zstd level of the next batches.
    ///
    /// # Errors
    /// When zstd refuses it.
    pub fn set_level(&mut self, level: i32) -> io::Result<()> {
        self.packer.set_level(level)
    }

    /// Encodes taken pages into as many batches as they need (none when all are the same) and
    /// appends the frames to `out`. The ledger holds what `out` got.
    ///
    /// # Errors
    /// When a page cannot be read or zstd fails. Pages that were taken and not yet in `out` are
    /// then in neither the set nor the ledger: the attempt is over.
    ///
    /// # Panics
    /// When a page is not of this lane.
    pub fn encode(
        &mut self,
        taken: &[Taken],
        sources: &Sources<'_>,
        out: &mut BytesMut,
    ) -> io::Result<BatchStats> {
        let mut stats = BatchStats::default();
        self.begin();
        for page in taken {
            let descends = self.entries.last().is_some_and(|last| page.at <= last.at);
            let slots_full = self.literal_pages + self.raw_pages == BATCH_MAX_PAGES;
            if descends || slots_full || self.entries.len() == BATCH_MAX_RECORDS {
                self.finish(out, &mut stats)?;
            }
            match self.stage(page, sources.contents)? {
                Some(entry) => self.entries.push(entry),
                None => stats.same.pages += 1,
            }
        }
        self.finish(out, &mut stats)?;
        Ok(stats)
    }

    fn begin(&mut self) {
        self.entries.clear();
        self.literal_pages = 0;
        self.raw_pages = 0;
    }

    /// Decides what a page becomes; `None` when the target has it.
    fn stage(&mut self, page: &Taken, contents: &dyn Contents) -> io::Result<Option<Entry>> {
        let at = page.at;
        let slot = self.literal_pages;
        let known_zero = page.zero && !self.disable.zero;
        let copy = slot_mut(&mut self.slots, slot);
        if page.zero {
            if !known_zero {
                copy.fill(0);
            }
        } else {
            contents.read(at, copy)?;
        }
        let is_zero = page.zero || zero::is_zero(copy);
        let hash = if is_zero {
            self.hasher.zero()
        } else {
            self.hasher.hash(copy)
        };
        if !self.disable.same && same::is_same(&self.ledger, at, hash) {
            self.ledger.confirm(at);
            return Ok(None);
        }
        let form = if is_zero && !self.disable.zero {
            Form::Zero
        } else if self.disable.literal || (!self.disable.raw && raw::looks_random(copy)) {
            self.raw_pages += 1;
            let back = BATCH_MAX_PAGES - self.raw_pages;
            self.slots
                .copy_within(slot * PAGE_SIZE..(slot + 1) * PAGE_SIZE, back * PAGE_SIZE);
            Form::Raw { slot: back }
        } else {
            self.literal_pages += 1;
            Form::Literal { slot }
        };
        Ok(Some(Entry { at, hash, form }))
    }

    /// Writes the batch in progress, if it has a page, and begins the next one.
    fn finish(&mut self, out: &mut BytesMut, stats: &mut BatchStats) -> io::Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let seq = self.next_seq;
        let following = seq.checked_add(1);
        self.next_seq = following.ok_or_else(|| io::Error::other("lane has no numbers left"))?;

        let literal_bytes = self.literal_pages * PAGE_SIZE;
        let mut frame = None;
        if literal_bytes > 0 {
            frame = self.packer.pack(&self.slots[..literal_bytes])?;
        }
        if frame.is_none() {
            for entry in &mut self.entries {
                if let Form::Literal { slot } = entry.form {
                    entry.form = Form::Raw { slot };
                }
            }
        }
        let frame = frame.unwrap_or_default();
        let records = runs(&self.entries);
        let raw_pages = count(&records, Encoding::Raw);
        let record_bytes = records.len() * RECORD_BYTES;
        let body_bytes = HEAD_BYTES + record_bytes + frame.len() + raw_pages * PAGE_SIZE;

        let mut record_text = BytesMut::with_capacity(record_bytes);
        records
            .iter()
            .for_each(|record| record.put(&mut record_text));
        let mut digest = BatchDigest::new(&self.digest_key, self.ledger.lane(), seq, &record_text);
        self.entries
            .iter()
            .for_each(|entry| digest.page(entry.hash));
        let head = Head {
            seq,
            records: length_u16(records.len()),
            literal_bytes: length_u32(frame.len()),
            digest: digest.finish(),
        };
        put_batch(out, body_bytes, |out| {
            head.put(out);
            out.extend_from_slice(&record_text);
            out.extend_from_slice(frame);
            for entry in &self.entries {
                if let Form::Raw { slot } = entry.form {
                    out.extend_from_slice(&self.slots[slot * PAGE_SIZE..(slot + 1) * PAGE_SIZE]);
                }
            }
        });
        *stats += measure(&records, frame.len(), body_bytes + LANE_FRAME_HEAD_BYTES);
        for entry in &self.entries {
            self.ledger.set(entry.at, entry.hash, seq);
        }
        self.begin();
        Ok(())
    }
}

/// One page's copy.
fn slot_mut(slots: &mut [u8], slot: usize) -> &mut [u8; PAGE_SIZE] {
    slots[slot * PAGE_SIZE..]
        .first_chunk_mut()
        .expect("slots are whole pages")
}

/// Merges neighbours of one encoding.
fn runs(entries: &[Entry]) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    for entry in entries {
        let encoding = match entry.form {
            Form::Zero => Encoding::Zero,
            Form::Literal { .. } => Encoding::Literal,
            Form::Raw { .. } => Encoding::Raw,
        };
        match records.last_mut() {
            Some(run) if run.continues_with(encoding, entry.at) => run.count += 1,
            _ => records.push(Record {
                encoding,
                first: entry.at,
                count: 1,
            }),
        }
    }
    records
}

/// Pages of one encoding.
pub(super) fn count(records: &[Record], encoding: Encoding) -> usize {
    records
        .iter()
        .filter(|run| run.encoding == encoding)
        .map(|run| usize::from(run.count))
        .sum()
}

/// What a batch cost, by encoding; the same on both sides.
pub(super) fn measure(records: &[Record], literal_bytes: usize, frame_bytes: usize) -> BatchStats {
    let amount = |encoding: Encoding, payload: usize| {
        let runs = records
            .iter()
            .filter(|run| run.encoding == encoding)
            .count();
        Amount {
            pages: count(records, encoding) as u64,
            bytes: (runs * RECORD_BYTES + payload) as u64,
        }
    };
    BatchStats {
        zero: amount(Encoding::Zero, 0),
        literal: amount(Encoding::Literal, literal_bytes),
        raw: amount(Encoding::Raw, count(records, Encoding::Raw) * PAGE_SIZE),
        batches: 1,
        frame_bytes: frame_bytes as u64,
        ..BatchStats::default()
    }
}
