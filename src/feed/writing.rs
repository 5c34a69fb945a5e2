//! The thread that writes target QEMU's stream: batches, barriers and the device state in the order
//! in which they are queued; in post-copy only what is still lacking.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use qemu_glue::stream::{Command, Phase, WriteError, Writer, devices_of};
use transport::block::{LANES, PageAddress};
use transport::wire::tail;

use super::batch::Batch;
use super::fed::PACKAGE_PING;
use super::{Feed, Filling};
use crate::waiting::now;

/// Why feeding ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum FeedError {
    #[error("target QEMU's stream: {0}")]
    Write(#[from] WriteError),
    #[error("target QEMU closed its stream: {0}")]
    Io(#[from] std::io::Error),
}

pub(super) struct FeedThread {
    socket: UnixStream,
    writer: Writer,
    applied: Arc<[AtomicU64; LANES]>,
    /// The latest barrier of each lane, and the latest that all have reached.
    marks: [u32; LANES],
    reached: u32,
    /// Post-copy: the guest may run.
    filling: Option<Filling>,
    has_ended: bool,
}

impl FeedThread {
    pub(super) fn new(
        socket: UnixStream,
        writer: Writer,
        applied: Arc<[AtomicU64; LANES]>,
        filling: Option<Filling>,
        has_ended: bool,
    ) -> FeedThread {
        FeedThread {
            socket,
            writer,
            applied,
            marks: [0; LANES],
            reached: 0,
            filling,
            has_ended,
        }
    }

    pub(super) fn run(mut self, waiting: &Receiver<Feed>) -> Result<(), FeedError> {
        while let Ok(feed) = waiting.recv() {
            match feed {
                Feed::Batch {
                    lane,
                    batch,
                    wire_bytes,
                } => {
                    match self.filling.clone() {
                        Some(filling) => self.fill(&filling, &batch)?,
                        None => self.batch(&batch)?,
                    }
                    self.applied[lane].fetch_add(wire_bytes, Ordering::Relaxed);
                }
                Feed::Mark { lane, barrier } => self.mark(lane, barrier)?,
                Feed::Tail(pieces) => self.tail(&pieces)?,
                Feed::Package { pieces, filling } => self.package(&pieces, filling)?,
                Feed::Never(at) => self.never(at)?,
                Feed::Raw(bytes) => self.socket.write_all(&bytes)?,
            }
        }
        Ok(())
    }

    fn batch(&mut self, batch: &Batch) -> Result<(), FeedError> {
        self.writer.ram_begin(Phase::Iterate)?;
        for (first, count) in &batch.zeros {
            for page in first.page..first.page + count {
                self.writer.zero(first.block.0, page)?;
            }
        }
        for (at, content) in batch.pages.iter().zip(batch.contents.as_chunks().0) {
            self.writer.page(at.block.0, at.page, content)?;
        }
        self.writer.ram_end()?;
        self.write_out()
    }

    /// Feeds what is lacking of a batch; the last page ends the stream.
    fn fill(&mut self, filling: &Filling, batch: &Batch) -> Result<(), FeedError> {
        if self.has_ended {
            return Ok(());
        }
        let mut waited = Vec::new();
        let mut arrives = |at| match filling.absent.arrive(at) {
            None => false,
            Some(was_asked) => {
                waited.extend(was_asked.then_some(at));
                true
            }
        };
        self.writer.ram_begin(Phase::Iterate)?;
        for (first, count) in &batch.zeros {
            for page in first.page..first.page + count {
                if arrives(PageAddress { page, ..*first }) {
                    self.writer.zero(first.block.0, page)?;
                }
            }
        }
        for (at, content) in batch.pages.iter().zip(batch.contents.as_chunks().0) {
            if arrives(*at) {
                self.writer.page(at.block.0, at.page, content)?;
            }
        }
        self.writer.ram_end()?;
        self.write_out()?;
        for at in waited {
            filling.faults.end(at, now());
        }
        self.end_filled(filling)
    }

    fn end_filled(&mut self, filling: &Filling) -> Result<(), FeedError> {
        if filling.absent.left() == 0 {
            self.has_ended = true;
            self.writer.postcopy_end()?;
            self.write_out()?;
        }
        Ok(())
    }

    fn never(&mut self, at: PageAddress) -> Result<(), FeedError> {
        if self.has_ended {
            return Ok(());
        }
        self.writer.ram_begin(Phase::Iterate)?;
        self.writer.zero(at.block.0, at.page)?;
        self.writer.ram_end()?;
        self.write_out()
    }

    fn package(&mut self, pieces: &[(Bytes, u32)], filling: Filling) -> Result<(), FeedError> {
        let mut tail = Vec::new();
        for (data, raw_len) in pieces {
            tail.extend(unpack(data, *raw_len)?);
        }
        let devices = devices_of(&tail);
        let devices = devices.ok_or_else(|| std::io::Error::other("device state has no end"))?;
        for block in 0..self.writer.blocks().len() {
            let runs = filling.absent.runs(block);
            let block = u16::try_from(block).map_err(std::io::Error::other)?;
            self.writer.postcopy_discard(block, &runs)?;
        }
        self.writer.postcopy_package(devices, PACKAGE_PING)?;
        self.write_out()?;
        self.end_filled(&filling)?;
        self.filling = Some(filling);
        Ok(())
    }

    /// When the last lane reaches a barrier QEMU is asked to say so in its turn. A lane may leave
    /// out one that a later one has replaced.
    fn mark(&mut self, lane: usize, barrier: u32) -> Result<(), FeedError> {
        self.marks[lane] = barrier;
        let reached = self.marks.into_iter().min().unwrap_or(0);
        if reached <= self.reached {
            return Ok(());
        }
        self.reached = reached;
        self.writer.command(Command::Ping(reached))?;
        self.write_out()
    }

    fn tail(&mut self, pieces: &[(Bytes, u32)]) -> Result<(), FeedError> {
        self.writer.ram_begin(Phase::Complete)?;
        self.writer.ram_end()?;
        for (data, raw_len) in pieces {
            self.writer.relayed(&unpack(data, *raw_len)?)?;
        }
        self.write_out()
    }

    fn write_out(&mut self) -> Result<(), FeedError> {
        self.socket.write_all(&self.writer.take())?;
        Ok(())
    }
}

fn unpack(data: &[u8], raw_len: u32) -> std::io::Result<Vec<u8>> {
    tail::unpack(data, raw_len).map_err(|error| std::io::Error::other(error.to_string()))
}
