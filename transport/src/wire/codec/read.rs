//! Bytes to frames. Every length is checked against what is there and against its limit.

use bytes::{Buf, Bytes};

use super::names::Coded;
use super::{kind, postcopy};
use crate::block::{BlockId, BlockSpec, PageAddress, PageRun, Root};
use crate::wire::limits::{
    BASIS_MAX_DIGESTS, BASIS_MAX_RANGES, BLOCKS_MAX, FRAME_MAX_BYTES, HEAD_MAX_BYTES,
    MISSING_MAX_RUNS, PROBE_MAX_RANGES, QUERY_MAX_PAGES, TEXT_MAX_BYTES,
};
use crate::wire::{AttemptId, Frame, Hello, Offer, WireError};

/// Reads the body of one frame to its last byte.
pub(super) fn frame(kind: u8, body: Bytes) -> Result<Frame, WireError> {
    let mut body = Body { kind, rest: body };
    let frame = match kind {
        kind::HELLO => Frame::Hello(hello(&mut body)?),
        kind::READY => Frame::Ready {
            verify: body.coded("verify")?,
            qemu: body.text("qemu")?,
            nonce: body.array("nonce")?,
        },
        kind::LAYOUT => layout(&mut body)?,
        kind::PROGRESS => {
            let mut applied_bytes = [0; crate::block::LANES];
            for bytes in &mut applied_bytes {
                *bytes = body.u64("applied_bytes")?;
            }
            Frame::Progress { applied_bytes }
        }
        kind::APPLIED => Frame::Applied {
            barrier: body.u32("barrier")?,
        },
        kind::TAIL => tail(&mut body)?,
        kind::FINAL => Frame::Final {
            root: Root(body.array("root")?),
            barrier: body.u32("barrier")?,
            tail_bytes: body.u64("tail_bytes")?,
            missing_taken: body.u32("missing_taken")?,
            absent_pages: body.u64("absent_pages")?,
        },
        kind::LOADED => Frame::Loaded {
            root: Root(body.array("root")?),
        },
        kind::COMMIT => Frame::Commit {
            attempt: AttemptId(body.array("attempt")?),
            target_incarnation: body.u64("target_incarnation")?,
            root: Root(body.array("root")?),
            run_state: body.coded("run_state")?,
        },
        kind::RUNNING => Frame::Running,
        kind::STOPPED => Frame::Stopped,
        kind::RELAY => Frame::Relay,
        kind::ANSWER => Frame::Answer {
            attempt: AttemptId(body.array("attempt")?),
            verdict: body.coded("verdict")?,
            epoch: body.u64("epoch")?,
        },
        kind::ASK => Frame::Ask {
            attempt: AttemptId(body.array("attempt")?),
            verdict: body.coded("verdict")?,
            epoch: body.u64("epoch")?,
        },
        kind::SETTLED => Frame::Settled {
            attempt: AttemptId(body.array("attempt")?),
        },
        kind::ABORT => Frame::Abort {
            code: body.coded("code")?,
            detail: body.text("detail")?,
        },
        _ => reference(kind, &mut body)?,
    };
    if body.rest.has_remaining() {
        return Err(WireError::PeerTrailing {
            frame: kind,
            bytes: body.rest.len(),
        });
    }
    Ok(frame)
}

/// What the two sides hold already.
fn reference(kind: u8, body: &mut Body) -> Result<Frame, WireError> {
    match kind {
        kind::BASIS => Ok(Frame::Basis {
            digests: body.list("digests", BASIS_MAX_DIGESTS)?,
        }),
        kind::LAYOUT_TAKEN => layout_taken(body),
        kind::PROBE => Ok(Frame::Probe {
            ranges: body
                .list::<20>("ranges", PROBE_MAX_RANGES)?
                .into_iter()
                .map(|entry| {
                    let (range, digest) = entry.split_first_chunk().expect("20 bytes hold four");
                    let digest = digest.first_chunk().expect("16 bytes are left");
                    (u32::from_be_bytes(*range), *digest)
                })
                .collect(),
        }),
        kind::QUERY => Ok(Frame::Query {
            first: body.u32("first")?,
            prefixes: body.list("questions", QUERY_MAX_PAGES)?,
        }),
        kind::KNOWN => known(body),
        kind::MISSING => Ok(Frame::Missing { runs: body.runs()? }),
        kind::ABSENT => postcopy::read_absent(body),
        kind::WANTED => Ok(Frame::Wanted { runs: body.runs()? }),
        kind::URGENT => postcopy::read_urgent(body),
        kind::ALL_PAGES => Ok(Frame::AllPages),
        _ => Err(WireError::UnknownFrame(kind)),
    }
}

fn hello(body: &mut Body) -> Result<Hello, WireError> {
    Ok(Hello {
        version: body.u16("version")?,
        features: body.u64("features")?,
        role: body.coded("role")?,
        purpose: body.coded("purpose")?,
        vm: body.text("vm")?,
        attempt: AttemptId(body.array("attempt")?),
        incarnation: body.u64("incarnation")?,
        secret_id: body.optional("secret_id")?,
        secret: body.optional("secret")?,
        software: body.text("software")?,
    })
}

