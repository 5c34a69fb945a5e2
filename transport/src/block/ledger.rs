//! What was last sent (source) or applied (target) for every page, and the root over all of it.
//!
//! A page that was neither announced nor seeded has no entry. Versions are 1 for a page that both
//! sides seeded from an earlier attempt, 2 for one that was then announced with that content, and from
//! [`FIRST_SEQ`] on the number of the batch that brought it. Entries are stored per range and only for ranges
//! that have one: about 20 bytes per page. Each range keeps the digest of its entries until one
//! changes, so a root after a round costs only the ranges that the round touched.

use std::sync::Arc;

use super::hash::DerivedKey;
use super::{LANES, Layout, PageAddress, PageHash, RANGE_PAGES, Root, index};

/// Number of a lane's first batch.
pub const FIRST_SEQ: u32 = 3;
/// Version of a page that both sides held before the attempt.
const SEEDED: u32 = 1;
/// Version of such a page after QEMU announced it with the same content.
const CONFIRMED: u32 = 2;

const SLOTS: usize = RANGE_PAGES as usize;

/// Makes the parts of a ledger and their root.
#[derive(Debug)]
pub struct Ledger;

impl Ledger {
    /// An empty ledger, split by lane so that each lane's owner has its own part.
    pub fn split(layout: &Arc<Layout>, key: &[u8; 32]) -> [LedgerPart; LANES] {
        std::array::from_fn(|lane| LedgerPart::new(Arc::clone(layout), lane, key))
    }

    /// Root over all parts, see docs/protocol.md#root. Call [`LedgerPart::refresh`] on each part
    /// ahead (in parallel, where time matters) and this costs microseconds per GiB.
    ///
    /// # Panics
    /// When `parts[n]` is not the part of lane `n` of this layout.
    //= docs/protocol.md#root
    pub fn root(layout: &Layout, parts: &[&LedgerPart; LANES], key: &[u8; 32]) -> Root {
        for (lane, part) in parts.iter().enumerate() {
            assert!(
                part.lane == lane && *part.layout == *layout,
                "part of another ledger"
            );
        }
        let mut hasher = DerivedKey::root(key).hasher();
        for (block, spec) in layout.blocks().iter().enumerate() {
            let name_bytes = u16::try_from(spec.name.len()).expect("checked by Layout");
            hasher.update(&name_bytes.to_be_bytes());
            hasher.update(spec.name.as_bytes());
            hasher.update(&(u64::from(spec.pages) * super::PAGE_SIZE as u64).to_be_bytes());
            for range in layout.block_ranges(block) {
                let place = layout.place(layout.range(range).first);
                match parts[place.lane].range_digest(place.nth) {
                    Some(digest) => hasher.update(&[1]).update(&digest),
                    None => hasher.update(&[0; 33]),
                };
            }
        }
        Root(*hasher.finalize().as_bytes())
    }
}

/// The ledger of one lane's ranges. One owner at a time (S6).
#[derive(Debug, Clone)]
pub struct LedgerPart {
    layout: Arc<Layout>,
    lane: usize,
    key: DerivedKey,
    ranges: Vec<Option<Box<RangeEntries>>>,
    announced: u64,
}

/// Entries of one range.
#[derive(Debug, Clone)]
struct RangeEntries {
    entries: [Entry; SLOTS],
    /// Entries with a version.
    announced: u32,
    /// Digest of the entries, forgotten when one changes.
    digest: Option<[u8; 32]>,
}

/// One page. Version 0 stands for no entry; the hash then says whether there was one.
#[derive(Debug, Clone, Copy)]
struct Entry {
    hash: [u8; 16],
    version: u32,
}

const NEVER: Entry = Entry {
    hash: [0; 16],
    version: 0,
};
const FORGOTTEN: Entry = Entry {
    hash: [0xff; 16],
    version: 0,
};

