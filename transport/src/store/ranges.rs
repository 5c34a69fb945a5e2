//! Hashes of an image by ranges, and the digests by which two hosts find where they agree.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::threads::on_threads;
use crate::block::{LANES, Layout, PAGE_SIZE, PageAddress, PageHash, PageHasher, RangeSpan};

/// The range of a running number.
pub(super) fn span(layout: &Layout, number: u32) -> RangeSpan {
    let lanes = u32::try_from(LANES).expect("LANES is small");
    let lane = usize::try_from(number % lanes).expect("below LANES");
    layout.lane_range(lane, number / lanes)
}

/// Key of the digests of ranges.
#[derive(Clone)]
pub struct BasisKey([u8; 32]);

impl std::fmt::Debug for BasisKey {
    /// The key stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BasisKey")
    }
}

impl BasisKey {
    /// Derives it from the pair's secret.
    //= docs/protocol.md#keys
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(blake3::derive_key("scaleaway/1 basis", secret))
    }
}

/// The hash of every page of an image. A range without data takes no memory.
#[derive(Debug)]
pub struct RangeHashes {
    layout: Arc<Layout>,
    /// By running number; `None` where all pages are zero.
    ranges: Vec<Option<Box<[PageHash]>>>,
    zero: PageHash,
}

/// Reads contiguous pages of one range.
type ReadRange<'a> = dyn Fn(PageAddress, &mut [u8]) -> io::Result<()> + Sync + 'a;

impl RangeHashes {
    /// Hashes the ranges of `with_data`; all others are zero pages.
    pub(super) fn of_image(
        layout: &Arc<Layout>,
        key: &[u8; 32],
        threads: usize,
        with_data: &[u32],
        read: &ReadRange<'_>,
    ) -> io::Result<RangeHashes> {
        let hasher = PageHasher::new(key);
        let ranges = Mutex::new(vec![None; layout.ranges_total() as usize]);
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let work = || -> io::Result<()> {
            let mut content = Vec::new();
            while let Some(number) = with_data.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let range = span(layout, *number);
                let hashes = hash_range(&hasher, range, &mut content, read)
                    .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
                let mut ranges = ranges.lock().unwrap_or_else(PoisonError::into_inner);
                ranges[*number as usize] = hashes;
            }
            Ok(())
        };
        on_threads(threads, work)?;
        Ok(RangeHashes {
            layout: Arc::clone(layout),
            ranges: ranges.into_inner().unwrap_or_else(PoisonError::into_inner),
            zero: hasher.zero(),
        })
    }

    /// Number of ranges.
    pub fn len(&self) -> u32 {
        self.layout.ranges_total()
    }

    /// Whether every page is zero: nothing to agree on.
    pub fn is_empty(&self) -> bool {
        self.ranges.iter().all(Option::is_none)
    }

    /// Whether every page of a range is zero.
    ///
    /// # Panics
    /// When there is no such range.
    pub fn is_zero(&self, range: u32) -> bool {
        self.ranges[range as usize].is_none()
    }

    /// Every page of a range with its hash, zero pages too.
    ///
    /// # Panics
    /// When there is no such range.
    pub fn pages(&self, range: u32) -> impl Iterator<Item = (PageAddress, PageHash)> {
        let span = span(&self.layout, range);
        let hashes = self.ranges[range as usize].as_deref();
        (0..span.pages).map(move |nth| {
            let page = PageAddress {
                block: span.first.block,
                page: span.first.page + nth,
            };
            (
                page,
                hashes.map_or(self.zero, |hashes| hashes[nth as usize]),
            )
        })
    }

    /// What one side says and the other compares: fresh with each nonce, so that it proves that the
    /// range is held now and tells nothing to one who does not hold it (S14).
    ///
    /// # Panics
    /// When there is no such range.
    //= docs/protocol.md#basis
    pub fn digest(&self, range: u32, nonce: &[u8; 16], key: &BasisKey) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(nonce).update(&range.to_be_bytes());
        for (_, hash) in self.pages(range) {
            hasher.update(&hash.0);
        }
        *hasher
            .finalize()
            .as_bytes()
            .first_chunk()
            .expect("a BLAKE3 hash has 32 bytes")
    }
}

/// Hashes one range; `None` when all of it is zero.
fn hash_range(
    hasher: &PageHasher,
    range: RangeSpan,
    content: &mut Vec<u8>,
    read: &ReadRange<'_>,
) -> io::Result<Option<Box<[PageHash]>>> {
    content.resize(range.pages as usize * PAGE_SIZE, 0);
    read(range.first, content)?;
    let (pages, _) = content.as_chunks::<PAGE_SIZE>();
    let hash = |page: &[u8; PAGE_SIZE]| {
        if *page == [0; PAGE_SIZE] {
            hasher.zero()
        } else {
            hasher.hash(page)
        }
    };
    let hashes: Box<[PageHash]> = pages.iter().map(hash).collect();
    let all_zero = hashes.iter().all(|hash| *hash == hasher.zero());
    Ok((!all_zero).then_some(hashes))
}
