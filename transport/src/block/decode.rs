//! The target's side of a lane: batches in, pages into the sink, then into the ledger.
//!
//! Nothing reaches the sink before the whole batch is decoded into private memory and its digest
//! is found right. Any error ends the attempt; the guest is then still at the source.

use std::sync::Arc;

use super::batch::{BatchDigest, Encoding, HEAD_BYTES, Head, RECORD_BYTES, Record};
use super::encode::{count, measure};
use super::hash::DerivedKey;
use super::literal::{BadFrame, Unpacker};
use super::{
    BatchStats, Layout, LedgerPart, PAGE_SIZE, PageAddress, PageHash, PageHasher, PageRun,
    RANGE_PAGES, Sink, zero,
};
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};
use crate::wire::{LANE_FRAME_HEAD_BYTES, LaneHeader};

/// Why a lane's bytes were not applied.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The stream was opened for another lane.
    #[error("peer opened lane {found} where lane {expected} belongs")]
    PeerLane {
        /// Lane of this decoder.
        expected: usize,
        /// Lane in the header.
        found: usize,
    },
    /// The stream belongs to another, usually an older, connection.
    #[error("lane of incarnation {found:016x}; this connection is {expected:016x}")]
    PeerIncarnation {
        /// Incarnation of this connection.
        expected: u64,
        /// Incarnation in the header.
        found: u64,
    },
    /// A batch came before the lane's header.
    #[error("peer sent a batch before the lane's header")]
    PeerNoHeader,
    /// A batch is missing or came twice.
    #[error("peer sent batch {found} where batch {expected} belongs")]
    PeerSequence {
        /// Number that was due.
        expected: u32,
        /// Number in the batch.
        found: u32,
    },
    /// The batch ends inside its head or its records.
    #[error("peer sent a batch of {0} bytes that ends too early")]
    PeerTruncated(usize),
    /// No record, or more than the limit.
    #[error("peer sent a batch of {0} records; 1 to {BATCH_MAX_RECORDS} are allowed")]
    PeerRecordCount(u16),
    /// An encoding that this version does not have.
    #[error("peer sent a record of unknown encoding {0}")]
    PeerEncoding(u8),
    /// A run of no page, or one that leaves its range or block, or a page that does not exist.
    #[error(
        "peer sent a run of {count} pages at {first:?} that is not within one range of the image"
    )]
    PeerOutside {
        /// Begin of the run.
        first: PageAddress,
        /// Pages of the run.
        count: u16,
    },
    /// A page that another lane owns.
    #[error("peer sent page {at:?} of lane {owner} on lane {lane}")]
    PeerForeignLane {
        /// The page.
        at: PageAddress,
        /// Lane that owns it.
        owner: usize,
        /// Lane that it came on.
        lane: usize,
    },
    /// Runs overlap or do not ascend.
    #[error("peer sent page {0:?} out of order")]
    PeerOrder(PageAddress),
    /// More pages with content than a batch may have.
    #[error("peer sent {0} pages with content in one batch; the limit is {BATCH_MAX_PAGES}")]
    PeerTooManyPages(usize),
    /// Records and payload do not fit together.
    #[error("peer sent {found} bytes of payload where the records announce {expected}")]
    PeerPayload {
        /// Bytes that the records announce.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// The compressed pages are no frame of the announced size.
    #[error("peer sent compressed pages that do not unpack to {0} pages")]
    PeerLiteral(usize),
    /// The decoded pages are not the ones that the source encoded.
    #[error("batch {seq} does not match its digest")]
    PeerDigest {
        /// Number of the batch.
        seq: u32,
    },
    /// The sink failed.
    #[error("a page could not be written")]
    LocalSink(#[source] std::io::Error),
}

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
    /// Decoded literal pages.
    literal: Box<[u8]>,
    records: Vec<Record>,
    /// Hashes of the batch's pages with content, in order.
    hashes: Vec<PageHash>,
}

