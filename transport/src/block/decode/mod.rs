//! The target's side of a lane: batches in, pages into the sink, then into the ledger.
//!
//! Nothing reaches the sink before the whole batch is decoded into private memory and its digest
//! is found right. A batch with references that does not come out right is *missed*: its pages are
//! asked for again. Any error ends the attempt; the guest is then still at the source.

use std::io;
use std::sync::Arc;

use super::batch::measure;
use super::batch::{BatchDigest, Encoding, HEAD_BYTES, Head, PartBytes, RECORD_BYTES, Record};
use super::hash::{DerivedKey, HASH_GROUP};
use super::literal::{BadFrame, Unpacker};
use super::{
    BatchStats, DecodeError, FIRST_SEQ, Layout, LedgerPart, PAGE_SIZE, PageAddress, PageHash,
    PageHasher, PageRun, RANGE_PAGES, Sink, copy, delta, known, zero,
};
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};
use crate::wire::{LANE_FRAME_HEAD_BYTES, LaneHeader};

/// What one batch did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Pages and bytes by encoding.
    pub stats: BatchStats,
    /// Pages left out because the ledger had a later version.
    pub old_pages: u64,
    /// Pages of a batch whose references did not resolve: nothing of it was applied, and its pages
    /// must come again. At most one run for each record.
    pub missing: Vec<PageRun>,
}

/// One lane's decoder with its part of the ledger: the only owner of the lane's ranges (S6).
#[derive(Debug)]
pub struct LaneDecoder {
    ledger: LedgerPart,
    hasher: PageHasher,
    digest_key: DerivedKey,
    unpacker: Unpacker,
    incarnation: u64,
    /// Number of the next batch, `None` before the header.
    next_seq: Option<u32>,
    /// Decoded pages: deltas, then literal ones, then copied and known ones.
    decoded: Box<[u8]>,
    /// Last versions of the delta pages.
    bases: Vec<u8>,
    runs: Vec<Run>,
    /// The batch's pages with content, in order.
    pages: Vec<Page>,
}

/// A run of the batch in progress.
#[derive(Debug, Clone, Copy)]
struct Run {
    record: Record,
    reference: Reference,
    /// Number of its first page among the pages with content.
    place: usize,
}

/// What a run refers to.
#[derive(Debug, Clone, Copy)]
enum Reference {
    Nothing,
    Image(PageAddress),
    Number(u32),
}

/// A page with content.
#[derive(Debug, Clone, Copy)]
struct Page {
    content: Where,
    hash: PageHash,
}

/// Where a page's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Decoded(usize),
    Raw(usize),
    Zero,
}

/// The payload of a batch by its parts.
#[derive(Debug, Clone, Copy)]
struct Parts<'a> {
    delta: &'a [u8],
    literal: &'a [u8],
    raw: &'a [u8],
}

/// References that do not resolve to what the source meant.
#[derive(Debug)]
struct Miss;

impl LaneDecoder {
    /// A decoder that continues a ledger part and takes streams of one incarnation.
    ///
    /// # Errors
    /// When zstd has no memory for a context.
    pub fn new(ledger: LedgerPart, key: &[u8; 32], incarnation: u64) -> io::Result<Self> {
        Ok(Self {
            ledger,
            hasher: PageHasher::new(key),
            digest_key: DerivedKey::batch(key),
            unpacker: Unpacker::new()?,
            incarnation,
            next_seq: None,
            decoded: vec![0; BATCH_MAX_PAGES * PAGE_SIZE].into(),
            bases: Vec::new(),
            runs: Vec::with_capacity(BATCH_MAX_RECORDS),
            pages: Vec::with_capacity(BATCH_MAX_PAGES),
        })
    }

    /// The lane.
    pub fn lane(&self) -> usize {
        self.ledger.lane()
    }

    /// The ledger part: what was applied.
    pub fn ledger(&self) -> &LedgerPart {
        &self.ledger
    }

    /// The ledger part, to bring its digests up to date.
    pub fn ledger_mut(&mut self) -> &mut LedgerPart {
        &mut self.ledger
    }

