//! Decoded pages of one batch on their way to target QEMU: into its stream, or past it into shared
//! memory, and into the replica.

use qemu_glue::stream::PAGE_SIZE;
use transport::block::{PageAddress, Replica};

use crate::mapped::TargetMemory;

/// Pages of one batch, decoded.
#[derive(Debug, Clone, Default)]
pub(super) struct Batch {
    pub(super) zeros: Vec<(PageAddress, u32)>,
    pub(super) pages: Vec<PageAddress>,
    pub(super) contents: Vec<u8>,
}

impl Batch {
    pub(super) fn write_into(&self, replica: &dyn Replica) -> std::io::Result<()> {
        for (first, count) in &self.zeros {
            replica.zero(*first, *count)?;
        }
        self.runs()
            .try_for_each(|(first, contents)| replica.write(first, contents))
    }

    /// Writes what belongs into shared memory there and returns the rest, for QEMU's stream.
    pub(super) fn write_shared(self, memory: &TargetMemory) -> std::io::Result<Batch> {
        let mut rest = Batch::default();
        for (first, count) in &self.zeros {
            if memory.is_shared(first.block) {
                memory.zero(*first, *count)?;
            } else {
                rest.zeros.push((*first, *count));
            }
        }
        for (first, contents) in self.runs() {
            if memory.is_shared(first.block) {
                memory.write(first, contents)?;
                continue;
            }
            for page in 0..contents.len() / PAGE_SIZE {
                let page = first.page + u32::try_from(page).unwrap_or(0);
                rest.pages.push(PageAddress { page, ..first });
            }
            rest.contents.extend_from_slice(contents);
        }
        Ok(rest)
    }

    /// Neighbours with their contents.
    fn runs(&self) -> impl Iterator<Item = (PageAddress, &[u8])> {
        let follows = |one: &PageAddress, next: &PageAddress| {
            one.block == next.block && one.page + 1 == next.page
        };
        let mut contents = &self.contents[..];
        self.pages.chunk_by(follows).map(move |run| {
            let (these, rest) = contents.split_at(run.len() * PAGE_SIZE);
            contents = rest;
            (run[0], these)
        })
    }
}
