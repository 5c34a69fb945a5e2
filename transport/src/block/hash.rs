//! Keyed hashes. The page hash uses the pair's secret itself; everything that is hashed over page
//! hashes uses keys derived from it, so that no guest page can stand for a digest.

use std::fmt;

use super::{PAGE_SIZE, PageHash};

/// Hashes pages with the pair's secret.
#[derive(Clone)]
pub struct PageHasher {
    key: [u8; 32],
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
        Self {
            key: *key,
            zero: PageHash(zero),
        }
    }

    /// Hash of one page.
    pub fn hash(&self, content: &[u8; PAGE_SIZE]) -> PageHash {
        PageHash(first_16(&blake3::keyed_hash(&self.key, content)))
    }

    /// Hash of the page of zeros.
    pub fn zero(&self) -> PageHash {
        self.zero
    }
}

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
