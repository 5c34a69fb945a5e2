//! What a taken page becomes: it is copied and hashed once, then each stage has its say.

use std::io;

use super::LaneEncoder;
use super::staged::{Entry, Form, slot_mut, slot_ref};
use crate::block::hash::HASH_GROUP;
use crate::block::{PAGE_SIZE, PageAddress, PageHash, Sources, Taken, delta, raw, same, zero};

impl LaneEncoder {
    /// Copies a group of pages into the free slots and hashes them side by side; `None` for zeros.
    pub(super) fn read(
        &mut self,
        group: &[Taken],
        sources: &Sources<'_>,
    ) -> io::Result<[Option<PageHash>; HASH_GROUP]> {
        let mut hashes = [None; HASH_GROUP];
        let first = self.batch.slots_used * PAGE_SIZE;
        let (slots, _) = self.batch.slots[first..].as_chunks_mut::<PAGE_SIZE>();
        for (page, slot) in group.iter().zip(&mut *slots) {
            if !page.zero {
                sources.contents.read(page.at, slot)?;
            } else if self.disable.zero {
                slot.fill(0);
            }
        }
        let mut pages = [&[0; PAGE_SIZE]; HASH_GROUP];
        let mut places = [0; HASH_GROUP];
        let mut count = 0;
        for (nth, (page, slot)) in group.iter().zip(&*slots).enumerate() {
            if !page.zero && !zero::is_zero(slot) {
                (pages[count], places[count]) = (slot, nth);
                count += 1;
            }
        }
        let mut found = [self.hasher.zero(); HASH_GROUP];
        self.hasher.hash_group(&pages[..count], &mut found);
        for (nth, hash) in places[..count].iter().zip(found) {
            hashes[*nth] = Some(hash);
        }
        self.batch.group_first = self.batch.slots_used;
        Ok(hashes)
    }

    /// Decides what the `nth` page of a group becomes; `None` when the target has it.
    pub(super) fn stage(
        &mut self,
        page: Taken,
        nth: usize,
        hash: Option<PageHash>,
        sources: &Sources<'_>,
    ) -> Option<Entry> {
        let at = page.at;
        let is_zero = hash.is_none();
        let hash = hash.unwrap_or(self.hasher.zero());
        if !self.disable.same && same::is_same(&self.ledger, at, hash) {
            self.ledger.confirm(at);
            return None;
        }
        let slot = self.batch.slots_used;
        let form = if is_zero && !self.disable.zero {
            Form::Zero
        } else {
            self.batch.take_slot(self.batch.group_first + nth);
            self.form(at, hash, slot, sources)
        };
        Some(Entry {
            at,
            hash,
            form,
            slot,
        })
    }

    /// What a page with content becomes. One whose references missed goes without any.
    fn form(
        &mut self,
        at: PageAddress,
        hash: PageHash,
        slot: usize,
        sources: &Sources<'_>,
    ) -> Form {
        let may_refer = !self.ledger.is_forgotten(at);
        if may_refer && !self.disable.copy {
            let earlier = self.batch.equal_before(hash, slot);
            if let Some(base) = earlier.or_else(|| self.applied_copy(at, hash, sources)) {
                return Form::Copy(base);
            }
        }
        if may_refer
            && !self.disable.known
            && let Some(number) = sources.known.and_then(|known| known.get(&hash))
        {
            return Form::Known(number);
        }
        if may_refer && !self.disable.delta && self.is_near(at, slot, sources) {
            return Form::Delta;
        }
        let content = slot_mut(&mut self.batch.slots, slot);
        if self.disable.literal || (!self.disable.raw && raw::looks_random(content)) {
            Form::Raw
        } else {
            Form::Literal
        }
    }

    /// A page with this content that the target has applied. One that this batch replaces would be
    /// taken for its content in the batch.
    fn applied_copy(
        &self,
        at: PageAddress,
        hash: PageHash,
        sources: &Sources<'_>,
    ) -> Option<PageAddress> {
        let (base, _) = sources.copies?.find(hash)?;
        let entries = &self.batch.entries;
        let is_replaced = entries
            .binary_search_by_key(&base, |entry| entry.at)
            .is_ok();
        (base != at && !is_replaced).then_some(base)
    }

    /// Whether the page shall be a delta; its base is then the last one.
    fn is_near(&mut self, at: PageAddress, slot: usize, sources: &Sources<'_>) -> bool {
        let Some(replica) = sources.replica.filter(|_| self.replica_failure.is_none()) else {
            return false;
        };
        let before = self.batch.bases.len();
        self.batch.bases.resize(before + PAGE_SIZE, 0);
        let content = slot_ref(&self.batch.slots, slot);
        let base = slot_mut(&mut self.batch.bases, before / PAGE_SIZE);
        let is_near = match delta::is_near(at, content, &self.ledger, &self.hasher, replica, base) {
            Ok(is_near) => is_near,
            Err(error) => {
                self.replica_failure = Some(error);
                false
            }
        };
        if !is_near {
            self.batch.bases.truncate(before);
        }
        is_near
    }
}
