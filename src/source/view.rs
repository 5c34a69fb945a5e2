//! What the operator sees of a move: the progress line, and the trace.

use std::time::Duration;

use transport::session::source::Sample;

use super::driver::Driver;
use super::left::{Left, with_content};
use crate::estimate::{to_f64, to_u64};
use crate::progress::Snapshot;
use crate::report::millis;
use crate::trace::Look;
use crate::waiting::now;

impl Driver {
    pub(super) fn show(&mut self, at_once: bool) {
        let mut snapshot = self.snapshot();
        self.progress.show(now(), &mut snapshot, at_once);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let left_pages = self.image.as_ref().map(|image| image.dirty.dirty_pages());
        let rate = self.machine.rate_bytes_per_s();
        let left = left_pages.map(|pages| self.left.bytes(pages + self.unannounced_pages()));
        let done_bytes = self.machine.applied_bytes();
        let total = to_f64(done_bytes) + left.unwrap_or(0.0);
        let percent = if total > 0.0 {
            100.0 * to_f64(done_bytes) / total
        } else {
            0.0
        };
        let eta_s = left
            .filter(|_| self.left.is_sound(now()))
            .and_then(|left| Left::seconds(left, rate));
        Snapshot {
            phase: self.tally.phases.current(),
            round: self.tally.round_count() + 1,
            left_pages,
            faults: (self.left_behind > 0).then_some(self.faults),
            left_bytes: left.map(to_u64),
            done_bytes,
            rate_bps: (rate > 1.0).then(|| to_u64(rate * 8.0)),
            eta_s,
            elapsed_ms: self.tally.elapsed_ms(now()),
            percent: u8::try_from(to_u64(percent)).unwrap_or(100),
            stuck_needs_ms: self
                .machine
                .stuck_at(now())
                .filter(|least| *least < Duration::MAX)
                .map(millis),
            throttle_percent: self.machine.throttle_percent(),
        }
    }

    /// Pages that QEMU's first pass has not come to.
    fn unannounced_pages(&self) -> u64 {
        let all = self.tally.pages_total.unwrap_or(0);
        let announced = self.capture.as_ref().map(|it| it.announced_pages());
        all.saturating_sub(announced.unwrap_or(all))
    }

    pub(super) fn trace(&mut self, sample: &Sample) {
        let link = self.peer.as_ref().map(|peer| peer.connection.link_sample());
        let goodput = self.machine.rate_bytes_per_s();
        let backlog_bytes = to_f64(sample.backlog_pages) * self.machine.page_cost_bytes();
        let look = Look {
            t_ms: self.tally.elapsed_ms(now()),
            phase: self.tally.phases.current(),
            round: self.tally.round_count() + 1,
            rate_bps: link.as_ref().and_then(|link| link.rate_bps),
            queueing_ms: link.map(|link| link.queueing.as_secs_f64() * 1e3),
            goodput_bps: (goodput > 1.0).then(|| to_u64(goodput * 8.0)),
            backlog_pages: sample.backlog_pages,
            backlog_bytes: to_u64(backlog_bytes),
            zero_share: self.left.zero_share(),
            unannounced_pages: self.unannounced_pages(),
            sent_bytes: sample.sent_bytes,
            sent_pages: with_content(&self.tally.stats),
            in_flight_bytes: sample
                .sent_bytes
                .saturating_sub(self.machine.applied_bytes()),
            dirty_pages_per_s: self.machine.dirty_pages_per_s(),
            predicted_downtime_ms: self.machine.predicted_stop(now()).map(millis),
            throttle_percent: self.machine.throttle_percent(),
        };
        self.trace.look(&look);
    }

    pub(super) fn trace_event(&mut self, event: &str) {
        let t_ms = self.tally.elapsed_ms(now());
        self.trace.event(t_ms, event);
    }
}
