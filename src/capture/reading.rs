//! The thread that reads QEMU's socket: what comes is pages, the ends of passes, or device state; a
//! stream that is not understood is relayed as it is.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_glue::stream::{Command, EndWatch, Event, Limits, Parser, Phase, TailState, return_path};
use transport::block::{BlockId, PageAddress};
use transport::wire::limits::TAIL_MAX_BYTES;
use transport::wire::{Frame, tail};

use super::{CaptureError, Captured, Reader};
use crate::relay::Spool;

/// Bytes per read of the socket: about eight of QEMU's own writes.
const READ_BYTES: usize = 1 << 20;

/// Silence after a complete description that makes it the end of the stream.
const QUIET: Duration = Duration::from_millis(5);

/// Empty sections in a row that end a pass without a page.
const EMPTY_SECTIONS: u32 = 3;

impl Reader {
    pub(super) fn run(mut self) {
        let mut parser = Parser::new(Limits::default());
        let ended = match self.read_stream(&mut parser) {
            Err(CaptureError::Stream(error)) if error.may_relay() => match parser.take_prelude() {
                Some(prelude) => {
                    tracing::warn!(
                        "{error}: this migration is relayed byte for byte, without dedup, rounds or proof of memory"
                    );
                    self.relay(&prelude)
                }
                None => Err(error.into()),
            },
            other => other,
        };
        // Nothing may be read into a shadow that is not written; an error ends the attempt.
        if let Err(error) = ended {
            let told = self
                .events
                .blocking_send(Captured::Failed(error.to_string()));
            tracing::debug!(%error, session = told.is_ok(), "capture ended");
        }
    }

