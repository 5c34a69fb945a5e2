//! Pages that a running guest waits for (post-copy): outside of the lanes, so that nothing is before
//! them. docs/protocol.md#post-copy is the spec.

use std::io;

use bytes::Bytes;

use super::hash::{DerivedKey, first_16};
use super::{Contents, Layout, PAGE_SIZE, PageAddress, PageHasher, PageRun, Taken, index};
use crate::wire::limits::URGENT_MAX_PAGES;

/// A quick level: the guest waits.
const LEVEL: i32 = 1;

/// What an Urgent frame carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urgent {
    /// Over the runs and the hashes of their pages.
    pub digest: [u8; 16],
    /// The pages, in order.
    pub runs: Vec<PageRun>,
    /// Their content, one zstd frame.
    pub data: Bytes,
}

/// Why urgent pages are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrgentError {
    /// No pages, too many, or some that do not exist.
    #[error("urgent pages that do not exist, or {0} of them")]
    PeerRuns(usize),
    /// The frame does not hold these pages.
    #[error("urgent pages do not unpack, or fail their digest")]
    PeerContent,
}

/// Packs taken pages, at most [`URGENT_MAX_PAGES`].
///
/// # Errors
/// When a page cannot be read or zstd fails.
///
/// # Panics
/// When there are more.
pub fn pack_urgent(taken: &[Taken], contents: &dyn Contents, key: &[u8; 32]) -> io::Result<Urgent> {
    assert!(taken.len() <= URGENT_MAX_PAGES, "bounded by the caller");
    let mut pages = vec![0; taken.len() * PAGE_SIZE];
    let mut runs: Vec<PageRun> = Vec::new();
    for (page, into) in taken.iter().zip(pages.as_chunks_mut().0) {
        if !page.zero {
            contents.read(page.at, into)?;
        }
        match runs.last_mut() {
            Some(run)
                if run.first.block == page.at.block
                    && run.first.page.checked_add(run.count.into()) == Some(page.at.page) =>
            {
                run.count += 1;
            }
            _ => runs.push(PageRun {
                first: page.at,
                count: 1,
            }),
        }
    }
    let data = zstd::bulk::compress(&pages, LEVEL)?;
    Ok(Urgent {
        digest: digest(&runs, &pages, key),
        runs,
        data: data.into(),
    })
}

/// Unpacks the pages: their addresses and their contents, one after the other.
///
/// # Errors
/// [`UrgentError`]; nothing of it may be used then.
pub fn unpack_urgent(
    urgent: &Urgent,
    layout: &Layout,
    key: &[u8; 32],
) -> Result<(Vec<PageAddress>, Vec<u8>), UrgentError> {
    let pages: usize = urgent.runs.iter().map(|run| usize::from(run.count)).sum();
    let exists = |run: &PageRun| {
        let last = u32::from(run.count)
            .checked_sub(1)
            .and_then(|more| run.first.page.checked_add(more));
        last.is_some_and(|page| layout.contains(PageAddress { page, ..run.first }))
    };
    if pages == 0 || pages > URGENT_MAX_PAGES || !urgent.runs.iter().all(exists) {
        return Err(UrgentError::PeerRuns(pages));
    }
    let mut contents = vec![0; pages * PAGE_SIZE];
    let found = zstd::bulk::decompress_to_buffer(&urgent.data, contents.as_mut_slice());
    if found.ok() != Some(contents.len()) || digest(&urgent.runs, &contents, key) != urgent.digest {
        return Err(UrgentError::PeerContent);
    }
    let addresses = urgent.runs.iter().flat_map(|run| {
        (run.first.page..)
            .take(index(run.count.into()))
            .map(|page| PageAddress { page, ..run.first })
    });
    Ok((addresses.collect(), contents))
}

fn digest(runs: &[PageRun], pages: &[u8], key: &[u8; 32]) -> [u8; 16] {
    let hasher = PageHasher::new(key);
    let mut digest = DerivedKey::urgent(key).hasher();
    for run in runs {
        digest
            .update(&run.first.block.0.to_be_bytes())
            .update(&run.first.page.to_be_bytes())
            .update(&run.count.to_be_bytes());
    }
    for page in pages.as_chunks().0 {
        digest.update(&hasher.hash(page).0);
    }
    first_16(&digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockSpec};

    struct Numbered;
    impl Contents for Numbered {
        fn read(&self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
            into.fill(at.page.to_be_bytes()[3]);
            Ok(())
        }
    }

    fn taken(page: u32, zero: bool) -> Taken {
        let block = BlockId(0);
        Taken {
            at: PageAddress { block, page },
            zero,
        }
    }

    /// Pages come back as they were, in their order; any change is refused.
    #[test]
    fn there_and_back() {
        let pages = 9;
        let layout = Layout::new(vec![BlockSpec {
            name: "ram".into(),
            pages,
        }])
        .unwrap();
        let pages = [taken(7, false), taken(8, false), taken(3, true)];
        let urgent = pack_urgent(&pages, &Numbered, &[1; 32]).unwrap();
        assert_eq!(urgent.runs.len(), 2);
        let (addresses, contents) = unpack_urgent(&urgent, &layout, &[1; 32]).unwrap();
        assert_eq!(addresses, pages.map(|page| page.at));
        assert_eq!(
            contents,
            [[7; PAGE_SIZE], [8; PAGE_SIZE], [0; PAGE_SIZE]].concat()
        );

        let refused = |change: &dyn Fn(&mut Urgent), expected| {
            let mut changed = urgent.clone();
            change(&mut changed);
            assert_eq!(unpack_urgent(&changed, &layout, &[1; 32]), Err(expected));
        };
        refused(&|urgent| urgent.digest[0] ^= 1, UrgentError::PeerContent);
        refused(
            &|urgent| urgent.data = Bytes::new(),
            UrgentError::PeerContent,
        );
        refused(
            &|urgent| urgent.runs[1].first.page = 4,
            UrgentError::PeerContent,
        );
        refused(
            &|urgent| urgent.runs[1].first.page = 9,
            UrgentError::PeerRuns(3),
        );
        refused(&|urgent| urgent.runs[1].count = 0, UrgentError::PeerRuns(2));
        refused(&|urgent| urgent.runs.clear(), UrgentError::PeerRuns(0));
        refused(
            &|urgent| urgent.runs[0].count = 65,
            UrgentError::PeerRuns(66),
        );
    }
}