fn layout(body: &mut Body) -> Result<Frame, WireError> {
    let head_bytes = crate::block::index(body.u32("head")?);
    at_most("head", head_bytes, HEAD_MAX_BYTES)?;
    let head = body.bytes("head", head_bytes)?;
    let count = usize::from(body.u16("blocks")?);
    at_most("blocks", count, BLOCKS_MAX)?;
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        let name_bytes = usize::from(body.u8("block name")?);
        let name = body.utf8("block name", name_bytes)?;
        blocks.push(BlockSpec {
            name,
            pages: body.u32("block pages")?,
        });
    }
    Ok(Frame::Layout {
        head,
        blocks,
        basis_ranges: body.u32("basis_ranges")?,
        post_copy: body.flag("post_copy")?,
    })
}

fn layout_taken(body: &mut Body) -> Result<Frame, WireError> {
    let offer = Offer {
        readable: body.flag("readable")?,
        known_pages: body.u32("known_pages")?,
        post_copy: body.flag("post_copy")?,
    };
    let bytes = body.rest.len();
    at_most("basis", bytes, crate::block::index(BASIS_MAX_RANGES / 8))?;
    Ok(Frame::LayoutTaken {
        offer,
        basis: body.bytes("basis", bytes)?,
    })
}

fn known(body: &mut Body) -> Result<Frame, WireError> {
    let first = body.u32("first")?;
    let count = usize::from(body.u16("answers")?);
    at_most("answers", count, QUERY_MAX_PAGES)?;
    let bits = body.bytes("answers", count.div_ceil(8))?;
    let mut numbers = Vec::with_capacity(count);
    for place in 0..count {
        let is_held = bits[place / 8] & (1 << (place % 8)) != 0;
        numbers.push(if is_held {
            Some(body.u32("number")?)
        } else {
            None
        });
    }
    Ok(Frame::Known { first, numbers })
}

fn tail(body: &mut Body) -> Result<Frame, WireError> {
    let raw_len = body.u32("raw_len")?;
    at_most("raw_len", crate::block::index(raw_len), FRAME_MAX_BYTES)?;
    let data = body.rest.split_to(body.rest.len());
    Ok(Frame::Tail { data, raw_len })
}

pub(super) fn run([b0, b1, p0, p1, p2, p3, c0, c1]: [u8; 8]) -> PageRun {
    PageRun {
        first: PageAddress {
            block: BlockId(u16::from_be_bytes([b0, b1])),
            page: u32::from_be_bytes([p0, p1, p2, p3]),
        },
        count: u16::from_be_bytes([c0, c1]),
    }
}

/// The unread part of a frame.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) kind: u8,
    pub(super) rest: Bytes,
}

impl Body {
    /// Runs to the end of the frame.
    fn runs(&mut self) -> Result<Vec<PageRun>, WireError> {
        let runs = self.list("runs", MISSING_MAX_RUNS)?;
        Ok(runs.into_iter().map(run).collect())
    }

    pub(super) fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::PeerValue {
                frame: self.kind,
                field,
            }),
        }
    }

    pub(super) fn bytes(&mut self, field: &'static str, bytes: usize) -> Result<Bytes, WireError> {
        if self.rest.len() < bytes {
            return Err(WireError::PeerTruncated {
                frame: self.kind,
                field,
            });
        }
        Ok(self.rest.split_to(bytes))
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], WireError> {
        let bytes = self.bytes(field, N)?;
        Ok(*bytes.first_chunk().expect("split to N bytes"))
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_be_bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// Entries of one size to the end of the frame.
    pub(super) fn list<const N: usize>(
        &mut self,
        field: &'static str,
        entries_max: usize,
    ) -> Result<Vec<[u8; N]>, WireError> {
        at_most(field, self.rest.len() / N, entries_max)?;
        let (entries, left) = self.rest.as_chunks::<N>();
        if !left.is_empty() {
            return Err(WireError::PeerTruncated {
                frame: self.kind,
                field,
            });
        }
        let entries = entries.to_vec();
        self.rest.clear();
        Ok(entries)
    }

    fn coded<T: Coded>(&mut self, field: &'static str) -> Result<T, WireError> {
        let code = self.u8(field)?;
        T::from_code(code).ok_or(WireError::PeerValue {
            frame: self.kind,
            field,
        })
    }

    fn text(&mut self, field: &'static str) -> Result<String, WireError> {
        let bytes = usize::from(self.u16(field)?);
        at_most(field, bytes, TEXT_MAX_BYTES)?;
        self.utf8(field, bytes)
    }

    fn utf8(&mut self, field: &'static str, bytes: usize) -> Result<String, WireError> {
        let bytes = self.bytes(field, bytes)?;
        let text = std::str::from_utf8(&bytes);
        text.map(str::to_owned).map_err(|_| WireError::PeerValue {
            frame: self.kind,
            field,
        })
    }

    fn optional<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<Option<[u8; N]>, WireError> {
        match self.u8(field)? {
            0 => Ok(None),
            1 => self.array(field).map(Some),
            _ => Err(WireError::PeerValue {
                frame: self.kind,
                field,
            }),
        }
    }
}

pub(super) fn at_most(
    field: &'static str,
    bytes: usize,
    bytes_max: usize,
) -> Result<(), WireError> {
    if bytes > bytes_max {
        return Err(WireError::PeerTooLong {
            field,
            bytes,
            bytes_max,
        });
    }
    Ok(())
}
