//! A lane's end of feeding: gathers a batch's decoded pages, keeps them in the replica and in shared
//! memory, and queues the rest for target QEMU's stream.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use bytes::Bytes;
use qemu_glue::stream::PAGE_SIZE;
use transport::block::{PageAddress, Replica, Sink};
use transport::quic::driver::LaneSink;

use super::Feed;
use super::batch::Batch;
use crate::mapped::TargetMemory;
use crate::shared::Shared;

/// What this host holds beside target QEMU's stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Elsewhere {
    /// Memory that QEMU shares: its pages are written there.
    pub(crate) memory: Option<Arc<TargetMemory>>,
    /// The image as applied, kept for the next trip, read for copies and deltas.
    pub(crate) replica: Option<Arc<dyn Replica>>,
    /// Disk images that the source may name.
    pub(crate) shared: Option<Shared>,
}

/// A lane's way to the feeding thread.
#[derive(Debug, Clone)]
pub(crate) struct FeedSink {
    lane: usize,
    queue: SyncSender<Feed>,
    batch: Batch,
    elsewhere: Elsewhere,
    /// The batch is of the basis: the replica has it.
    is_seeding: bool,
}

impl Sink for FeedSink {
    fn zero(&mut self, first: PageAddress, count: u32) -> std::io::Result<()> {
        self.batch.zeros.push((first, count));
        Ok(())
    }

    fn page(&mut self, at: PageAddress, content: &[u8; PAGE_SIZE]) -> std::io::Result<()> {
        self.batch.pages.push(at);
        self.batch.contents.extend_from_slice(content);
        Ok(())
    }

    fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        match (&self.elsewhere.memory, &self.elsewhere.replica) {
            (Some(memory), _) if memory.is_shared(at.block) => memory.read(at, into),
            (_, Some(replica)) => replica.read(at, into),
            (_, None) => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }

    fn known(&mut self, number: u32, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
        match &self.elsewhere.shared {
            Some(shared) => shared.read(number, into),
            None => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }
}

impl LaneSink for FeedSink {
    fn seed(&mut self, at: PageAddress, content: Option<&[u8; PAGE_SIZE]>) -> std::io::Result<()> {
        self.is_seeding = true;
        match content {
            Some(content) => self.page(at, content),
            None => match self.batch.zeros.last_mut() {
                Some((first, count))
                    if first.block == at.block && first.page + *count == at.page =>
                {
                    *count += 1;
                    Ok(())
                }
                _ => self.zero(at, 1),
            },
        }
    }

    fn batch_end(&mut self, wire_bytes: u64) -> std::io::Result<()> {
        let mut batch = std::mem::take(&mut self.batch);
        if !std::mem::take(&mut self.is_seeding) {
            self.keep(&batch);
        }
        if let Some(memory) = &self.elsewhere.memory {
            batch = batch.write_shared(memory)?;
        }
        self.send(Feed::Batch {
            lane: self.lane,
            batch,
            wire_bytes,
        })
    }

    fn mark(&mut self, barrier: u32) -> std::io::Result<()> {
        self.send(Feed::Mark {
            lane: self.lane,
            barrier,
        })
    }
}

impl FeedSink {
    pub(super) fn new(lane: usize, queue: SyncSender<Feed>, elsewhere: Elsewhere) -> FeedSink {
        FeedSink {
            lane,
            queue,
            batch: Batch::default(),
            elsewhere,
            is_seeding: false,
        }
    }

    /// Writes a batch into the replica, neighbours in one go. One that fails is used no more: the
    /// guest moves without it.
    fn keep(&mut self, batch: &Batch) {
        let Some(replica) = &self.elsewhere.replica else {
            return;
        };
        if let Err(error) = batch.write_into(&**replica) {
            tracing::warn!(%error, "the checkpoint is not kept any further");
            self.elsewhere.replica = None;
        }
    }

    /// Bytes of a relayed stream; waits while QEMU's socket is full.
    pub(crate) fn raw(&self, bytes: Bytes) -> std::io::Result<()> {
        self.send(Feed::Raw(bytes))
    }

    fn send(&self, feed: Feed) -> std::io::Result<()> {
        self.queue
            .send(feed)
            .map_err(|_| std::io::ErrorKind::BrokenPipe.into())
    }
}