impl LedgerPart {
    fn new(layout: Arc<Layout>, lane: usize, key: &[u8; 32]) -> Self {
        let ranges = vec![None; index(layout.lane_ranges(lane))];
        Self {
            layout,
            lane,
            key: DerivedKey::range(key),
            ranges,
            announced: 0,
        }
    }

    /// The lane whose ranges these are.
    pub fn lane(&self) -> usize {
        self.lane
    }

    /// The layout of the image.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Number of pages that have an entry.
    pub fn announced_pages(&self) -> u64 {
        self.announced
    }

    /// Hash and version of a page, `None` when it has no entry.
    ///
    /// # Panics
    /// When the page is not in this lane.
    pub fn get(&self, at: PageAddress) -> Option<(PageHash, u32)> {
        let (nth, slot) = self.place(at);
        let entry = self.ranges[nth].as_ref()?.entries[slot];
        (entry.version > 0).then_some((PageHash(entry.hash), entry.version))
    }

    /// Both sides hold this content of the page since before the attempt.
    ///
    /// # Panics
    /// When the page is not in this lane.
    pub fn seed(&mut self, at: PageAddress, hash: PageHash) {
        self.set(at, hash, SEEDED);
    }

    /// A seeded page was announced with the content that it was seeded with.
    ///
    /// # Panics
    /// When the page is not in this lane.
    pub fn confirm(&mut self, at: PageAddress) {
        let (nth, slot) = self.place(at);
        if let Some(range) = &mut self.ranges[nth]
            && range.entries[slot].version == SEEDED
        {
            range.entries[slot].version = CONFIRMED;
        }
    }

    /// The other side does not hold what was sent for the page. It has no entry from here on, and
    /// [`is_forgotten`](Self::is_forgotten) until it gets one.
    ///
    /// # Panics
    /// When the page is not in this lane.
    pub fn forget(&mut self, at: PageAddress) {
        let (nth, slot) = self.place(at);
        let Some(range) = &mut self.ranges[nth] else {
            return;
        };
        if range.entries[slot].version > 0 {
            range.announced -= 1;
            self.announced -= 1;
            range.digest = None;
            range.entries[slot] = FORGOTTEN;
        }
    }

    /// Whether the page's entry was taken back: it must go without a reference.
    ///
    /// # Panics
    /// When the page is not in this lane.
    pub fn is_forgotten(&self, at: PageAddress) -> bool {
        let (nth, slot) = self.place(at);
        self.ranges[nth].as_ref().is_some_and(|range| {
            let entry = range.entries[slot];
            entry.version == 0 && entry.hash == FORGOTTEN.hash
        })
    }

    /// Announces a page's content as of a version.
    ///
    /// # Panics
    /// When the page is not in this lane, or the version is 0.
    pub fn set(&mut self, at: PageAddress, hash: PageHash, version: u32) {
        assert!(version > 0, "versions are counted from 1");
        let (nth, slot) = self.place(at);
        let range = self.ranges[nth].get_or_insert_with(|| {
            Box::new(RangeEntries {
                entries: [NEVER; SLOTS],
                announced: 0,
                digest: None,
            })
        });
        let entry = &mut range.entries[slot];
        if entry.version == 0 {
            range.announced += 1;
            self.announced += 1;
        }
        if entry.version == 0 || entry.hash != hash.0 {
            range.digest = None;
        }
        *entry = Entry {
            hash: hash.0,
            version,
        };
    }

    /// Pages with an entry in ascending order of each block's ranges in this lane.
    pub fn iter(&self) -> impl Iterator<Item = (PageAddress, PageHash)> {
        self.iter_from(SEEDED)
    }

    /// [`iter`](Self::iter) without the pages that were seeded and never announced: QEMU may have
    /// given them back, so that memory need not hold what the ledger says (S10).
    pub fn iter_announced(&self) -> impl Iterator<Item = (PageAddress, PageHash)> {
        self.iter_from(CONFIRMED)
    }

