//! A batch's body taken apart: runs of existing pages of this lane, what they refer to, and the
//! payload by its parts. Nothing is believed before it is checked here.

use std::sync::Arc;

use super::LaneDecoder;
use crate::block::batch::{Encoding, Head, RECORD_BYTES, Record};
use crate::block::{DecodeError, Layout, PAGE_SIZE, PageAddress, RANGE_PAGES, copy, index, known};
use crate::wire::limits::BATCH_MAX_PAGES;

/// A run of the batch in progress.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) record: Record,
    pub(super) reference: Reference,
    /// Number of its first page among the pages with content.
    pub(super) place: usize,
}

/// What a run refers to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reference {
    Nothing,
    Image(PageAddress),
    Number(u32),
}

/// The payload of a batch by its parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) delta: &'a [u8],
    pub(super) literal: &'a [u8],
    pub(super) raw: &'a [u8],
}

impl LaneDecoder {
    /// Reads the records: existing pages of this lane, ascending, not too many with content.
    pub(super) fn parse_records(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
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
    pub(super) fn parse_references<'a>(&mut self, mut bytes: &'a [u8]) -> Option<&'a [u8]> {
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
    pub(super) fn check_references(&self) -> Result<(), DecodeError> {
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
    pub(super) fn count(&self, encoding: Encoding) -> usize {
        let runs = self
            .runs
            .iter()
            .filter(|run| run.record.encoding == encoding);
        runs.map(|run| usize::from(run.record.count)).sum()
    }

    /// Cuts the payload where head and records say.
    pub(super) fn split_payload<'a>(
        &self,
        head: &Head,
        payload: &'a [u8],
    ) -> Result<Parts<'a>, DecodeError> {
        let delta_bytes = index(head.delta_bytes);
        let literal_bytes = index(head.literal_bytes);
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
