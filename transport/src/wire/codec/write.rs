//! Frames to bytes.

use bytes::{BufMut, BytesMut};

use super::kind;
use super::names::Coded;
use crate::block::{BlockSpec, length_u16, length_u32};
use crate::wire::limits::{BLOCKS_MAX, FRAME_MAX_BYTES, HEAD_MAX_BYTES, TEXT_MAX_BYTES};
use crate::wire::{Frame, Hello, WireError};

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
            Self::Ready { verify, qemu } => {
                out.put_u8(verify.code());
                put_text("qemu", qemu, out)?;
            }
            Self::Layout { head, blocks } => return put_layout(head, blocks, out),
            Self::Relay | Self::LayoutTaken | Self::Stopped | Self::Running => {}
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
            } => {
                out.put_slice(&root.0);
                out.put_u32(*barrier);
                out.put_u64(*tail_bytes);
            }
            Self::Loaded { root } => out.put_slice(&root.0),
            Self::Commit {
                attempt,
                target_incarnation,
                root,
                run_state,
            } => {
                out.put_slice(&attempt.0);
                out.put_u64(*target_incarnation);
                out.put_slice(&root.0);
                out.put_u8(run_state.code());
            }
            Self::Answer {
                attempt,
                verdict,
                epoch,
            }
            | Self::Ask {
                attempt,
                verdict,
                epoch,
            } => {
                out.put_slice(&attempt.0);
                out.put_u8(verdict.code());
                out.put_u64(*epoch);
            }
            Self::Settled { attempt } => out.put_slice(&attempt.0),
            Self::Abort { code, detail } => {
                out.put_u8(code.code());
                put_text("detail", detail, out)?;
            }
        }
        Ok(())
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::Ready { .. } => kind::READY,
            Self::Layout { .. } => kind::LAYOUT,
            Self::LayoutTaken => kind::LAYOUT_TAKEN,
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
        }
    }
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

fn bounded(field: &'static str, bytes: usize, bytes_max: usize) -> Result<(), WireError> {
    if bytes > bytes_max {
        return Err(WireError::LocalTooLong {
            field,
            bytes,
            bytes_max,
        });
    }
    Ok(())
}
