//! The content of a batch's pages: unpacked, or fetched from where runs refer to, then hashed.

use std::io;

use super::LaneDecoder;
use super::parse::{Parts, Reference, Run};
use crate::block::batch::{BatchDigest, Encoding, Head};
use crate::block::hash::HASH_GROUP;
use crate::block::literal::BadFrame;
use crate::block::{DecodeError, PAGE_SIZE, PageAddress, PageHash, Sink, delta, index};

/// A page with content.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    pub(super) content: Where,
    pub(super) hash: PageHash,
}

/// Where a page's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    Decoded(usize),
    Raw(usize),
    Zero,
}

/// References that do not resolve to what the source meant.
#[derive(Debug)]
pub(super) struct Miss;

impl LaneDecoder {
    /// Brings the content of every page together, without a hash yet.
    pub(super) fn resolve(
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
        Some(self.pages.get(place + index(offset))?.content)
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
    pub(super) fn hash_pages(&mut self, head: &Head, records: &[u8], raw: &[u8]) -> [u8; 16] {
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
pub(super) fn content<'a>(
    decoded: &'a [u8],
    raw: &'a [u8],
    at: Where,
) -> Option<&'a [u8; PAGE_SIZE]> {
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
