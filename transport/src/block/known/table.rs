//! The numbers that the target gave, by the first bytes of a page's hash.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::block::PageHash;

/// Places that one prefix may be at, one after the other.
const PROBES_MAX: usize = 8;

/// The target's answers: first bytes of a page's hash -> number. Bounded, read by all lanes without
/// a lock. One thread inserts; an answer that finds no free place is dropped, which costs its page
/// the reference.
#[derive(Debug)]
pub struct KnownTable {
    /// 0 for a free place.
    prefixes: Box<[AtomicU64]>,
    numbers: Box<[AtomicU32]>,
}

impl KnownTable {
    /// A table for about so many answers: 18 bytes each, at least.
    pub fn new(max_entries: usize) -> Self {
        // One third stays free, so that eight places nearly always suffice.
        let places = (max_entries + max_entries / 2).max(PROBES_MAX);
        Self {
            prefixes: (0..places).map(|_| AtomicU64::new(0)).collect(),
            numbers: (0..places).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// The target holds content with this prefix under `number`. Returns whether there was room.
    pub fn insert(&self, prefix: [u8; 8], number: u32) -> bool {
        let key = u64::from_be_bytes(prefix);
        if key == 0 {
            return false;
        }
        for place in self.places(key) {
            let found = self.prefixes[place].load(Ordering::Relaxed);
            if found == 0 || found == key {
                self.numbers[place].store(number, Ordering::Relaxed);
                self.prefixes[place].store(key, Ordering::Release);
                return true;
            }
        }
        false
    }

    /// The number for a page's content.
    pub fn get(&self, hash: &PageHash) -> Option<u32> {
        let key = u64::from_be_bytes(*hash.0.first_chunk()?);
        for place in self.places(key) {
            match self.prefixes[place].load(Ordering::Acquire) {
                0 => return None,
                found if found == key => return Some(self.numbers[place].load(Ordering::Relaxed)),
                _ => {}
            }
        }
        None
    }

    fn places(&self, key: u64) -> impl Iterator<Item = usize> {
        let places = self.prefixes.len();
        // The prefix is a hash: its high half spreads evenly over the places.
        let first = (u128::from(key) * places as u128) >> 64;
        let first = usize::try_from(first).expect("below the number of places");
        (0..PROBES_MAX).map(move |step| (first + step) % places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(seed: u32) -> PageHash {
        PageHash(
            *blake3::hash(&seed.to_be_bytes())
                .as_bytes()
                .first_chunk()
                .unwrap(),
        )
    }

    fn prefix(hash: PageHash) -> [u8; 8] {
        *hash.0.first_chunk().unwrap()
    }

    /// Nearly every answer up to the limit is kept, none is mixed up with another.
    #[test]
    fn answers_are_kept() {
        let table = KnownTable::new(10_000);
        let kept = (0..10_000)
            .filter(|seed| table.insert(prefix(hash(*seed)), seed * 3))
            .count();
        assert!(kept > 9_700, "{kept}");
        let found = (0..10_000)
            .filter(|seed| {
                let number = table.get(&hash(*seed));
                assert!(number.is_none_or(|number| number == seed * 3));
                number.is_some()
            })
            .count();
        assert_eq!(found, kept);
        assert_eq!(table.get(&hash(10_001)), None);
    }

    /// A second answer replaces the first; a full table takes no more; a table for nothing is small.
    #[test]
    fn table_is_bounded() {
        let table = KnownTable::new(0);
        assert_eq!(table.prefixes.len(), PROBES_MAX);
        assert!(table.insert(prefix(hash(0)), 1));
        assert!(table.insert(prefix(hash(0)), 2));
        assert_eq!(table.get(&hash(0)), Some(2));
        assert_eq!(
            (1..100)
                .filter(|seed| table.insert(prefix(hash(*seed)), 7))
                .count(),
            7
        );
        assert!(!table.insert([0; 8], 1));
    }
}
