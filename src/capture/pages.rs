//! What the stream says of pages: content into the shadow first, then the dirty flag (S7), whatever
//! form QEMU gave it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use qemu_glue::stream::{PAGE_SIZE, RamBlock, xbzrle};
use transport::block::{BlockSpec, Contents, DirtySet, Heat, Layout, PageAddress};
use transport::wire::limits::HEAD_MAX_BYTES;

use super::{CaptureError, Image, Reader};
use crate::mapped::SourceMemory;

/// Contiguous pages that are stored with one write.
pub(super) const RUN_MAX_BYTES: usize = 64 * PAGE_SIZE;

impl Reader {
    /// Makes room for every page before the first one is read.
    pub(super) fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), CaptureError> {
        if self.head.len() > HEAD_MAX_BYTES {
            return Err(CaptureError::Refused(
                "the stream's head is over its limit".into(),
            ));
        }
        let specs = blocks
            .iter()
            .map(|block| BlockSpec {
                name: block.name.clone(),
                pages: block.pages,
            })
            .collect();
        let layout = Layout::new(specs)
            .map_err(|error| CaptureError::Refused(format!("this guest's memory: {error}")))?;
        let shared = self.shared.take();
        let memory = SourceMemory::create(&self.folder, &layout, shared).map_err(|error| {
            let mib = layout.pages_total() / 256;
            let folder = self.folder.display();
            CaptureError::Refused(format!(
                "cannot reserve {mib} MiB in {folder} for pages that wait for the link: {error}; \
                 free some space, or give --state-dir on a larger disk"
            ))
        })?;
        let layout = Arc::new(layout);
        let image = Image {
            dirty: Arc::new(DirtySet::new(layout.clone())),
            heat: Arc::new(Heat::new(layout.clone())),
            memory: Arc::new(memory),
            layout,
        };
        self.zeroed = Zeroed::of(&image.layout);
        self.image = Some(image);
        Ok(())
    }

    pub(super) fn page(
        &mut self,
        at: PageAddress,
        content: &[u8; PAGE_SIZE],
    ) -> Result<(), CaptureError> {
        if self.image()?.memory.is_shared(at.block) {
            return self.shared_page(at, content);
        }
        let continues = self.run_first.is_some_and(|first| {
            let pages = self.run.len() / PAGE_SIZE;
            first.block == at.block && u64::from(first.page) + pages as u64 == u64::from(at.page)
        });
        if !continues || self.run.len() >= RUN_MAX_BYTES {
            self.flush_run()?;
            self.run_first = Some(at);
        }
        self.run.extend_from_slice(content);
        self.zeroed.set(at, false);
        self.announced()
    }

    /// The stream only says that the page is dirty; its content is read when it is sent (S7).
    fn shared_page(
        &mut self,
        at: PageAddress,
        content: &[u8; PAGE_SIZE],
    ) -> Result<(), CaptureError> {
        self.flush_run()?;
        let image = self.image()?;
        if self.is_stopped {
            // Nothing writes any more: if these differ, it is not the guest's memory (S9).
            let mut found = [0; PAGE_SIZE];
            image.memory.read(at, &mut found)?;
            if found != *content {
                return Err(CaptureError::Refused(format!(
                    "shared memory differs from QEMU's stream at {at:?}: use --mapped off"
                )));
            }
        }
        image.dirty.mark_data(at);
        image.heat.note(at);
        self.announced()
    }

    pub(super) fn zero(&mut self, at: PageAddress) -> Result<(), CaptureError> {
        self.flush_run()?;
        let image = self.image()?;
        image.dirty.mark_zero(at);
        image.heat.note(at);
        self.zeroed.set(at, true);
        self.announced()
    }

    /// A change against the version that QEMU sent last, which is what the shadow holds (S8).
    pub(super) fn xbzrle(&mut self, at: PageAddress, encoded: &[u8]) -> Result<(), CaptureError> {
        self.flush_run()?;
        let mut content = [0; PAGE_SIZE];
        let image = self.image()?;
        // The shadow keeps no zero pages.
        if image.memory.is_shared(at.block) {
            let text = "QEMU sends xbzrle changes, which exclude reading its memory (S8)";
            return Err(CaptureError::Refused(text.into()));
        }
        if !self.zeroed.get(at) {
            image.memory.read(at, &mut content)?;
        }
        xbzrle::apply(&mut content, encoded)
            .map_err(|error| CaptureError::Refused(format!("xbzrle: {error}")))?;
        self.page(at, &content)
    }

    /// Content first, flags second: whoever takes a flag finds the content.
    pub(super) fn flush_run(&mut self) -> Result<(), CaptureError> {
        let Some(first) = self.run_first.take() else {
            return Ok(());
        };
        let image = self.image.as_ref().ok_or(CaptureError::SessionGone)?;
        image.memory.write(first, &self.run)?;
        let pages = u32::try_from(self.run.len() / PAGE_SIZE).unwrap_or(0);
        for page in first.page..first.page + pages {
            let at = PageAddress { page, ..first };
            image.dirty.mark_data(at);
            image.heat.note(at);
        }
        self.run.clear();
        Ok(())
    }

    fn announced(&mut self) -> Result<(), CaptureError> {
        self.counters
            .announced_pages
            .fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn image(&self) -> Result<&Image, CaptureError> {
        self.image.as_ref().ok_or(CaptureError::SessionGone)
    }
}

/// One bit per page.
#[derive(Debug, Default)]
pub(super) struct Zeroed(Vec<Vec<u64>>);

impl Zeroed {
    fn of(layout: &Layout) -> Zeroed {
        let words = |pages: u32| vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(0)];
        Zeroed(
            layout
                .blocks()
                .iter()
                .map(|block| words(block.pages))
                .collect(),
        )
    }

    fn set(&mut self, at: PageAddress, zero: bool) {
        let word = self.0.get_mut(usize::from(at.block.0));
        if let Some(word) = word.and_then(|words| words.get_mut(at.page as usize / 64)) {
            let bit = 1 << (at.page % 64);
            *word = if zero { *word | bit } else { *word & !bit };
        }
    }

    fn get(&self, at: PageAddress) -> bool {
        let word = self.0.get(usize::from(at.block.0));
        word.and_then(|words| words.get(at.page as usize / 64))
            .is_some_and(|word| word & (1 << (at.page % 64)) != 0)
    }
}
