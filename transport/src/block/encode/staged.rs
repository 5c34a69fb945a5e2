//! The pages of the batch in progress: private copies, and what each one will be.

use std::io;

use crate::block::batch::Encoding;
use crate::block::copy::{self, InBatch};
use crate::block::hash::HASH_GROUP;
use crate::block::{PAGE_SIZE, PageAddress, PageHash, Replica, Taken, length_u32};
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};

/// The batch in progress.
#[derive(Debug)]
pub(super) struct Staged {
    /// Its pages, ascending.
    pub(super) entries: Vec<Entry>,
    /// Private copies of the pages with content, one after the other.
    pub(super) slots: Box<[u8]>,
    pub(super) slots_used: usize,
    /// Slot where the group of pages in progress was read.
    pub(super) group_first: usize,
    in_batch: InBatch,
    /// Last versions of the delta pages.
    pub(super) bases: Vec<u8>,
}

/// A page of the batch in progress.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) at: PageAddress,
    pub(super) hash: PageHash,
    pub(super) form: Form,
    /// Where its copy is; of no meaning for a zero page.
    pub(super) slot: usize,
}

/// What a page will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Zero,
    Copy(PageAddress),
    Known(u32),
    Delta,
    Literal,
    Raw,
}

impl Form {
    pub(super) fn encoding(self) -> Encoding {
        match self {
            Self::Zero => Encoding::Zero,
            Self::Copy(_) => Encoding::Copy,
            Self::Known(_) => Encoding::Known,
            Self::Delta => Encoding::Delta,
            Self::Literal => Encoding::Literal,
            Self::Raw => Encoding::Raw,
        }
    }
}

impl Staged {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::with_capacity(BATCH_MAX_RECORDS),
            slots: vec![0; BATCH_MAX_PAGES * PAGE_SIZE].into(),
            slots_used: 0,
            group_first: 0,
            in_batch: InBatch::new(),
            bases: Vec::new(),
        }
    }

    pub(super) fn begin(&mut self) {
        self.entries.clear();
        self.slots_used = 0;
        self.in_batch.clear();
        self.bases.clear();
    }

    /// How many of the next pages can be read at once: as many as there are slots and entries left,
    /// ascending.
    pub(super) fn group(&self, taken: &[Taken]) -> usize {
        let room = (BATCH_MAX_PAGES - self.slots_used)
            .min(BATCH_MAX_RECORDS - self.entries.len())
            .min(HASH_GROUP);
        let next = &taken[..room.min(taken.len())];
        let ascending = next.windows(2).take_while(|two| two[0].at < two[1].at);
        ascending.count() + 1
    }

    /// The page in slot `from` stays: it moves down over the ones that do not.
    pub(super) fn take_slot(&mut self, from: usize) {
        if from != self.slots_used {
            let bytes = from * PAGE_SIZE..(from + 1) * PAGE_SIZE;
            self.slots.copy_within(bytes, self.slots_used * PAGE_SIZE);
        }
        self.slots_used += 1;
    }

    /// Whether this page needs another batch.
    pub(super) fn is_full_before(&self, at: PageAddress) -> bool {
        self.slots_used == BATCH_MAX_PAGES
            || self.entries.len() == BATCH_MAX_RECORDS
            || self.entries.last().is_some_and(|last| at <= last.at)
    }

    /// Notes a slot's hash and finds an earlier page with the same bytes.
    pub(super) fn equal_before(&mut self, hash: PageHash, slot: usize) -> Option<PageAddress> {
        let earlier = self.in_batch.replace(hash, slot)?;
        if !copy::is_equal(&self.slots, earlier, slot) {
            return None;
        }
        // Slots and entries ascend together, but only pages with content have a slot.
        let is_of_slot = |entry: &&Entry| entry.slot == earlier && entry.form != Form::Zero;
        Some(self.entries.iter().find(is_of_slot)?.at)
    }

    /// Gives all pages of one form another one.
    pub(super) fn turn(&mut self, from: Form, into: Form) {
        let entries = self.entries.iter_mut();
        entries
            .filter(|entry| entry.form == from)
            .for_each(|entry| entry.form = into);
    }

    /// Writes all pages into the replica, neighbours in one go.
    pub(super) fn keep(&self, replica: &dyn Replica) -> io::Result<()> {
        let is_zero = |entry: &Entry| entry.form == Form::Zero;
        let runs = self.entries.chunk_by(|one, next| {
            one.at.block == next.at.block
                && one.at.page.checked_add(1) == Some(next.at.page)
                && is_zero(one) == is_zero(next)
        });
        for run in runs {
            let Some(first) = run.first() else { continue };
            if is_zero(first) {
                replica.zero(first.at, length_u32(run.len()))?;
            } else {
                let contents = &self.slots[first.slot * PAGE_SIZE..][..run.len() * PAGE_SIZE];
                replica.write(first.at, contents)?;
            }
        }
        Ok(())
    }
}

/// The pages of one form one after the other: in the slots where they are neighbours there, else
/// brought together.
pub(super) fn gather<'a>(batch: &'a Staged, form: Form, gathered: &'a mut Vec<u8>) -> &'a [u8] {
    let slots = || {
        let entries = batch.entries.iter();
        entries
            .filter(|entry| entry.form == form)
            .map(|entry| entry.slot)
    };
    let pages = slots().count();
    let (Some(first), Some(last)) = (slots().next(), slots().next_back()) else {
        return &[];
    };
    if last - first + 1 == pages {
        return &batch.slots[first * PAGE_SIZE..(last + 1) * PAGE_SIZE];
    }
    gathered.clear();
    for slot in slots() {
        gathered.extend_from_slice(slot_ref(&batch.slots, slot));
    }
    gathered
}

/// One page's copy.
pub(super) fn slot_mut(slots: &mut [u8], slot: usize) -> &mut [u8; PAGE_SIZE] {
    slots[slot * PAGE_SIZE..]
        .first_chunk_mut()
        .expect("slots are whole pages")
}

/// One page's copy, to be read.
pub(super) fn slot_ref(slots: &[u8], slot: usize) -> &[u8; PAGE_SIZE] {
    slots[slot * PAGE_SIZE..]
        .first_chunk()
        .expect("slots are whole pages")
}