    fn iter_from(&self, version: u32) -> impl Iterator<Item = (PageAddress, PageHash)> {
        (0_u32..)
            .zip(&self.ranges)
            .filter_map(|(nth, range)| Some((nth, range.as_ref()?)))
            .flat_map(move |(nth, range)| {
                let first = self.layout.lane_range(self.lane, nth).first;
                (0_u32..)
                    .zip(&range.entries)
                    .filter(move |(_, entry)| entry.version >= version)
                    .map(move |(page, entry)| {
                        let at = PageAddress {
                            block: first.block,
                            page: first.page + page,
                        };
                        (at, PageHash(entry.hash))
                    })
            })
    }

    /// Brings the digests of all changed ranges up to date, so that the next root is quick.
    pub fn refresh(&mut self) {
        for nth in 0..self.layout.lane_ranges(self.lane) {
            let digest = self.range_digest(nth);
            if let Some(range) = &mut self.ranges[index(nth)] {
                range.digest = digest;
            }
        }
    }

    /// Digest of a range, `None` when no page of it was announced.
    fn range_digest(&self, nth: u32) -> Option<[u8; 32]> {
        let range = self.ranges[index(nth)].as_ref()?;
        if range.announced == 0 {
            return None;
        }
        if range.digest.is_some() {
            return range.digest;
        }
        let pages = index(self.layout.lane_range(self.lane, nth).pages);
        let mut bytes = [0; SLOTS * 17];
        for (entry, out) in range.entries[..pages]
            .iter()
            .zip(bytes.chunks_exact_mut(17))
        {
            if entry.version > 0 {
                out[0] = 1;
                out[1..].copy_from_slice(&entry.hash);
            }
        }
        let digest = self.key.hasher().update(&bytes[..pages * 17]).finalize();
        Some(*digest.as_bytes())
    }

