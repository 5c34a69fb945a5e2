//! One thread that writes and checks: no page is ever checked while it is written.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use crate::memory::{Memory, Pattern};

/// Work is done in ticks of this length.
const TICK: Duration = Duration::from_millis(10);
/// Work that was missed for longer than this (a stopped clock, a starved CPU) is not made up for.
const CATCH_UP_MAX: Duration = Duration::from_millis(500);
/// Sweeps on demand that may wait.
const DEMANDS_MAX: usize = 64;

/// What the guest is asked to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Settings {
    /// Size of the working set in MiB.
    pub(crate) working_set_mib: u64,
    /// Pages written a second.
    pub(crate) writes_per_s: u64,
    /// Pages checked a second by the endless sweep.
    pub(crate) checks_per_s: u64,
    /// Share of random bytes in a page.
    pub(crate) entropy_percent: u64,
    /// Seed of all content.
    pub(crate) seed: u64,
    /// Which pages are written.
    pub(crate) pattern: Pattern,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            working_set_mib: 16,
            writes_per_s: 0,
            checks_per_s: 2000,
            entropy_percent: 50,
            seed: 1,
            pattern: Pattern::Random,
        }
    }
}

/// What the guest reports about itself.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Ticks since start: the service's monotonic counter.
    pub(crate) count: AtomicU64,
    /// Pages that were found wrong.
    pub(crate) errors: AtomicU64,
    /// Pages written since the first fill.
    pub(crate) writes: AtomicU64,
    /// Whole sweeps done.
    pub(crate) sweeps: AtomicU64,
}

/// Result of a sweep on demand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verified {
    /// Wrong pages found since start, this sweep's included.
    pub(crate) errors: u64,
    /// Pages that this sweep looked at.
    pub(crate) pages: usize,
}

/// The sending end of a demand for a sweep.
pub(crate) type Demands = SyncSender<SyncSender<Verified>>;

/// Owner of the memory.
#[derive(Debug)]
pub(crate) struct Worker {
    settings: Settings,
    counters: Arc<Counters>,
    demands: Receiver<SyncSender<Verified>>,
}

impl Worker {
    pub(crate) fn new(settings: Settings) -> (Self, Demands) {
        let (sender, demands) = sync_channel(DEMANDS_MAX);
        (
            Self {
                settings,
                counters: Arc::default(),
                demands,
            },
            sender,
        )
    }

    pub(crate) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Fills the working set, says so, then works for ever.
    pub(crate) fn run(self) -> Result<(), String> {
        let pages = usize::try_from(self.settings.working_set_mib.max(1) * 256)
            .map_err(|_| "the working set is too large".to_owned())?;
        let entropy = usize::try_from(self.settings.entropy_percent).unwrap_or(100);
        let mut memory = Memory::new(pages, self.settings.seed, entropy, self.settings.pattern);
        for page in 0..pages {
            memory.write(page);
        }
        say_ready();
        let mut writes = Budget::new(self.settings.writes_per_s);
        let mut checks = Budget::new(self.settings.checks_per_s);
        let mut last = now();
        loop {
            match self.demands.recv_timeout(TICK) {
                Ok(reply) => self.sweep(&memory, &reply),
                Err(RecvTimeoutError::Timeout) => {}
                // The serving threads live as long as the process.
                Err(RecvTimeoutError::Disconnected) => return Err("nobody listens".to_owned()),
            }
            let passed = now().duration_since(last).min(CATCH_UP_MAX);
            last = now();
            for _ in 0..writes.due(passed) {
                memory.write_next();
                self.counters.writes.fetch_add(1, Ordering::Relaxed);
            }
            for _ in 0..checks.due(passed) {
                let (right, ended) = memory.check_next();
                self.counters
                    .errors
                    .fetch_add(u64::from(!right), Ordering::Relaxed);
                self.counters
                    .sweeps
                    .fetch_add(u64::from(ended), Ordering::Relaxed);
            }
            self.counters.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Looks at every page at once; nothing is written meanwhile.
    fn sweep(&self, memory: &Memory, reply: &SyncSender<Verified>) {
        let pages = memory.pages();
        let wrong = (0..pages).filter(|page| !memory.is_right(*page)).count();
        let wrong = u64::try_from(wrong).unwrap_or(u64::MAX);
        let errors = self.counters.errors.fetch_add(wrong, Ordering::Relaxed) + wrong;
        // A connection that went away needs no answer.
        reply.try_send(Verified { errors, pages }).ok();
    }
}

/// Turns a rate into whole pieces of work.
#[derive(Debug)]
struct Budget {
    per_s: u64,
    /// Millionths of a piece that are left over.
    rest: u64,
}

impl Budget {
    fn new(per_s: u64) -> Self {
        Self { per_s, rest: 0 }
    }

    fn due(&mut self, passed: Duration) -> u64 {
        let passed_us = u64::try_from(passed.as_micros()).unwrap_or(0);
        let total = self.rest + self.per_s.saturating_mul(passed_us);
        self.rest = total % 1_000_000;
        total / 1_000_000
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this program is a driver: it lives by the clock"
)]
fn now() -> Instant {
    Instant::now()
}

#[expect(
    clippy::print_stdout,
    reason = "the console is where the lab waits for this line"
)]
fn say_ready() {
    println!("LAB READY");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No piece of work is lost to rounding.
    #[test]
    fn budget_adds_up() {
        let mut budget = Budget::new(1953);
        let done: u64 = (0..1000)
            .map(|_| budget.due(Duration::from_micros(10_007)))
            .sum();
        assert_eq!(done, 1953 * 10_007 / 1000);
    }
}
