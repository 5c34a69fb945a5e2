//! Keyed hashes. The page hash uses the pair's secret itself; everything that is hashed over page
//! hashes uses keys derived from it, so that no guest page can stand for a digest.

use std::fmt;

use blake3::IncrementCounter;
use blake3::platform::Platform;

use super::{PAGE_SIZE, PageHash};

/// Bytes of a BLAKE3 chunk and of a chaining value.
const CHUNK: usize = 1024;
const VALUE: usize = 32;
/// Chunks of a page.
const CHUNKS: usize = PAGE_SIZE / CHUNK;
/// Pages that are hashed side by side: as many as the widest registers have lanes.
pub(super) const HASH_GROUP: usize = 16;

/// Flags of the BLAKE3 specification, section 2.2.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED: u8 = 1 << 4;

/// Hashes pages with the pair's secret.
#[derive(Clone)]
pub struct PageHasher {
    key: [u8; 32],
    key_words: [u32; 8],
    platform: Platform,
    zero: PageHash,
}

impl fmt::Debug for PageHasher {
    /// The key stays out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageHasher").finish_non_exhaustive()
    }
}

impl PageHasher {
    /// Takes the pair's secret.
    pub fn new(key: &[u8; 32]) -> Self {
        let zero = first_16(&blake3::keyed_hash(key, &[0; PAGE_SIZE]));
        let (words, _) = key.as_chunks();
        Self {
            key: *key,
            key_words: std::array::from_fn(|word| u32::from_le_bytes(words[word])),
            platform: Platform::detect(),
            zero: PageHash(zero),
        }
    }

    /// Hash of one page.
    pub fn hash(&self, content: &[u8; PAGE_SIZE]) -> PageHash {
        self.seen(first_16(&blake3::keyed_hash(&self.key, content)))
    }

    /// The hash as it is, but in a test with [`WEAK_KEY`]: there every index finds every page.
    fn seen(&self, hash: [u8; 16]) -> PageHash {
        #[cfg(test)]
        if self.key == WEAK_KEY {
            let mut weak = hash;
            weak[..8].fill(0x11);
            return PageHash(weak);
        }
        PageHash(hash)
    }

    /// Hashes of up to [`HASH_GROUP`] pages. One page has four chunks, a quarter of what wide
    /// registers take at once; the same chunk of many pages fills them: more than twice as fast as
    /// page by page.
    ///
    /// # Panics
    /// When there are more pages than that, or fewer `hashes` than pages.
    pub(super) fn hash_group(&self, pages: &[&[u8; PAGE_SIZE]], hashes: &mut [PageHash]) {
        if let [page] = pages {
            hashes[0] = self.hash(page);
            return;
        }
        let count = pages.len();
        // Chaining values of one chunk of every page, then of all chunks page by page.
        let mut values = [0; HASH_GROUP * VALUE];
        let mut parents = [0; HASH_GROUP * CHUNKS * VALUE];
        for chunk in 0..CHUNKS {
            let mut inputs = [&[0; CHUNK]; HASH_GROUP];
            for (input, page) in inputs.iter_mut().zip(pages) {
                *input = &page.as_chunks().0[chunk];
            }
            self.many(
                &inputs[..count],
                chunk as u64,
                KEYED,
                (CHUNK_START, CHUNK_END),
                &mut values,
            );
            let (values, _) = values[..count * VALUE].as_chunks::<VALUE>();
            for (page, value) in values.iter().enumerate() {
                parents[(page * CHUNKS + chunk) * VALUE..][..VALUE].copy_from_slice(value);
            }
        }
        let mut halves = [0; HASH_GROUP * CHUNKS / 2 * VALUE];
        self.parents(&parents[..count * CHUNKS * VALUE], 0, &mut halves);
        self.parents(&halves[..count * CHUNKS / 2 * VALUE], ROOT, &mut values);
        let (values, _) = values.as_chunks::<VALUE>();
        for (hash, value) in hashes[..count].iter_mut().zip(values) {
            let [first, _] = *value.as_chunks().0 else {
                unreachable!("a value is two times 16 bytes");
            };
            *hash = self.seen(first);
        }
    }

