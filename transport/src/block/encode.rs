//! The source's side of a lane: dirty pages in, batches out.
//!
//! ```text
//! taken page -> private copy -> zero? -> hash -> same? -> copy? -> known? -> delta? -> looks random?
//!                                |               |         |        |         |         |        |
//!                               zero          nothing   a place  a number   frame     raw    literal
//!                                                                 over bases               frame
//! ```
//!
//! A batch's pages with content lie in one row of slots in the order of their addresses, whatever
//! they become: equal pages are found among them, and the replica gets neighbours in one write.

use std::io;

use bytes::BytesMut;

use super::batch::{BatchDigest, Encoding, HEAD_BYTES, Head, PartBytes, RECORD_BYTES, Record};
use super::batch::{count, measure};
use super::copy::{self, InBatch};
use super::delta::{self, DeltaPacker};
use super::hash::{DerivedKey, HASH_GROUP};
use super::literal::{LEVEL_DEFAULT, Packer};
use super::{
    BatchStats, Disable, LedgerPart, PAGE_SIZE, PageAddress, PageHash, PageHasher, Replica,
    Sources, Taken,
};
use super::{known, length_u16, length_u32, raw, same, zero};
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};
use crate::wire::{LANE_FRAME_HEAD_BYTES, LaneHeader, put_batch};

/// One lane's encoder with its part of the ledger. One owner at a time; all buffers are made once.
#[derive(Debug)]
pub struct LaneEncoder {
    ledger: LedgerPart,
    hasher: PageHasher,
    digest_key: DerivedKey,
    disable: Disable,
    packer: Packer,
    delta_packer: DeltaPacker,
    next_seq: u32,
    replica_failure: Option<io::Error>,
    batch: Batch,
    /// Pages of one frame, where they are not neighbours in the slots.
    gathered: Vec<u8>,
    records: Vec<Record>,
    /// Records and references as they go out.
    text: BytesMut,
}

/// The batch in progress.
#[derive(Debug)]
struct Batch {
    /// Its pages, ascending.
    entries: Vec<Entry>,
    /// Private copies of the pages with content, one after the other.
    slots: Box<[u8]>,
    slots_used: usize,
    /// Slot where the group of pages in progress was read.
    group_first: usize,
    in_batch: InBatch,
    /// Last versions of the delta pages.
    bases: Vec<u8>,
}

/// A page of the batch in progress.
#[derive(Debug, Clone, Copy)]
struct Entry {
    at: PageAddress,
    hash: PageHash,
    form: Form,
    /// Where its copy is; of no meaning for a zero page.
    slot: usize,
}

/// What a page will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Zero,
    Copy(PageAddress),
    Known(u32),
    Delta,
    Literal,
    Raw,
}

impl Form {
    fn encoding(self) -> Encoding {
        match self {
            Self::Zero => Encoding::Zero,
            Self::Copy(_) => Encoding::Copy,
            Self::Known(_) => Encoding::Known,
            Self::Delta => Encoding::Delta,
            Self::Literal => Encoding::Literal,
            Self::Raw => Encoding::Raw,
        }
    }
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
            delta_packer: DeltaPacker::new(LEVEL_DEFAULT),
            next_seq,
            replica_failure: None,
            batch: Batch::new(),
            gathered: Vec::new(),
            records: Vec::with_capacity(BATCH_MAX_RECORDS),
            text: BytesMut::new(),
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

    /// Why the replica is not used any more; `None` while it works. Pages go on without deltas.
    pub fn replica_failure(&self) -> Option<&io::Error> {
        self.replica_failure.as_ref()
    }

    /// Sets the zstd level of the next batches.
    ///
    /// # Errors
    /// When zstd refuses it.
    pub fn set_level(&mut self, level: i32) -> io::Result<()> {
        self.delta_packer.set_level(level);
        self.packer.set_level(level)
    }