    /// A new connection replaces the one before: only streams of `incarnation` count from here.
    pub fn expect_incarnation(&mut self, incarnation: u64) {
        self.incarnation = incarnation;
        self.next_seq = None;
    }

    /// Takes the header of the lane's stream.
    ///
    /// # Errors
    /// When the stream is of another lane or incarnation.
    pub fn open(&mut self, header: &LaneHeader) -> Result<(), DecodeError> {
        if header.lane != self.lane() {
            return Err(DecodeError::PeerLane {
                expected: self.lane(),
                found: header.lane,
            });
        }
        if header.incarnation != self.incarnation {
            return Err(DecodeError::PeerIncarnation {
                expected: self.incarnation,
                found: header.incarnation,
            });
        }
        self.next_seq = Some(header.first_seq);
        Ok(())
    }

    /// Applies one batch (the body of its frame): checks all of it, then writes the sink, then
    /// the ledger.
    ///
    /// # Errors
    /// Says who is at fault; the batch has then left no trace, except after
    /// [`DecodeError::LocalSink`].
    pub fn apply(&mut self, body: &[u8], sink: &mut dyn Sink) -> Result<Applied, DecodeError> {
        let truncated = DecodeError::PeerTruncated(body.len());
        let Some((head, rest)) = body.split_first_chunk::<HEAD_BYTES>() else {
            return Err(truncated);
        };
        let head = Head::parse(head);
        let expected = self.next_seq.ok_or(DecodeError::PeerNoHeader)?;
        if head.seq != expected || head.seq < FIRST_SEQ {
            return Err(DecodeError::PeerSequence {
                expected,
                found: head.seq,
            });
        }
        let record_count = usize::from(head.records);
        if record_count == 0 || record_count > BATCH_MAX_RECORDS {
            return Err(DecodeError::PeerRecordCount(head.records));
        }
        let Some((records, rest)) = rest.split_at_checked(record_count * RECORD_BYTES) else {
            return Err(truncated);
        };
        self.parse_records(records)?;
        let payload = self.parse_references(rest).ok_or(truncated)?;
        self.check_references()?;
        let parts = self.split_payload(&head, payload)?;

        let resolved = self.resolve(parts, sink)?;
        let digest = resolved.map(|()| self.hash_pages(&head, records, parts.raw));
        let is_whole = digest.is_ok_and(|digest| digest == head.digest);
        let refers = self.runs.iter().any(|run| run.record.encoding.refers());
        if !is_whole && !refers {
            return Err(DecodeError::PeerDigest { seq: head.seq });
        }
        let mut applied = Applied {
            stats: self.measure(parts, body.len()),
            ..Applied::default()
        };
        if is_whole {
            applied.old_pages = self
                .write(head.seq, parts.raw, sink)
                .map_err(DecodeError::LocalSink)?;
        } else {
            applied.missing = self.runs.iter().map(|run| run.record.into()).collect();
        }
        // A lane that used its last number takes no further batch.
        self.next_seq = Some(head.seq.wrapping_add(1));
        Ok(applied)
    }

    /// Reads the records: existing pages of this lane, ascending, not too many with content.
    fn parse_records(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        self.runs.clear();
        let layout = Arc::clone(self.ledger.layout());
        let lane = self.lane();
        let mut free_from = None;
        let mut place = 0;
        let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
        for bytes in records {
            let record = Record::parse(bytes).ok_or(DecodeError::PeerEncoding(bytes[0]))?;
            let last = last_page(&layout, &record)?;
            let at = record.first;
            let owner = layout.lane_of(at);
            if owner != lane {
                return Err(DecodeError::PeerForeignLane { at, owner, lane });
            }
            if free_from.is_some_and(|taken| at <= taken) {
                return Err(DecodeError::PeerOrder(at));
            }
            free_from = Some(last);
            self.runs.push(Run {
                record,
                reference: Reference::Nothing,
                place,
            });
            if record.encoding != Encoding::Zero {
                place += usize::from(record.count);
            }
        }
        if place > BATCH_MAX_PAGES {
            return Err(DecodeError::PeerTooManyPages(place));
        }
        Ok(())
    }

