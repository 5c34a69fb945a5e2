//! Sized threads for CPU work.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::oneshot;

use crate::block::LANES;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that take one job at a time, in order; a lane always meets the same thread.
#[derive(Debug, Clone)]
pub struct Workers {
    queues: Arc<[SyncSender<Job>]>,
}

impl Workers {
    /// Starts `count` threads, at least one and at most one per lane.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub fn start(count: usize) -> std::io::Result<Workers> {
        let mut queues = Vec::new();
        for number in 0..count.clamp(1, LANES) {
            // Each lane has at most one job under way, so a queue of LANES is never full.
            let (queue, jobs) = sync_channel::<Job>(LANES);
            std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || {
                    while let Ok(job) = jobs.recv() {
                        job();
                    }
                })?;
            queues.push(queue);
        }
        Ok(Workers {
            queues: queues.into(),
        })
    }

    /// Number of threads.
    #[must_use]
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Runs a lane's job and returns what it returns; `None` when the thread is gone.
    pub async fn run<T: Send + 'static>(
        &self,
        lane: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (answer, reply) = oneshot::channel();
        let job: Job = Box::new(move || {
            // The caller may be gone; its result is then of no use.
            drop(answer.send(work()));
        });
        self.queues[lane % self.queues.len()].try_send(job).ok()?;
        reply.await.ok()
    }
}
