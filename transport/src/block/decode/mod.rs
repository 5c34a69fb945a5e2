//! The target's side of a lane: batches in, pages into the sink, then into the ledger.
//!
//! Nothing reaches the sink before the whole batch is decoded into private memory and its digest
//! is found right. A batch with references that does not come out right is *missed*: its pages are
//! asked for again. Any error ends the attempt; the guest is then still at the source.

mod parse;
mod resolve;

use std::io;

use self::parse::{Parts, Run};
use self::resolve::{Page, content};
use super::batch::{Encoding, HEAD_BYTES, Head, PartBytes, RECORD_BYTES, measure};
use super::hash::DerivedKey;
use super::literal::Unpacker;
use super::{
    BatchStats, DecodeError, FIRST_SEQ, LedgerPart, PAGE_SIZE, PageAddress, PageHasher, PageRun,
    Sink, zero,
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