    /// Takes the references off what follows the records; `None` when they are cut short.
    fn parse_references<'a>(&mut self, mut bytes: &'a [u8]) -> Option<&'a [u8]> {
        for run in &mut self.runs {
            match run.record.encoding {
                Encoding::Copy => {
                    let (base, rest) = bytes.split_first_chunk()?;
                    run.reference = Reference::Image(copy::parse(base));
                    bytes = rest;
                }
                Encoding::Known => {
                    let (number, rest) = bytes.split_first_chunk()?;
                    run.reference = Reference::Number(known::parse(*number));
                    bytes = rest;
                }
                Encoding::Zero | Encoding::Delta | Encoding::Literal | Encoding::Raw => {}
            }
        }
        Some(bytes)
    }

    /// What runs refer to must exist from their first to their last page.
    fn check_references(&self) -> Result<(), DecodeError> {
        let layout = self.ledger.layout();
        for run in &self.runs {
            let count = run.record.count;
            let more = u32::from(count) - 1;
            match run.reference {
                Reference::Image(base) => {
                    let last = base.page.checked_add(more);
                    let last = last.map(|page| PageAddress { page, ..base });
                    if !last.is_some_and(|last| layout.contains(last)) {
                        return Err(DecodeError::PeerCopyOutside { base, count });
                    }
                }
                Reference::Number(first) => {
                    if first.checked_add(more).is_none() {
                        return Err(DecodeError::PeerKnownOutside { first, count });
                    }
                }
                Reference::Nothing => {}
            }
        }
        Ok(())
    }

    /// Pages of one encoding.
    fn count(&self, encoding: Encoding) -> usize {
        let runs = self
            .runs
            .iter()
            .filter(|run| run.record.encoding == encoding);
        runs.map(|run| usize::from(run.record.count)).sum()
    }

    /// Cuts the payload where head and records say.
    fn split_payload<'a>(&self, head: &Head, payload: &'a [u8]) -> Result<Parts<'a>, DecodeError> {
        let delta_bytes = super::index(head.delta_bytes);
        let literal_bytes = super::index(head.literal_bytes);
        let raw_bytes = self.count(Encoding::Raw) * PAGE_SIZE;
        let expected = delta_bytes
            .saturating_add(literal_bytes)
            .saturating_add(raw_bytes);
        if payload.len() != expected {
            return Err(DecodeError::PeerPayload {
                expected,
                found: payload.len(),
            });
        }
        let (delta, rest) = payload.split_at(delta_bytes);
        let (literal, raw) = rest.split_at(literal_bytes);
        if self.count(Encoding::Literal) == 0 && !literal.is_empty() {
            return Err(DecodeError::PeerLiteral(0));
        }
        if self.count(Encoding::Delta) == 0 && !delta.is_empty() {
            return Err(DecodeError::PeerDelta(0));
        }
        Ok(Parts {
            delta,
            literal,
            raw,
        })
    }

    /// Brings the content of every page together, without a hash yet.
    fn resolve(
        &mut self,
        parts: Parts<'_>,
        sink: &mut dyn Sink,
    ) -> Result<Result<(), Miss>, DecodeError> {
        let delta_pages = self.count(Encoding::Delta);
        let literal_pages = self.count(Encoding::Literal);
        let (deltas, rest) = self.decoded.split_at_mut(delta_pages * PAGE_SIZE);
        if literal_pages > 0 {
            self.unpacker
                .unpack(parts.literal, &mut rest[..literal_pages * PAGE_SIZE])
                .map_err(|BadFrame| DecodeError::PeerLiteral(literal_pages))?;
        }
        if delta_pages > 0 {
            self.bases.resize(delta_pages * PAGE_SIZE, 0);
            if read_bases(&self.runs, sink, &mut self.bases).is_err() {
                return Ok(Err(Miss));
            }
            delta::unpack(parts.delta, &self.bases, deltas)
                .map_err(|BadFrame| DecodeError::PeerDelta(delta_pages))?;
        }
        Ok(self.place_pages(delta_pages, literal_pages, sink))
    }

    /// Notes where each page's content is; fetches what runs refer to.
    fn place_pages(
        &mut self,
        delta_pages: usize,
        literal_pages: usize,
        sink: &mut dyn Sink,
    ) -> Result<(), Miss> {
        self.pages.clear();
        let hash = self.hasher.zero();
        let mut next = Next {
            delta: 0,
            literal: delta_pages,
            fetched: delta_pages + literal_pages,
            raw: 0,
        };
        for number in 0..self.runs.len() {
            let Run {
                record, reference, ..
            } = self.runs[number];
            if record.encoding == Encoding::Zero {
                continue;
            }
            for offset in 0..u32::from(record.count) {
                let content = match (record.encoding, reference) {
                    (_, Reference::Image(base)) => {
                        let base = PageAddress {
                            page: base.page + offset,
                            ..base
                        };
                        match self.in_batch(number, record.first.page + offset, base) {
                            Some(content) => content,
                            None => self.fetch(&mut next, |into| sink.read(base, into))?,
                        }
                    }
                    (_, Reference::Number(first)) => {
                        self.fetch(&mut next, |into| sink.known(first + offset, into))?
                    }
                    (Encoding::Delta, _) => Where::Decoded(advance(&mut next.delta)),
                    (Encoding::Literal, _) => Where::Decoded(advance(&mut next.literal)),
                    _ => Where::Raw(advance(&mut next.raw)),
                };
                self.pages.push(Page { content, hash });
            }
        }
        Ok(())
    }

    /// Content of an earlier page of this batch: run `number`, before page `page` of its block.
    fn in_batch(&self, number: usize, page: u32, base: PageAddress) -> Option<Where> {
        let until = &self.runs[..=number];
        let nth = until
            .partition_point(|run| run.record.first <= base)
            .checked_sub(1)?;
        let Run { record, place, .. } = until[nth];
        if record.first.block != base.block {
            return None;
        }
        let offset = base.page - record.first.page;
        let is_before = nth < number || base.page < page;
        if offset >= u32::from(record.count) || !is_before {
            return None;
        }
        if record.encoding == Encoding::Zero {
            return Some(Where::Zero);
        }
        Some(self.pages.get(place + super::index(offset))?.content)
    }

    /// Reads a page from outside the batch.
    fn fetch(
        &mut self,
        next: &mut Next,
        read: impl FnOnce(&mut [u8; PAGE_SIZE]) -> io::Result<()>,
    ) -> Result<Where, Miss> {
        let place = advance(&mut next.fetched);
        let (pages, _) = self.decoded.as_chunks_mut::<PAGE_SIZE>();
        read(&mut pages[place]).map_err(|_| Miss)?;
        Ok(Where::Decoded(place))
    }

    /// Hashes every page and returns the batch's digest.
    fn hash_pages(&mut self, head: &Head, records: &[u8], raw: &[u8]) -> [u8; 16] {
        for group in self.pages.chunks_mut(HASH_GROUP) {
            let mut contents = [&[0; PAGE_SIZE]; HASH_GROUP];
            let mut places = [0; HASH_GROUP];
            let mut count = 0;
            for (nth, page) in group.iter().enumerate() {
                if let Some(content) = content(&self.decoded, raw, page.content) {
                    (contents[count], places[count]) = (content, nth);
                    count += 1;
                }
            }
            let mut hashes = [self.hasher.zero(); HASH_GROUP];
            self.hasher.hash_group(&contents[..count], &mut hashes);
            for (nth, hash) in places[..count].iter().zip(hashes) {
                group[*nth].hash = hash;
            }
        }
        let mut digest = BatchDigest::new(&self.digest_key, self.ledger.lane(), head.seq, records);
        let mut pages = self.pages.iter();
        for run in &self.runs {
            for _ in 0..run.record.count {
                let page = match run.record.encoding {
                    Encoding::Zero => None,
                    Encoding::Copy
                    | Encoding::Known
                    | Encoding::Delta
                    | Encoding::Literal
                    | Encoding::Raw => pages.next(),
                };
                digest.page(page.map_or(self.hasher.zero(), |page| page.hash));
            }
        }
        digest.finish()
    }

    /// Writes the pages that are not older than what the ledger has.
    fn write(&mut self, seq: u32, raw: &[u8], sink: &mut dyn Sink) -> io::Result<u64> {
        let mut old_pages = 0;
        let mut pages = self.pages.iter();
        for run in &self.runs {
            let record = run.record;
            let addresses = || {
                let first = record.first;
                (first.page..)
                    .take(usize::from(record.count))
                    .map(move |page| PageAddress { page, ..first })
            };
            let is_old =
                |ledger: &LedgerPart, at| ledger.get(at).is_some_and(|(_, version)| version >= seq);
            let is_zero = record.encoding == Encoding::Zero;
            if is_zero && !addresses().any(|at| is_old(&self.ledger, at)) {
                zero::restore(record.first, u32::from(record.count), sink)?;
                addresses().for_each(|at| self.ledger.set(at, self.hasher.zero(), seq));
                continue;
            }
            for at in addresses() {
                let page = if is_zero { None } else { pages.next() };
                if is_old(&self.ledger, at) {
                    old_pages += 1;
                    continue;
                }
                let hash = page.map_or(self.hasher.zero(), |page| page.hash);
                match page.and_then(|page| content(&self.decoded, raw, page.content)) {
                    Some(content) => sink.page(at, content)?,
                    None => zero::restore(at, 1, sink)?,
                }
                self.ledger.set(at, hash, seq);
            }
        }
        Ok(old_pages)
    }

    fn measure(&self, parts: Parts<'_>, body_bytes: usize) -> BatchStats {
        let bytes = PartBytes {
            delta: parts.delta.len(),
            literal: parts.literal.len(),
            frame: body_bytes + LANE_FRAME_HEAD_BYTES,
        };
        measure(self.runs.iter().map(|run| &run.record), bytes)
    }
}