    /// Encodes taken pages into as many batches as they need (none when all are the same) and
    /// appends the frames to `out`. The ledger holds what `out` got.
    ///
    /// # Errors
    /// When a page cannot be read or zstd fails. Pages that were taken and not yet in `out` are
    /// then in neither the set nor the ledger: the attempt is over. A replica that fails is no
    /// error, see [`replica_failure`](Self::replica_failure).
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
        self.batch.begin();
        let mut rest = taken;
        while let Some(next) = rest.first() {
            if self.batch.is_full_before(next.at) {
                self.finish(sources, out, &mut stats)?;
            }
            let (group, behind) = rest.split_at(self.batch.group(rest));
            rest = behind;
            let hashes = self.read(group, sources)?;
            for (nth, page) in group.iter().enumerate() {
                match self.stage(*page, nth, hashes[nth], sources) {
                    Some(entry) => self.batch.entries.push(entry),
                    None => stats.same.pages += 1,
                }
            }
        }
        self.finish(sources, out, &mut stats)?;
        Ok(stats)
    }

    /// Copies a group of pages into the free slots and hashes them side by side; `None` for zeros.
    fn read(
        &mut self,
        group: &[Taken],
        sources: &Sources<'_>,
    ) -> io::Result<[Option<PageHash>; HASH_GROUP]> {
        let mut hashes = [None; HASH_GROUP];
        let first = self.batch.slots_used * PAGE_SIZE;
        let (slots, _) = self.batch.slots[first..].as_chunks_mut::<PAGE_SIZE>();
        for (page, slot) in group.iter().zip(&mut *slots) {
            if !page.zero {
                sources.contents.read(page.at, slot)?;
            } else if self.disable.zero {
                slot.fill(0);
            }
        }
        let mut pages = [&[0; PAGE_SIZE]; HASH_GROUP];
        let mut places = [0; HASH_GROUP];
        let mut count = 0;
        for (nth, (page, slot)) in group.iter().zip(&*slots).enumerate() {
            if !page.zero && !zero::is_zero(slot) {
                (pages[count], places[count]) = (slot, nth);
                count += 1;
            }
        }
        let mut found = [self.hasher.zero(); HASH_GROUP];
        self.hasher.hash_group(&pages[..count], &mut found);
        for (nth, hash) in places[..count].iter().zip(found) {
            hashes[*nth] = Some(hash);
        }
        self.batch.group_first = self.batch.slots_used;
        Ok(hashes)
    }

    /// Decides what the `nth` page of a group becomes; `None` when the target has it.
    fn stage(
        &mut self,
        page: Taken,
        nth: usize,
        hash: Option<PageHash>,
        sources: &Sources<'_>,
    ) -> Option<Entry> {
        let at = page.at;
        let is_zero = hash.is_none();
        let hash = hash.unwrap_or(self.hasher.zero());
        if !self.disable.same && same::is_same(&self.ledger, at, hash) {
            self.ledger.confirm(at);
            return None;
        }
        let slot = self.batch.slots_used;
        let form = if is_zero && !self.disable.zero {
            Form::Zero
        } else {
            self.batch.take_slot(self.batch.group_first + nth);
            self.form(at, hash, slot, sources)
        };
        Some(Entry {
            at,
            hash,
            form,
            slot,
        })
    }

    /// What a page with content becomes. One whose references missed goes without any.
    fn form(
        &mut self,
        at: PageAddress,
        hash: PageHash,
        slot: usize,
        sources: &Sources<'_>,
    ) -> Form {
        let may_refer = !self.ledger.is_forgotten(at);
        if may_refer && !self.disable.copy {
            let earlier = self.batch.equal_before(hash, slot);
            if let Some(base) = earlier.or_else(|| self.applied_copy(at, hash, sources)) {
                return Form::Copy(base);
            }
        }
        if may_refer
            && !self.disable.known
            && let Some(number) = sources.known.and_then(|known| known.get(&hash))
        {
            return Form::Known(number);
        }
        if may_refer && !self.disable.delta && self.is_near(at, slot, sources) {
            return Form::Delta;
        }
        let content = slot_mut(&mut self.batch.slots, slot);
        if self.disable.literal || (!self.disable.raw && raw::looks_random(content)) {
            Form::Raw
        } else {
            Form::Literal
        }
    }

    /// A page with this content that the target has applied. One that this batch replaces would be
    /// taken for its content in the batch.
    fn applied_copy(
        &self,
        at: PageAddress,
        hash: PageHash,
        sources: &Sources<'_>,
    ) -> Option<PageAddress> {
        let (base, _) = sources.copies?.find(hash)?;
        let entries = &self.batch.entries;
        let is_replaced = entries
            .binary_search_by_key(&base, |entry| entry.at)
            .is_ok();
        (base != at && !is_replaced).then_some(base)
    }

    /// Whether the page shall be a delta; its base is then the last one.
    fn is_near(&mut self, at: PageAddress, slot: usize, sources: &Sources<'_>) -> bool {
        let Some(replica) = sources.replica.filter(|_| self.replica_failure.is_none()) else {
            return false;
        };
        let before = self.batch.bases.len();
        self.batch.bases.resize(before + PAGE_SIZE, 0);
        let content = slot_ref(&self.batch.slots, slot);
        let base = slot_mut(&mut self.batch.bases, before / PAGE_SIZE);
        let is_near = match delta::is_near(at, content, &self.ledger, &self.hasher, replica, base) {
            Ok(is_near) => is_near,
            Err(error) => {
                self.replica_failure = Some(error);
                false
            }
        };
        if !is_near {
            self.batch.bases.truncate(before);
        }
        is_near
    }

    /// Writes the batch in progress, if it has a page, and begins the next one.
    fn finish(
        &mut self,
        sources: &Sources<'_>,
        out: &mut BytesMut,
        stats: &mut BatchStats,
    ) -> io::Result<()> {
        if self.batch.entries.is_empty() {
            // Pages that were the same may have left their copies' marks.
            self.batch.begin();
            return Ok(());
        }
        let seq = self.next_seq;
        let following = seq.checked_add(1);
        self.next_seq = following.ok_or_else(|| io::Error::other("lane has no numbers left"))?;

        let bases = &self.batch.bases;
        let pages = gather(&self.batch, Form::Delta, &mut self.gathered);
        let delta_frame = match pages.is_empty() {
            true => None,
            false => self.delta_packer.pack(bases, pages)?,
        };
        if delta_frame.is_none() {
            self.batch.turn(Form::Delta, Form::Literal);
        }
        let pages = gather(&self.batch, Form::Literal, &mut self.gathered);
        let literal_frame = match pages.is_empty() {
            true => None,
            false => self.packer.pack(pages)?,
        };
        if literal_frame.is_none() {
            self.batch.turn(Form::Literal, Form::Raw);
        }
        let delta_frame = delta_frame.unwrap_or_default();
        let literal_frame = literal_frame.unwrap_or_default();

        self.text.clear();
        put_runs(&self.batch.entries, &mut self.records, &mut self.text);
        let (record_text, _) = self.text.split_at(self.records.len() * RECORD_BYTES);
        let mut digest = BatchDigest::new(&self.digest_key, self.ledger.lane(), seq, record_text);
        for entry in &self.batch.entries {
            digest.page(entry.hash);
        }
        let head = Head {
            seq,
            records: length_u16(self.records.len()),
            literal_bytes: length_u32(literal_frame.len()),
            delta_bytes: length_u32(delta_frame.len()),
            digest: digest.finish(),
        };
        let raw_pages = count(&self.records, Encoding::Raw);
        let frame_bytes = delta_frame.len() + literal_frame.len();
        let body_bytes = HEAD_BYTES + self.text.len() + frame_bytes + raw_pages * PAGE_SIZE;
        put_batch(out, body_bytes, |out| {
            head.put(out);
            out.extend_from_slice(&self.text);
            out.extend_from_slice(delta_frame);
            out.extend_from_slice(literal_frame);
            for entry in &self.batch.entries {
                if entry.form == Form::Raw {
                    out.extend_from_slice(slot_ref(&self.batch.slots, entry.slot));
                }
            }
        });
        let bytes = PartBytes {
            delta: delta_frame.len(),
            literal: literal_frame.len(),
            frame: body_bytes + LANE_FRAME_HEAD_BYTES,
        };
        *stats += measure(&self.records, bytes);
        self.note(seq, sources);
        self.batch.begin();
        Ok(())
    }

    /// The batch is out: ledger, copy index and replica hold it.
    fn note(&mut self, seq: u32, sources: &Sources<'_>) {
        for entry in &self.batch.entries {
            self.ledger.set(entry.at, entry.hash, seq);
            if let Some(copies) = sources.copies.filter(|_| entry.form != Form::Zero) {
                copies.insert(entry.hash, entry.at, seq);
            }
        }
        if let Some(replica) = sources.replica.filter(|_| self.replica_failure.is_none())
            && let Err(error) = self.batch.keep(replica)
        {
            self.replica_failure = Some(error);
        }
    }
}