impl LaneDecoder {
    /// A decoder that continues a ledger part and takes streams of one incarnation.
    ///
    /// # Errors
    /// When zstd has no memory for a context.
    pub fn new(ledger: LedgerPart, key: &[u8; 32], incarnation: u64) -> std::io::Result<Self> {
        Ok(Self {
            ledger,
            hasher: PageHasher::new(key),
            digest_key: DerivedKey::batch(key),
            unpacker: Unpacker::new()?,
            incarnation,
            next_seq: None,
            literal: vec![0; BATCH_MAX_PAGES * PAGE_SIZE].into(),
            records: Vec::with_capacity(BATCH_MAX_RECORDS),
            hashes: Vec::with_capacity(BATCH_MAX_PAGES),
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
        if head.seq != expected || head.seq == 0 {
            return Err(DecodeError::PeerSequence {
                expected,
                found: head.seq,
            });
        }
        let record_count = usize::from(head.records);
        if record_count == 0 || record_count > BATCH_MAX_RECORDS {
            return Err(DecodeError::PeerRecordCount(head.records));
        }
        let Some((records, payload)) = rest.split_at_checked(record_count * RECORD_BYTES) else {
            return Err(truncated);
        };
        self.parse_records(records)?;
        let raw = self.unpack(&head, payload)?;
        if self.hash_pages(&head, records, raw) != head.digest {
            return Err(DecodeError::PeerDigest { seq: head.seq });
        }
        let old_pages = self
            .write(head.seq, raw, sink)
            .map_err(DecodeError::LocalSink)?;
        // A lane that used its last number takes no further batch.
        self.next_seq = Some(head.seq.wrapping_add(1));
        let literal_bytes = payload.len() - raw.len();
        let stats = measure(
            &self.records,
            literal_bytes,
            body.len() + LANE_FRAME_HEAD_BYTES,
        );
        Ok(Applied {
            stats,
            old_pages,
            missing: Vec::new(),
        })
    }

    /// Reads the records: existing pages of this lane, ascending.
    fn parse_records(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        self.records.clear();
        let layout = Arc::clone(self.ledger.layout());
        let mut free_from = None;
        let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
        for bytes in records {
            let record = Record::parse(bytes).ok_or(DecodeError::PeerEncoding(bytes[0]))?;
            let last = last_page(&layout, &record)?;
            let owner = layout.lane_of(record.first);
            if owner != self.lane() {
                let lane = self.lane();
                return Err(DecodeError::PeerForeignLane {
                    at: record.first,
                    owner,
                    lane,
                });
            }
            if free_from.is_some_and(|taken| record.first <= taken) {
                return Err(DecodeError::PeerOrder(record.first));
            }
            free_from = Some(last);
            self.records.push(record);
        }
        Ok(())
    }

    /// Decompresses the literal pages and returns the raw ones.
    fn unpack<'a>(&mut self, head: &Head, payload: &'a [u8]) -> Result<&'a [u8], DecodeError> {
        let literal_pages = count(&self.records, Encoding::Literal);
        let raw_pages = count(&self.records, Encoding::Raw);
        if literal_pages + raw_pages > BATCH_MAX_PAGES {
            return Err(DecodeError::PeerTooManyPages(literal_pages + raw_pages));
        }
        let literal_bytes = super::index(head.literal_bytes);
        let expected = literal_bytes.saturating_add(raw_pages * PAGE_SIZE);
        if payload.len() != expected {
            return Err(DecodeError::PeerPayload {
                expected,
                found: payload.len(),
            });
        }
        let (frame, raw) = payload.split_at(literal_bytes);
        if literal_pages == 0 && !frame.is_empty() {
            return Err(DecodeError::PeerLiteral(0));
        }
        if literal_pages > 0 {
            let pages = &mut self.literal[..literal_pages * PAGE_SIZE];
            self.unpacker
                .unpack(frame, pages)
                .map_err(|BadFrame| DecodeError::PeerLiteral(literal_pages))?;
        }
        Ok(raw)
    }

    /// Hashes every decoded page and returns the batch's digest.
    fn hash_pages(&mut self, head: &Head, records: &[u8], raw: &[u8]) -> [u8; 16] {
        self.hashes.clear();
        let mut digest = BatchDigest::new(&self.digest_key, self.ledger.lane(), head.seq, records);
        let mut pages = Pages::new(&self.literal, raw);
        for record in &self.records {
            for _ in 0..record.count {
                let hash = match pages.next(record.encoding) {
                    None => self.hasher.zero(),
                    Some(content) => {
                        let hash = self.hasher.hash(content);
                        self.hashes.push(hash);
                        hash
                    }
                };
                digest.page(hash);
            }
        }
        digest.finish()
    }

    /// Writes the pages that are not older than what the ledger has.
    fn write(&mut self, seq: u32, raw: &[u8], sink: &mut dyn Sink) -> std::io::Result<u64> {
        let mut old_pages = 0;
        let mut hashes = self.hashes.iter();
        let mut pages = Pages::new(&self.literal, raw);
        for record in &self.records {
            let run = || {
                (0..u32::from(record.count)).map(|offset| PageAddress {
                    block: record.first.block,
                    page: record.first.page + offset,
                })
            };
            let is_old =
                |ledger: &LedgerPart, at| ledger.get(at).is_some_and(|(_, version)| version >= seq);
            if record.encoding == Encoding::Zero && !run().any(|at| is_old(&self.ledger, at)) {
                zero::restore(record.first, u32::from(record.count), sink)?;
                run().for_each(|at| self.ledger.set(at, self.hasher.zero(), seq));
                continue;
            }
            for at in run() {
                let content = pages.next(record.encoding);
                let hash = match content {
                    Some(_) => *hashes.next().expect("one hash per page with content"),
                    None => self.hasher.zero(),
                };
                if is_old(&self.ledger, at) {
                    old_pages += 1;
                    continue;
                }
                match content {
                    Some(content) => sink.page(at, content)?,
                    None => zero::restore(at, 1, sink)?,
                }
                self.ledger.set(at, hash, seq);
            }
        }
        Ok(old_pages)
    }
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

/// Walks the contents of a batch in record order.
#[derive(Debug)]
struct Pages<'a> {
    literal: &'a [[u8; PAGE_SIZE]],
    raw: &'a [[u8; PAGE_SIZE]],
}

impl<'a> Pages<'a> {
    fn new(literal: &'a [u8], raw: &'a [u8]) -> Self {
        Self {
            literal: literal.as_chunks().0,
            raw: raw.as_chunks().0,
        }
    }

    /// The next page's content, `None` for a zero page.
    fn next(&mut self, encoding: Encoding) -> Option<&'a [u8; PAGE_SIZE]> {
        let from = match encoding {
            Encoding::Zero => return None,
            Encoding::Literal => &mut self.literal,
            Encoding::Raw => &mut self.raw,
        };
        // `unpack` counted the pages: there is always one left here.
        let (content, rest) = from.split_first()?;
        *from = rest;
        Some(content)
    }
}