    fn read_stream(&mut self, parser: &mut Parser) -> Result<(), CaptureError> {
        let mut buffer = vec![0; READ_BYTES];
        let mut delivered = false;
        loop {
            let complete = parser.tail_state() == TailState::Complete;
            let wait = (complete && !delivered).then_some(QUIET);
            self.socket.set_read_timeout(wait)?;
            match self.socket.read(&mut buffer) {
                Ok(0) => return self.closed(parser, delivered),
                Ok(_) if delivered => {
                    return Err(CaptureError::Refused(
                        "QEMU's stream went on after its end".into(),
                    ));
                }
                Ok(count) => {
                    parser.push(&buffer[..count], &mut |event| self.event(event))?;
                    self.flush_run()?;
                    self.wake.notify_waiters();
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && complete => {
                    self.deliver_tail()?;
                    delivered = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Bytes as they come, until a whole description is followed by silence.
    fn relay(&mut self, prelude: &[u8]) -> Result<(), CaptureError> {
        let spool = Arc::new(Spool::create(&self.folder)?);
        *self
            .counters
            .spool
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(spool.clone());
        self.tell(Captured::Relay {
            spool: spool.clone(),
        })?;
        let mut watch = EndWatch::new();
        watch.push(prelude);
        spool.write(prelude)?;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let complete = watch.state() == TailState::Complete;
            self.socket.set_read_timeout(complete.then_some(QUIET))?;
            match self.socket.read(&mut buffer) {
                Ok(0) => {
                    let text = "QEMU closed its stream before the handover";
                    return Err(CaptureError::Refused(text.into()));
                }
                Ok(count) => {
                    watch.push(&buffer[..count]);
                    spool.write(&buffer[..count])?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && complete => {
                    spool.end();
                    return Ok(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// QEMU closes its socket only after SHUT(0), or when its migration failed.
    fn closed(&self, parser: &Parser, delivered: bool) -> Result<(), CaptureError> {
        if delivered {
            return Ok(());
        }
        parser.finish()?;
        Err(CaptureError::Refused(
            "QEMU closed its stream before the handover".into(),
        ))
    }

    fn event(&mut self, event: Event<'_>) -> Result<(), CaptureError> {
        match event {
            Event::Head(bytes) => self.head = Bytes::copy_from_slice(bytes),
            Event::Command(Command::Ping(value)) => self.pong(value)?,
            Event::Command(Command::OpenReturnPath | Command::SwitchoverStart) => {}
            Event::GuestStopped => self.is_stopped = true,
            // Set-up is over, no unknown section can come before the first page any more.
            Event::RamBegin(_) => self.tell_head()?,
            Event::Command(Command::PostcopyAdviseBitmaps) => {}
            Event::Blocks { blocks, .. } => self.blocks(blocks)?,
            Event::Page {
                block,
                page,
                content,
            } => self.page(address(block, page), content)?,
            Event::Zero { block, page } => self.zero(address(block, page))?,
            Event::Xbzrle {
                block,
                page,
                encoded,
            } => {
                self.xbzrle(address(block, page), encoded)?;
            }
            Event::MultifdFlush => {
                return Err(CaptureError::Refused(
                    "QEMU sends pages over other sockets (multifd)".into(),
                ));
            }
            Event::RamEnd { phase, pages } => self.ram_end(phase, pages)?,
            // Dirty bitmaps of disks travel with the device state, in their order.
            Event::Section { bytes, .. } | Event::Tail(bytes) => self.keep_tail(bytes)?,
        }
        Ok(())
    }

    fn pong(&self, value: u32) -> Result<(), CaptureError> {
        let mut bytes = Vec::new();
        return_path::Message::Pong(value).encode(&mut bytes);
        Ok((&self.socket).write_all(&bytes)?)
    }

    fn tell_head(&mut self) -> Result<(), CaptureError> {
        if self.head_told {
            return Ok(());
        }
        self.head_told = true;
        let image = self.image()?.clone();
        self.tell(Captured::Head {
            head: self.head.clone(),
            image,
        })
    }

    fn ram_end(&mut self, phase: Phase, pages: u64) -> Result<(), CaptureError> {
        self.flush_run()?;
        match phase {
            Phase::Setup => Ok(()),
            Phase::Complete => self.tell(Captured::RamEnd),
            Phase::Iterate => self.pass_part(pages),
        }
    }

    fn pass_part(&mut self, pages: u64) -> Result<(), CaptureError> {
        if self.counters.is_armed.load(Ordering::Acquire) {
            (self.pass_pages, self.empty_sections) = (0, 0);
            return Ok(());
        }
        if pages > 0 {
            self.pass_pages += pages;
            self.empty_sections = 0;
            return Ok(());
        }
        self.empty_sections += 1;
        if self.pass_pages > 0 || self.empty_sections == EMPTY_SECTIONS {
            self.empty_sections = 0;
            let pages = std::mem::take(&mut self.pass_pages);
            let era = self.counters.era.load(Ordering::Acquire);
            return self.tell(Captured::PassDrained { pages, era });
        }
        Ok(())
    }

    fn keep_tail(&mut self, bytes: &[u8]) -> Result<(), CaptureError> {
        self.tail.extend_from_slice(bytes);
        if self.tail.len() as u64 > TAIL_MAX_BYTES {
            return Err(CaptureError::Refused(format!(
                "device state is larger than {} MiB",
                TAIL_MAX_BYTES >> 20
            )));
        }
        Ok(())
    }

    fn deliver_tail(&mut self) -> Result<(), CaptureError> {
        let total_bytes = self.tail.len() as u64;
        let pieces = compress(&self.tail)?;
        self.tell(Captured::Tail {
            pieces,
            total_bytes,
        })
    }

    fn tell(&self, event: Captured) -> Result<(), CaptureError> {
        self.events
            .blocking_send(event)
            .map_err(|_| CaptureError::SessionGone)
    }
}

/// Device state in pieces for the control stream.
fn compress(tail: &[u8]) -> Result<Vec<(Bytes, u32)>, CaptureError> {
    let mut pieces = Vec::new();
    for piece in tail.chunks(tail::TAIL_PIECE_MAX_BYTES) {
        match tail::pack(piece) {
            Ok(Frame::Tail { data, raw_len }) => pieces.push((data, raw_len)),
            Ok(other) => return Err(CaptureError::Refused(format!("packed as {}", other.name()))),
            Err(error) => return Err(CaptureError::Refused(error.to_string())),
        }
    }
    Ok(pieces)
}

fn address(block: u16, page: u32) -> PageAddress {
    PageAddress {
        block: BlockId(block),
        page,
    }
}