impl Batch {
    fn new() -> Self {
        Self {
            entries: Vec::with_capacity(BATCH_MAX_RECORDS),
            slots: vec![0; BATCH_MAX_PAGES * PAGE_SIZE].into(),
            slots_used: 0,
            group_first: 0,
            in_batch: InBatch::new(),
            bases: Vec::new(),
        }
    }

    fn begin(&mut self) {
        self.entries.clear();
        self.slots_used = 0;
        self.in_batch.clear();
        self.bases.clear();
    }

    /// How many of the next pages can be read at once: as many as there are slots and entries left,
    /// ascending.
    fn group(&self, taken: &[Taken]) -> usize {
        let room = (BATCH_MAX_PAGES - self.slots_used)
            .min(BATCH_MAX_RECORDS - self.entries.len())
            .min(HASH_GROUP);
        let next = &taken[..room.min(taken.len())];
        let ascending = next.windows(2).take_while(|two| two[0].at < two[1].at);
        ascending.count() + 1
    }

    /// The page in slot `from` stays: it moves down over the ones that do not.
    fn take_slot(&mut self, from: usize) {
        if from != self.slots_used {
            let bytes = from * PAGE_SIZE..(from + 1) * PAGE_SIZE;
            self.slots.copy_within(bytes, self.slots_used * PAGE_SIZE);
        }
        self.slots_used += 1;
    }

