//! Frames to bytes.

use bytes::{BufMut, BytesMut};

use super::names::Coded;
use super::{kind, postcopy};
use crate::block::{BlockSpec, PageRun, Root, index, length_u16, length_u32};
use crate::wire::limits::{
    BASIS_MAX_DIGESTS, BASIS_MAX_RANGES, BLOCKS_MAX, FRAME_MAX_BYTES, HEAD_MAX_BYTES,
    MISSING_MAX_RUNS, PROBE_MAX_RANGES, QUERY_MAX_PAGES, TEXT_MAX_BYTES,
};
use crate::wire::{AttemptId, Frame, Hello, Verdict, WireError};

impl Frame {
    /// Appends the frame's bytes.
    ///
    /// # Errors
    /// [`WireError::LocalTooLong`] when a field is above its limit; `out` is then unchanged.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), WireError> {
        let begin = out.len();
        out.put_u32(0);
        let body = self.put_body(out);
        let frame_bytes = out.len() - begin;
        let fits = body.and_then(|()| bounded("frame", frame_bytes, FRAME_MAX_BYTES));
        if let Err(error) = fits {
            out.truncate(begin);
            return Err(error);
        }
        let length = length_u32(frame_bytes - 4);
        out[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }

    fn put_body(&self, out: &mut BytesMut) -> Result<(), WireError> {
        out.put_u8(self.kind());
        match self {
            Self::Hello(hello) => return put_hello(hello, out),
            Self::Ready {
                verify,
                qemu,
                nonce,
            } => {
                out.put_u8(verify.code());
                put_text("qemu", qemu, out)?;
                out.put_slice(nonce);
            }
            Self::Layout {
                head,
                blocks,
                basis_ranges,
                post_copy,
            } => {
                put_layout(head, blocks, out)?;
                out.put_u32(*basis_ranges);
                out.put_u8(u8::from(*post_copy));
            }
            Self::Absent { .. } | Self::Wanted { .. } | Self::Urgent { .. } => {
                return postcopy::put(self, out);
            }
            Self::Relay | Self::Stopped | Self::Running | Self::AllPages => {}
            Self::Progress { applied_bytes } => {
                applied_bytes.iter().for_each(|bytes| out.put_u64(*bytes));
            }
            Self::Applied { barrier } => out.put_u32(*barrier),
            Self::Tail { data, raw_len } => {
                bounded("tail", data.len(), FRAME_MAX_BYTES)?;
                out.put_u32(*raw_len);
                out.put_slice(data);
            }
            Self::Final {
                root,
                barrier,
                tail_bytes,
                missing_taken,
                absent_pages,
            } => {
                put_final(root, (*barrier, *tail_bytes, *missing_taken), out);
                out.put_u64(*absent_pages);
            }
            Self::Loaded { root } => out.put_slice(&root.0),
            Self::Commit { .. } => self.put_commit(out),
            Self::Answer {
                attempt,
                verdict,
                epoch,
            }
            | Self::Ask {
                attempt,
                verdict,
                epoch,
            } => put_verdict(*attempt, *verdict, *epoch, out),
            Self::Settled { attempt } => out.put_slice(&attempt.0),
            Self::Abort { code, detail } => {
                out.put_u8(code.code());
                return put_text("detail", detail, out);
            }
            Self::Basis { .. }
            | Self::LayoutTaken { .. }
            | Self::Probe { .. }
            | Self::Query { .. }
            | Self::Known { .. }
            | Self::Missing { .. } => return self.put_reference(out),
        }
        Ok(())
    }

    fn put_commit(&self, out: &mut BytesMut) {
        if let Self::Commit {
            attempt,
            target_incarnation,
            root,
            run_state,
        } = self
        {
            out.put_slice(&attempt.0);
            out.put_u64(*target_incarnation);
            out.put_slice(&root.0);
            out.put_u8(run_state.code());
        }
    }