/// Where the next page of each part is.
#[derive(Debug)]
struct Next {
    delta: usize,
    literal: usize,
    fetched: usize,
    raw: usize,
}

fn advance(place: &mut usize) -> usize {
    *place += 1;
    *place - 1
}

/// A page's bytes; `None` for zeros.
fn content<'a>(decoded: &'a [u8], raw: &'a [u8], at: Where) -> Option<&'a [u8; PAGE_SIZE]> {
    // Both are as long as the records say: `split_payload` and `parse_records` counted.
    match at {
        Where::Decoded(place) => decoded.as_chunks().0.get(place),
        Where::Raw(place) => raw.as_chunks().0.get(place),
        Where::Zero => None,
    }
}

/// Reads the last version of every delta page.
fn read_bases(runs: &[Run], sink: &mut dyn Sink, bases: &mut [u8]) -> io::Result<()> {
    let deltas = runs
        .iter()
        .filter(|run| run.record.encoding == Encoding::Delta);
    let pages = deltas.flat_map(|run| {
        let first = run.record.first;
        (first.page..)
            .take(usize::from(run.record.count))
            .map(move |page| PageAddress { page, ..first })
    });
    let (bases, _) = bases.as_chunks_mut();
    for (at, base) in pages.zip(bases) {
        sink.read(at, base)?;
    }
    Ok(())
}

/// Last page of a run that exists and stays in one range.
fn last_page(layout: &Layout, record: &Record) -> Result<PageAddress, DecodeError> {
    let Record { first, count, .. } = *record;
    let last = u32::from(count)
        .checked_sub(1)
        .and_then(|more| first.page.checked_add(more));
    last.map(|page| PageAddress {
        block: first.block,
        page,
    })
    .filter(|last| layout.contains(*last))
    .filter(|last| last.page / RANGE_PAGES == first.page / RANGE_PAGES)
    .ok_or(DecodeError::PeerOutside { first, count })
}