    fn place(&self, at: PageAddress) -> (usize, usize) {
        assert!(self.layout.contains(at), "{at:?} is not in the image");
        let place = self.layout.place(at);
        assert!(
            place.lane == self.lane,
            "{at:?} is of lane {}, not {}",
            place.lane,
            self.lane
        );
        (index(place.nth), place.slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockSpec};

    fn layout(name: &str) -> Arc<Layout> {
        let blocks = vec![
            BlockSpec {
                name: name.into(),
                pages: 512 * 9 + 5,
            },
            BlockSpec {
                name: "rom".into(),
                pages: 40,
            },
        ];
        Arc::new(Layout::new(blocks).unwrap())
    }

    fn root(layout: &Layout, parts: &[LedgerPart; LANES]) -> Root {
        Ledger::root(layout, &parts.each_ref(), &[1; 32])
    }

    fn at(block: u16, page: u32) -> PageAddress {
        PageAddress {
            block: BlockId(block),
            page,
        }
    }

    /// The root as the spec words it, computed the plain way, equals the one from kept digests.
    #[test]
    fn root_is_what_the_spec_says() {
        let layout = layout("ram");
        let mut parts = Ledger::split(&layout, &[1; 32]);
        let known = [
            (at(0, 0), 3_u8),
            (at(0, 513), 4),
            (at(0, 512 * 9 + 4), 5),
            (at(1, 39), 6),
        ];
        for (page, byte) in known {
            parts[layout.lane_of(page)].set(page, PageHash([byte; 16]), 1);
        }
        let mut expected =
            blake3::Hasher::new_keyed(&blake3::derive_key("scaleaway/1 ledger root", &[1; 32]));
        for (block, spec) in (0_u16..).zip(layout.blocks()) {
            expected.update(&crate::block::length_u16(spec.name.len()).to_be_bytes());
            expected.update(spec.name.as_bytes());
            expected.update(&(u64::from(spec.pages) * 4096).to_be_bytes());
            for first in (0..spec.pages).step_by(512) {
                let mut announced = false;
                let mut range = blake3::Hasher::new_keyed(&blake3::derive_key(
                    "scaleaway/1 ledger range",
                    &[1; 32],
                ));
                for page in first..(first + 512).min(spec.pages) {
                    match known.iter().find(|(known, _)| *known == at(block, page)) {
                        Some((_, byte)) => {
                            announced = true;
                            range.update(&[1]).update(&[*byte; 16]);
                        }
                        None => {
                            range.update(&[0; 17]);
                        }
                    }
                }
                if announced {
                    expected.update(&[1]).update(range.finalize().as_bytes());
                } else {
                    expected.update(&[0; 33]);
                }
            }
        }
        assert_eq!(root(&layout, &parts).0, *expected.finalize().as_bytes());
        parts.iter_mut().for_each(LedgerPart::refresh);
        assert_eq!(root(&layout, &parts).0, *expected.finalize().as_bytes());
    }

    /// Every fact that must be equal on both sides changes the root; a version does not.
    #[test]
    fn root_covers_content_and_layout() {
        let plain = layout("ram");
        let mut parts = Ledger::split(&plain, &[1; 32]);
        let empty = root(&plain, &parts);
        let other = layout("pc.ram");
        assert_ne!(empty, root(&other, &Ledger::split(&other, &[1; 32])));

        parts[0].set(at(0, 1), PageHash([0; 16]), 1);
        let announced = root(&plain, &parts);
        assert_ne!(
            empty, announced,
            "a page whose hash is zero is not a page never announced"
        );
        parts.iter_mut().for_each(LedgerPart::refresh);
        parts[0].set(at(0, 1), PageHash([0; 16]), 2);
        assert_eq!(announced, root(&plain, &parts));
        parts[0].set(at(0, 1), PageHash([1; 16]), 3);
        assert_ne!(announced, root(&plain, &parts));
        assert_ne!(announced, Ledger::root(&plain, &parts.each_ref(), &[2; 32]));
    }

    /// The life of a page that both sides held before: seeded, confirmed, sent, taken back.
    #[test]
    fn seeds_are_announced_apart() {
        let layout = layout("ram");
        let mut parts = Ledger::split(&layout, &[1; 32]);
        let empty = root(&layout, &parts);
        let part = &mut parts[0];
        let hash = PageHash([7; 16]);
        part.seed(at(0, 7), hash);
        part.seed(at(0, 8), hash);
        part.confirm(at(0, 8));
        part.confirm(at(0, 9));
        assert_eq!(part.get(at(0, 7)), Some((hash, 1)));
        assert_eq!(part.get(at(0, 8)), Some((hash, 2)));
        assert_eq!(part.get(at(0, 9)), None);
        assert_eq!(part.iter().count(), 2);
        assert_eq!(
            part.iter_announced().collect::<Vec<_>>(),
            [(at(0, 8), hash)]
        );
        part.set(at(0, 7), hash, FIRST_SEQ);
        part.confirm(at(0, 7));
        assert_eq!(part.get(at(0, 7)), Some((hash, FIRST_SEQ)));

        part.refresh();
        part.forget(at(0, 7));
        part.forget(at(0, 8));
        part.forget(at(0, 10));
        assert_eq!(part.announced_pages(), 0);
        assert!(part.is_forgotten(at(0, 7)) && !part.is_forgotten(at(0, 10)));
        assert_eq!(root(&layout, &parts), empty);
        parts[0].set(at(0, 7), hash, FIRST_SEQ);
        assert!(!parts[0].is_forgotten(at(0, 7)));
    }

    /// Entries come back in order with what was set.
    #[test]
    fn entries_are_kept() {
        let layout = layout("ram");
        let mut part = Ledger::split(&layout, &[1; 32])[0].clone();
        assert_eq!(part.get(at(0, 7)), None);
        part.set(at(0, 512 * 8), PageHash([2; 16]), 9);
        part.set(at(0, 7), PageHash([1; 16]), 4);
        assert_eq!(part.get(at(0, 7)), Some((PageHash([1; 16]), 4)));
        assert_eq!(part.announced_pages(), 2);
        assert_eq!(
            part.iter().collect::<Vec<_>>(),
            [
                (at(0, 7), PageHash([1; 16])),
                (at(0, 512 * 8), PageHash([2; 16]))
            ]
        );
    }
}
