//! How long a guest waited for its pages (post-copy): who feeds pages and who hears of faults share it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use transport::block::PageAddress;

use crate::report::millis;

/// Waits that are kept for the percentiles; later ones still count.
const KEPT_MAX: usize = 1 << 20;

/// Faults so far.
#[derive(Debug, Default)]
pub(crate) struct Faults(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    count: u64,
    open: BTreeMap<PageAddress, Instant>,
    waits: Vec<Duration>,
    longest: Duration,
    /// The guest waits for at least one page since then.
    since: Option<Instant>,
    stall: Duration,
}

/// Waits in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Waits {
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// `post_copy` of a report.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PostCopyReport {
    /// Pages that the target asked for.
    pub(crate) faults: u64,
    /// From the fault to the page in QEMU's stream; the target knows it.
    pub(crate) fault_ms: Option<Waits>,
    /// Time in which at least one page was waited for.
    pub(crate) stall_ms: Option<u64>,
    /// Pages that came after the stop.
    pub(crate) pages: u64,
    /// Start of the attempt to RESUME.
    pub(crate) resumed_ms: Option<u64>,
}

impl Faults {
    /// The guest waits for a page.
    pub(crate) fn begin(&self, at: PageAddress, now: Instant) {
        let mut inner = self.lock();
        inner.count += 1;
        inner.open.insert(at, now);
        inner.since.get_or_insert(now);
    }

    /// The page is in QEMU's stream.
    pub(crate) fn end(&self, at: PageAddress, now: Instant) {
        let mut inner = self.lock();
        let Some(begun) = inner.open.remove(&at) else {
            return;
        };
        let wait = now.duration_since(begun);
        inner.longest = inner.longest.max(wait);
        if inner.waits.len() < KEPT_MAX {
            inner.waits.push(wait);
        }
        if inner.open.is_empty()
            && let Some(since) = inner.since.take()
        {
            inner.stall += now.duration_since(since);
        }
    }

    /// Number of faults.
    pub(crate) fn count(&self) -> u64 {
        self.lock().count
    }

    /// What the report says.
    pub(crate) fn report(&self, pages: u64, resumed_ms: Option<u64>) -> PostCopyReport {
        let inner = self.lock();
        let mut waits = inner.waits.clone();
        waits.sort_unstable();
        let ms = |wait: Duration| wait.as_secs_f64() * 1e3;
        let at = |percent: usize| {
            let last = waits.len().checked_sub(1)?;
            waits.get(last * percent / 100).map(|wait| ms(*wait))
        };
        let of = || {
            Some(Waits {
                p50: at(50)?,
                p95: at(95)?,
                p99: at(99)?,
                max: ms(inner.longest),
            })
        };
        PostCopyReport {
            faults: inner.count,
            fault_ms: of(),
            stall_ms: Some(millis(inner.stall)),
            pages,
            resumed_ms,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transport::block::BlockId;

    /// Waits overlap; the stall is the time in which there was one.
    #[test]
    fn waits_and_stall() {
        #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
        let begin = Instant::now();
        let at = |page| PageAddress {
            block: BlockId(0),
            page,
        };
        let after = |ms| begin + Duration::from_millis(ms);
        let faults = Faults::default();
        faults.begin(at(1), after(0));
        faults.begin(at(2), after(10));
        faults.end(at(1), after(20));
        faults.end(at(2), after(40));
        faults.end(at(3), after(50));
        faults.begin(at(3), after(100));
        faults.end(at(3), after(105));
        let report = faults.report(7, None);
        assert_eq!((report.faults, report.pages), (3, 7));
        assert_eq!(report.stall_ms, Some(45));
        let waits = report.fault_ms.unwrap();
        assert_eq!((waits.p50, waits.max), (20.0, 30.0));
        assert!(Faults::default().report(0, None).fault_ms.is_none());
    }
}
