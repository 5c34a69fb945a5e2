//! The staged pages as one batch on the lane: packed, digested, framed.

use std::io;

use bytes::BytesMut;

use super::LaneEncoder;
use super::staged::{Entry, Form, gather, slot_ref};
use crate::block::batch::{
    BatchDigest, Encoding, HEAD_BYTES, Head, PartBytes, RECORD_BYTES, Record,
};
use crate::block::batch::{count, measure};
use crate::block::{BatchStats, PAGE_SIZE, Sources, copy, known, length_u16, length_u32};
use crate::wire::{LANE_FRAME_HEAD_BYTES, put_batch};

impl LaneEncoder {
    /// Writes the batch in progress, if it has a page, and begins the next one.
    pub(super) fn finish(
        &mut self,
        sources: &Sources<'_>,
        out: &mut BytesMut,
        stats: &mut BatchStats,
    ) -> io::Result<()> {
        if self.batch.entries.is_empty() {
            // Pages that were the same may have left their copies' marks.
            self.batch.begin();
            return Ok(());
        }
        let seq = self.next_seq;
        let following = seq.checked_add(1);
        self.next_seq = following.ok_or_else(|| io::Error::other("lane has no numbers left"))?;

        let bases = &self.batch.bases;
        let pages = gather(&self.batch, Form::Delta, &mut self.gathered);
        let delta_frame = match pages.is_empty() {
            true => None,
            false => self.delta_packer.pack(bases, pages)?,
        };
        if delta_frame.is_none() {
            self.batch.turn(Form::Delta, Form::Literal);
        }
        let pages = gather(&self.batch, Form::Literal, &mut self.gathered);
        let literal_frame = match pages.is_empty() {
            true => None,
            false => self.packer.pack(pages)?,
        };
        if literal_frame.is_none() {
            self.batch.turn(Form::Literal, Form::Raw);
        }
        let delta_frame = delta_frame.unwrap_or_default();
        let literal_frame = literal_frame.unwrap_or_default();

        self.text.clear();
        put_runs(&self.batch.entries, &mut self.records, &mut self.text);
        let (record_text, _) = self.text.split_at(self.records.len() * RECORD_BYTES);
        let mut digest = BatchDigest::new(&self.digest_key, self.ledger.lane(), seq, record_text);
        for entry in &self.batch.entries {
            digest.page(entry.hash);
        }
        let head = Head {
            seq,
            records: length_u16(self.records.len()),
            literal_bytes: length_u32(literal_frame.len()),
            delta_bytes: length_u32(delta_frame.len()),
            digest: digest.finish(),
        };
        let raw_pages = count(&self.records, Encoding::Raw);
        let frame_bytes = delta_frame.len() + literal_frame.len();
        let body_bytes = HEAD_BYTES + self.text.len() + frame_bytes + raw_pages * PAGE_SIZE;
        put_batch(out, body_bytes, |out| {
            head.put(out);
            out.extend_from_slice(&self.text);
            out.extend_from_slice(delta_frame);
            out.extend_from_slice(literal_frame);
            for entry in &self.batch.entries {
                if entry.form == Form::Raw {
                    out.extend_from_slice(slot_ref(&self.batch.slots, entry.slot));
                }
            }
        });
        let bytes = PartBytes {
            delta: delta_frame.len(),
            literal: literal_frame.len(),
            frame: body_bytes + LANE_FRAME_HEAD_BYTES,
        };
        *stats += measure(&self.records, bytes);
        self.note(seq, sources);
        self.batch.begin();
        Ok(())
    }
}

/// Merges neighbours of one encoding whose references are neighbours too; writes the records, then
/// the references.
fn put_runs(entries: &[Entry], records: &mut Vec<Record>, text: &mut BytesMut) {
    records.clear();
    let mut references = BytesMut::new();
    let mut first_form = Form::Zero;
    for entry in entries {
        let encoding = entry.form.encoding();
        if let Some(run) = records.last_mut()
            && run.continues_with(encoding, entry.at)
            && continues(first_form, u32::from(run.count), entry.form)
        {
            run.count += 1;
            continue;
        }
        records.push(Record {
            encoding,
            first: entry.at,
            count: 1,
        });
        first_form = entry.form;
        match entry.form {
            Form::Copy(base) => copy::put(base, &mut references),
            Form::Known(number) => known::put(number, &mut references),
            Form::Zero | Form::Delta | Form::Literal | Form::Raw => {}
        }
    }
    records.iter().for_each(|record| record.put(text));
    text.extend_from_slice(&references);
}

/// Whether a form's reference follows the one of a run's first page by `count`.
fn continues(first: Form, count: u32, form: Form) -> bool {
    match (first, form) {
        (Form::Copy(base), Form::Copy(next)) => {
            base.block == next.block && base.page.checked_add(count) == Some(next.page)
        }
        (Form::Known(number), Form::Known(next)) => number.checked_add(count) == Some(next),
        _ => true,
    }
}