    /// Whether this page needs another batch.
    fn is_full_before(&self, at: PageAddress) -> bool {
        self.slots_used == BATCH_MAX_PAGES
            || self.entries.len() == BATCH_MAX_RECORDS
            || self.entries.last().is_some_and(|last| at <= last.at)
    }

    /// Notes a slot's hash and finds an earlier page with the same bytes.
    fn equal_before(&mut self, hash: PageHash, slot: usize) -> Option<PageAddress> {
        let earlier = self.in_batch.replace(hash, slot)?;
        if !copy::is_equal(&self.slots, earlier, slot) {
            return None;
        }
        // Slots and entries ascend together, but only pages with content have a slot.
        let is_of_slot = |entry: &&Entry| entry.slot == earlier && entry.form != Form::Zero;
        Some(self.entries.iter().find(is_of_slot)?.at)
    }

    /// Gives all pages of one form another one.
    fn turn(&mut self, from: Form, into: Form) {
        let entries = self.entries.iter_mut();
        entries
            .filter(|entry| entry.form == from)
            .for_each(|entry| entry.form = into);
    }

    /// Writes all pages into the replica, neighbours in one go.
    fn keep(&self, replica: &dyn Replica) -> io::Result<()> {
        let is_zero = |entry: &Entry| entry.form == Form::Zero;
        let runs = self.entries.chunk_by(|one, next| {
            one.at.block == next.at.block
                && one.at.page.checked_add(1) == Some(next.at.page)
                && is_zero(one) == is_zero(next)
        });
        for run in runs {
            let Some(first) = run.first() else { continue };
            if is_zero(first) {
                replica.zero(first.at, length_u32(run.len()))?;
            } else {
                let contents = &self.slots[first.slot * PAGE_SIZE..][..run.len() * PAGE_SIZE];
                replica.write(first.at, contents)?;
            }
        }
        Ok(())
    }
}

/// The pages of one form one after the other: in the slots where they are neighbours there, else
/// brought together.
fn gather<'a>(batch: &'a Batch, form: Form, gathered: &'a mut Vec<u8>) -> &'a [u8] {
    let slots = || {
        let entries = batch.entries.iter();
        entries
            .filter(|entry| entry.form == form)
            .map(|entry| entry.slot)
    };
    let pages = slots().count();
    let (Some(first), Some(last)) = (slots().next(), slots().next_back()) else {
        return &[];
    };
    if last - first + 1 == pages {
        return &batch.slots[first * PAGE_SIZE..(last + 1) * PAGE_SIZE];
    }
    gathered.clear();
    for slot in slots() {
        gathered.extend_from_slice(slot_ref(&batch.slots, slot));
    }
    gathered
}

/// One page's copy.
fn slot_mut(slots: &mut [u8], slot: usize) -> &mut [u8; PAGE_SIZE] {
    slots[slot * PAGE_SIZE..]
        .first_chunk_mut()
        .expect("slots are whole pages")
}

/// One page's copy, to be read.
fn slot_ref(slots: &[u8], slot: usize) -> &[u8; PAGE_SIZE] {
    slots[slot * PAGE_SIZE..]
        .first_chunk()
        .expect("slots are whole pages")
}

/// Merges neighbours of one encoding whose references are neighbours too; writes the records, then
/// the references.
fn put_runs(entries: &[Entry], records: &mut Vec<Record>, text: &mut BytesMut) {
    records.clear();
    let mut references = BytesMut::new();
    let mut first_form = Form::Zero;
    for entry in entries {
        let encoding = entry.form.encoding();
        if let Some(run) = records.last_mut()
            && run.continues_with(encoding, entry.at)
            && continues(first_form, u32::from(run.count), entry.form)
        {
            run.count += 1;
            continue;
        }
        records.push(Record {
            encoding,
            first: entry.at,
            count: 1,
        });
        first_form = entry.form;
        match entry.form {
            Form::Copy(base) => copy::put(base, &mut references),
            Form::Known(number) => known::put(number, &mut references),
            Form::Zero | Form::Delta | Form::Literal | Form::Raw => {}
        }
    }
    records.iter().for_each(|record| record.put(text));
    text.extend_from_slice(&references);
}

/// Whether a form's reference follows the one of a run's first page by `count`.
fn continues(first: Form, count: u32, form: Form) -> bool {
    match (first, form) {
        (Form::Copy(base), Form::Copy(next)) => {
            base.block == next.block && base.page.checked_add(count) == Some(next.page)
        }
        (Form::Known(number), Form::Known(next)) => number.checked_add(count) == Some(next),
        _ => true,
    }
}
