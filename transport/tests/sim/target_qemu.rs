//! Target QEMU: memory that is filled, a load that may fail, a `cont` that may be refused.

use std::io;
use std::sync::Arc;

use transport::block::{Layout, PAGE_SIZE, PageAddress, Sink};

use crate::content;

/// References that resolve for each one that does not.
const READS_PER_MISS: u32 = 3;

/// What `cont` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cont {
    Runs,
    Refused,
    Dies,
}

/// Target QEMU, started with `-incoming defer` and stopped.
#[derive(Debug)]
pub(crate) struct TargetQemu {
    pub(crate) is_alive: bool,
    pub(crate) is_running: bool,
    pub(crate) is_loaded: bool,
    pub(crate) has_run: bool,
    pub(crate) cont: Cont,
    layout: Arc<Layout>,
    reads: u32,
    pub(crate) misses: u32,
    /// Content of each page; `None` is zero.
    pages: Vec<Option<Box<[u8; PAGE_SIZE]>>>,
}

impl TargetQemu {
    pub(crate) fn new(layout: Arc<Layout>, cont: Cont) -> TargetQemu {
        let pages = usize::try_from(layout.pages_total()).expect("a small guest");
        TargetQemu {
            is_alive: true,
            is_running: false,
            is_loaded: false,
            has_run: false,
            cont,
            layout,
            reads: 0,
            misses: 0,
            pages: vec![None; pages],
        }
    }

    pub(crate) fn page_at(&self, page: usize, into: &mut [u8; PAGE_SIZE]) {
        match &self.pages[page] {
            Some(content) => into.copy_from_slice(&content[..]),
            None => into.fill(0),
        }
    }

    /// Something is wrong with one page of memory.
    pub(crate) fn flip_bit(&mut self) {
        let mut page = [0; PAGE_SIZE];
        self.page_at(3, &mut page);
        page[77] ^= 4;
        self.pages[3] = Some(Box::new(page));
    }

    /// `cont`. An error says whether QEMU is proven not to have run the guest.
    pub(crate) fn cont(&mut self) -> Result<(), bool> {
        if !self.is_alive {
            return Err(false);
        }
        match self.cont {
            Cont::Runs => {
                self.is_running = true;
                self.has_run = true;
                Ok(())
            }
            Cont::Refused => Err(true),
            Cont::Dies => {
                self.quit();
                Err(false)
            }
        }
    }

    pub(crate) fn quit(&mut self) {
        self.is_alive = false;
        self.is_running = false;
    }
}

impl Sink for TargetQemu {
    fn zero(&mut self, first: PageAddress, count: u32) -> io::Result<()> {
        for page in first.page..first.page + count {
            let at = PageAddress { page, ..first };
            self.pages[content::number(&self.layout, at)] = None;
        }
        Ok(())
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        assert!(
            !self.is_loaded,
            "a page is applied after the device state was fed"
        );
        self.pages[content::number(&self.layout, at)] = Some(Box::new(*content));
        Ok(())
    }

    /// Now and then the page is not to be had, as if another version had overtaken it.
    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.reads += 1;
        if self.reads.is_multiple_of(READS_PER_MISS) {
            self.misses += 1;
            return Err(io::ErrorKind::NotFound.into());
        }
        self.page_at(content::number(&self.layout, at), into);
        Ok(())
    }
}