    /// What the two sides hold already.
    fn put_reference(&self, out: &mut BytesMut) -> Result<(), WireError> {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the caller gives these only"
        )]
        match self {
            Self::Basis { digests } => {
                bounded("digests", digests.len(), BASIS_MAX_DIGESTS)?;
                digests.iter().for_each(|digest| out.put_slice(digest));
            }
            Self::LayoutTaken { basis, offer } => {
                out.put_u8(u8::from(offer.readable));
                out.put_u32(offer.known_pages);
                out.put_u8(u8::from(offer.post_copy));
                bounded("basis", basis.len(), index(BASIS_MAX_RANGES / 8))?;
                out.put_slice(basis);
            }
            Self::Probe { ranges } => {
                bounded("ranges", ranges.len(), PROBE_MAX_RANGES)?;
                for (range, digest) in ranges {
                    out.put_u32(*range);
                    out.put_slice(digest);
                }
            }
            Self::Query { first, prefixes } => {
                bounded("questions", prefixes.len(), QUERY_MAX_PAGES)?;
                out.put_u32(*first);
                prefixes.iter().for_each(|prefix| out.put_slice(prefix));
            }
            Self::Known { first, numbers } => {
                bounded("answers", numbers.len(), QUERY_MAX_PAGES)?;
                put_known(*first, numbers, out);
            }
            Self::Missing { runs } => {
                bounded("runs", runs.len(), MISSING_MAX_RUNS)?;
                put_runs(runs, out);
            }
            _ => {}
        }
        Ok(())
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::Ready { .. } => kind::READY,
            Self::Layout { .. } => kind::LAYOUT,
            Self::Basis { .. } => kind::BASIS,
            Self::LayoutTaken { .. } => kind::LAYOUT_TAKEN,
            Self::Probe { .. } => kind::PROBE,
            Self::Query { .. } => kind::QUERY,
            Self::Known { .. } => kind::KNOWN,
            Self::Missing { .. } => kind::MISSING,
            Self::Progress { .. } => kind::PROGRESS,
            Self::Applied { .. } => kind::APPLIED,
            Self::Stopped => kind::STOPPED,
            Self::Relay => kind::RELAY,
            Self::Tail { .. } => kind::TAIL,
            Self::Final { .. } => kind::FINAL,
            Self::Loaded { .. } => kind::LOADED,
            Self::Commit { .. } => kind::COMMIT,
            Self::Running => kind::RUNNING,
            Self::Answer { .. } => kind::ANSWER,
            Self::Ask { .. } => kind::ASK,
            Self::Settled { .. } => kind::SETTLED,
            Self::Abort { .. } => kind::ABORT,
            Self::Absent { .. } => kind::ABSENT,
            Self::Wanted { .. } => kind::WANTED,
            Self::Urgent { .. } => kind::URGENT,
            Self::AllPages => kind::ALL_PAGES,
        }
    }
}

pub(super) fn put_runs(runs: &[PageRun], out: &mut BytesMut) {
    for run in runs {
        out.put_u16(run.first.block.0);
        out.put_u32(run.first.page);
        out.put_u16(run.count);
    }
}

fn put_final(root: &Root, rest: (u32, u64, u32), out: &mut BytesMut) {
    let (barrier, tail_bytes, missing_taken) = rest;
    out.put_slice(&root.0);
    out.put_u32(barrier);
    out.put_u64(tail_bytes);
    out.put_u32(missing_taken);
}

fn put_verdict(attempt: AttemptId, verdict: Verdict, epoch: u64, out: &mut BytesMut) {
    out.put_slice(&attempt.0);
    out.put_u8(verdict.code());
    out.put_u64(epoch);
}

fn put_hello(hello: &Hello, out: &mut BytesMut) -> Result<(), WireError> {
    out.put_u16(hello.version);
    out.put_u64(hello.features);
    out.put_u8(hello.role.code());
    out.put_u8(hello.purpose.code());
    put_text("vm", &hello.vm, out)?;
    out.put_slice(&hello.attempt.0);
    out.put_u64(hello.incarnation);
    put_optional(hello.secret_id.as_ref().map(<[u8; 16]>::as_slice), out);
    put_optional(hello.secret.as_ref().map(<[u8; 32]>::as_slice), out);
    put_text("software", &hello.software, out)
}

fn put_layout(head: &[u8], blocks: &[BlockSpec], out: &mut BytesMut) -> Result<(), WireError> {
    bounded("head", head.len(), HEAD_MAX_BYTES)?;
    bounded("blocks", blocks.len(), BLOCKS_MAX)?;
    out.put_u32(length_u32(head.len()));
    out.put_slice(head);
    out.put_u16(length_u16(blocks.len()));
    for block in blocks {
        let Ok(name_bytes) = u8::try_from(block.name.len()) else {
            return bounded("block name", block.name.len(), usize::from(u8::MAX));
        };
        out.put_u8(name_bytes);
        out.put_slice(block.name.as_bytes());
        out.put_u32(block.pages);
    }
    Ok(())
}

/// A bit for each question, least significant first, then the numbers of the ones that are set.
fn put_known(first: u32, numbers: &[Option<u32>], out: &mut BytesMut) {
    out.put_u32(first);
    out.put_u16(length_u16(numbers.len()));
    for eight in numbers.chunks(8) {
        let bits = eight.iter().enumerate().fold(0, |bits, (bit, number)| {
            bits | u8::from(number.is_some()) << bit
        });
        out.put_u8(bits);
    }
    numbers
        .iter()
        .flatten()
        .for_each(|number| out.put_u32(*number));
}

fn put_text(field: &'static str, text: &str, out: &mut BytesMut) -> Result<(), WireError> {
    bounded(field, text.len(), TEXT_MAX_BYTES)?;
    out.put_u16(length_u16(text.len()));
    out.put_slice(text.as_bytes());
    Ok(())
}

fn put_optional(bytes: Option<&[u8]>, out: &mut BytesMut) {
    out.put_u8(u8::from(bytes.is_some()));
    out.put_slice(bytes.unwrap_or_default());
}

pub(super) fn bounded(
    field: &'static str,
    bytes: usize,
    bytes_max: usize,
) -> Result<(), WireError> {
    if bytes > bytes_max {
        return Err(WireError::LocalTooLong {
            field,
            bytes,
            bytes_max,
        });
    }
    Ok(())
}