    /// Joins chaining values two by two.
    fn parents(&self, values: &[u8], flag: u8, out: &mut [u8]) {
        let (blocks, _) = values.as_chunks::<{ 2 * VALUE }>();
        let mut inputs = [&[0; 2 * VALUE]; HASH_GROUP * CHUNKS / 2];
        for (input, block) in inputs.iter_mut().zip(blocks) {
            *input = block;
        }
        self.many(
            &inputs[..blocks.len()],
            0,
            KEYED | PARENT | flag,
            (0, 0),
            out,
        );
    }

    fn many<const N: usize>(
        &self,
        inputs: &[&[u8; N]],
        counter: u64,
        flags: u8,
        (start, end): (u8, u8),
        out: &mut [u8],
    ) {
        assert!(inputs.len() * VALUE <= out.len(), "room for each value");
        let key = &self.key_words;
        let same = IncrementCounter::No;
        self.platform
            .hash_many(inputs, key, counter, same, flags, start, end, out);
    }

    /// Hash of the page of zeros.
    pub fn zero(&self) -> PageHash {
        self.zero
    }
}

/// With this secret all page hashes have the same first half, the part that indexes go by (S12).
#[cfg(test)]
pub(super) const WEAK_KEY: [u8; 32] = [0xee; 32];

/// Key of one purpose, derived from the pair's secret.
#[derive(Clone)]
pub(super) struct DerivedKey([u8; 32]);

impl fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DerivedKey")
    }
}

impl DerivedKey {
    //= docs/protocol.md#keys
    pub(super) fn range(secret: &[u8; 32]) -> Self {
        Self(blake3::derive_key("scaleaway/1 ledger range", secret))
    }

    pub(super) fn root(secret: &[u8; 32]) -> Self {
        Self(blake3::derive_key("scaleaway/1 ledger root", secret))
    }

    pub(super) fn batch(secret: &[u8; 32]) -> Self {
        Self(blake3::derive_key("scaleaway/1 batch digest", secret))
    }

    pub(super) fn urgent(secret: &[u8; 32]) -> Self {
        Self(blake3::derive_key("scaleaway/1 urgent digest", secret))
    }

    pub(super) fn hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.0)
    }
}

/// First 16 bytes of a BLAKE3 output.
pub(super) fn first_16(hash: &blake3::Hash) -> [u8; 16] {
    *hash
        .as_bytes()
        .first_chunk()
        .expect("a BLAKE3 hash has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page hash is what interfaces promise: 16 bytes of BLAKE3 keyed with the secret.
    #[test]
    fn page_hash_is_keyed_blake3() {
        let hasher = PageHasher::new(&[7; 32]);
        let page = [3; PAGE_SIZE];
        assert_eq!(
            hasher.hash(&page).0,
            blake3::keyed_hash(&[7; 32], &page).as_bytes()[..16]
        );
        assert_eq!(hasher.zero(), hasher.hash(&[0; PAGE_SIZE]));
        assert_ne!(hasher.hash(&page), PageHasher::new(&[8; 32]).hash(&page));
    }

    /// Pages hashed side by side have the hashes that they have alone, whatever their number.
    #[test]
    fn groups_hash_as_single_pages() {
        let hasher = PageHasher::new(&[9; 32]);
        let pages: Vec<[u8; PAGE_SIZE]> = (0..HASH_GROUP)
            .map(|seed| {
                let mut page = [0; PAGE_SIZE];
                let mut bytes = blake3::Hasher::new();
                bytes.update(&[super::super::length_u16(seed).to_be_bytes()[1]]);
                bytes.finalize_xof().fill(&mut page);
                page
            })
            .collect();
        let all: Vec<&[u8; PAGE_SIZE]> = pages.iter().collect();
        for count in 0..=HASH_GROUP {
            let mut hashes = [PageHash([0; 16]); HASH_GROUP];
            hasher.hash_group(&all[..count], &mut hashes);
            for (page, hash) in all[..count].iter().zip(hashes) {
                assert_eq!(hash, hasher.hash(page), "group of {count}");
            }
        }
    }

    /// A secret never reaches a log line.
    #[test]
    fn debug_hides_the_key() {
        let text = format!(
            "{:?} {:?}",
            PageHasher::new(&[123; 32]),
            DerivedKey([123; 32])
        );
        assert!(!text.contains("123"), "{text}");
    }
}
