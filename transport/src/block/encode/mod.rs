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

mod choose;
mod put;
mod staged;

use std::io;

use bytes::BytesMut;

use self::staged::{Form, Staged};
use super::batch::Record;
use super::delta::DeltaPacker;
use super::hash::DerivedKey;
use super::literal::{LEVEL_DEFAULT, Packer};
use super::{BatchStats, Disable, LedgerPart, PAGE_SIZE, PageHasher, Sources, Taken};
use crate::wire::LaneHeader;
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};

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
    batch: Staged,
    /// Pages of one frame, where they are not neighbours in the slots.
    gathered: Vec<u8>,
    records: Vec<Record>,
    /// Records and references as they go out.
    text: BytesMut,
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
            batch: Staged::new(),
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
