//! One lane: pages are taken and encoded when the flight has room, and sent as the cap allows; then
//! the barrier's mark.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;
use tokio::time::{Duration, Instant, sleep_until};

use super::{LaneEvent, Shared, lock};
use crate::block::LaneCursor;
use crate::quic::LaneSender;
use crate::wire::limits::BATCH_MAX_BYTES;
use crate::wire::put_mark;

/// What a lane will roughly add to the flight while it is being encoded.
const RESERVE_BYTES: u64 = 64 * 1024;

pub(super) struct Lane {
    index: usize,
    sender: LaneSender,
    shared: Arc<Shared>,
    cursor: Option<LaneCursor>,
    marked: u32,
    /// Bytes of batches so far.
    lane_bytes: u64,
}

impl Lane {
    pub(super) fn new(sender: LaneSender, shared: Arc<Shared>) -> Lane {
        Lane {
            index: sender.index(),
            sender,
            shared,
            cursor: None,
            marked: 0,
            lane_bytes: 0,
        }
    }

    pub(super) async fn run(mut self, incarnation: u64) {
        if let Err(detail) = self.send_all(incarnation).await {
            let told = self.shared.events.send(LaneEvent::Failed(detail)).await;
            tracing::debug!(lane = self.index, session = told.is_ok(), "lane ended");
        }
    }

    async fn send_all(&mut self, incarnation: u64) -> Result<(), String> {
        let mut header = BytesMut::new();
        lock(&self.shared.encoders[self.index])
            .header(incarnation)
            .put(&mut header);
        self.send(header).await?;
        loop {
            let shared = self.shared.clone();
            let mut woken = std::pin::pin!(shared.wake.notified());
            // Registered before the look, so that no wake between look and wait is lost.
            woken.as_mut().enable();
            let barrier = shared.barrier.load(Ordering::Acquire);
            let may_take = !shared.is_held.load(Ordering::Acquire);
            let has_pages = shared.turns.has_early(self.index)
                || may_take && shared.dirty.lane_dirty(self.index) > 0;
            if has_pages {
                self.batch().await?;
            } else if barrier > self.marked {
                self.mark(barrier).await?;
            } else {
                woken.await;
            }
        }
    }

    async fn batch(&mut self) -> Result<(), String> {
        self.reserve().await;
        let shared = self.shared.clone();
        let lane = self.index;
        let mut cursor = self.cursor.take().unwrap_or_else(|| LaneCursor::new(lane));
        let work = move || {
            let mut out = BytesMut::with_capacity(BATCH_MAX_BYTES / 2);
            let mut encoder = lock(&shared.encoders[lane]);
            let taken = shared.take(&mut cursor);
            let level = encoder.set_level(shared.effort.level());
            let began = Instant::now();
            let encoded = level.and_then(|()| encoder.encode(&taken, &shared.sources(), &mut out));
            if let Ok(stats) = &encoded {
                shared.effort.count(stats, began.elapsed());
            }
            let last_seq = encoder.last_seq();
            (cursor, out, encoded, last_seq)
        };
        let result = self.shared.workers.run(lane, work).await;
        self.shared
            .reserved_bytes
            .fetch_sub(RESERVE_BYTES, Ordering::Relaxed);
        let (cursor, out, encoded, last_seq) = result.ok_or("a worker thread is gone")?;
        self.cursor = Some(cursor);
        let stats = encoded.map_err(|error| format!("a page could not be encoded: {error}"))?;
        *lock(&self.shared.stats) += stats;
        self.shared
            .sent_bytes
            .fetch_add(out.len() as u64, Ordering::Relaxed);
        if out.is_empty() {
            return Ok(());
        }
        self.lane_bytes += out.len() as u64;
        if self.shared.held.copies.is_some() {
            lock(&self.shared.unacknowledged[lane]).push_back((self.lane_bytes, last_seq));
        }
        self.pace(out.len()).await;
        self.send(out).await
    }

    /// Waits until the rate cap lets so many bytes go.
    async fn pace(&self, bytes: usize) {
        let rate = self.shared.rate_max.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let nanos = (bytes as u64).saturating_mul(1_000_000_000) / rate;
        let at = {
            let mut due = lock(&self.shared.due);
            let at = (*due).max(Instant::now());
            *due = at + Duration::from_nanos(nanos);
            at
        };
        sleep_until(at).await;
    }

    /// Waits until the flight has room, then counts this lane's batch in.
    async fn reserve(&self) {
        let shared = &self.shared;
        loop {
            let mut room = std::pin::pin!(shared.room.notified());
            room.as_mut().enable();
            let sent = shared.sent_bytes.load(Ordering::Relaxed);
            let flight = sent.saturating_sub(shared.applied_bytes.load(Ordering::Relaxed))
                + shared.reserved_bytes.load(Ordering::Relaxed);
            if flight < shared.budget_bytes.load(Ordering::Relaxed) {
                shared
                    .reserved_bytes
                    .fetch_add(RESERVE_BYTES, Ordering::Relaxed);
                return;
            }
            room.await;
        }
    }

    async fn mark(&mut self, barrier: u32) -> Result<(), String> {
        let mut out = BytesMut::new();
        put_mark(&mut out, barrier);
        self.send(out).await?;
        self.marked = barrier;
        lock(&self.shared.encoders[self.index])
            .ledger_mut()
            .refresh();
        self.shared.marks[self.index].store(barrier, Ordering::Release);
        let marks = self.shared.marks.iter();
        let reached = marks.map(|mark| mark.load(Ordering::Acquire)).min();
        if let Some(barrier) = reached
            && self.shared.told.fetch_max(barrier, Ordering::AcqRel) < barrier
        {
            let root = self.shared.root();
            let event = LaneEvent::Marked { barrier, root };
            self.shared
                .events
                .send(event)
                .await
                .map_err(|_| "the session has ended")?;
        }
        Ok(())
    }

    async fn send(&mut self, bytes: BytesMut) -> Result<(), String> {
        self.sender
            .send(bytes.freeze())
            .await
            .map_err(|error| error.to_string())
    }
}
