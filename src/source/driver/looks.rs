//! Looks at the transfer, every tick: the machine's sample, the link's budget and level, the trace.

use transport::block::BatchStats;
use transport::session::source::{Input, Sample};

use super::Driver;
use crate::source::left::with_content;
use crate::waiting::now;

/// How often the link is measured (it copies the congestion controller).
const LINK_TICKS: u32 = 12;

/// A period of the guest's writing, for the order of post-copy.
const HEAT_TICKS: u32 = 50;

/// How often a trace gets a line.
const TRACE_TICKS: u32 = 5;

/// Bytes in flight: two bandwidth-delay products, and room for the target's telling (20 ms) and
/// for batches that are being decoded.
const BUDGET_BASE_BYTES: u64 = 1 << 20;

impl Driver {
    pub(super) fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        if self.ticks.is_multiple_of(LINK_TICKS) {
            self.measure_link();
        }
        if self.ticks.is_multiple_of(HEAT_TICKS) {
            self.age_heat();
        }
        if let (Some(image), Some(lanes), Some(capture)) = (&self.image, &self.lanes, &self.capture)
        {
            let counters = lanes.counters();
            self.tally.stats = counters.stats;
            self.left.look(now(), &image.dirty);
            self.left
                .sent(counters.sent_bytes, with_content(&counters.stats));
            let sample = Sample {
                backlog_pages: image.dirty.dirty_pages(),
                announced_pages: capture.announced_pages(),
                content_pages: content_pages(&counters.stats),
                sent_bytes: counters.sent_bytes,
                rtt: self.link_rtt,
                link_bytes_per_s: self.link_bytes_per_s,
            };
            self.machine.handle(now(), Input::Sample(sample));
            if self.trace.is_on() && self.ticks.is_multiple_of(TRACE_TICKS) {
                self.trace(&sample);
            }
        }
        self.show(false);
    }

    fn measure_link(&mut self) {
        let Some(peer) = &self.peer else { return };
        let link = peer.connection.link_sample();
        self.link_rtt = link.rtt_min;
        self.tally.sample(link);
        let Some(lanes) = &self.lanes else { return };
        let rate = link.rate_bps.unwrap_or(0) / 8;
        self.link_bytes_per_s = rate;
        let rtt_us = u64::try_from(link.rtt.as_micros()).unwrap_or(u64::MAX);
        let product = rate.saturating_mul(rtt_us) / 1_000_000;
        lanes.set_budget((2 * product + BUDGET_BASE_BYTES).min(self.options.budget.flight_bytes));
        if self.options.level.is_none()
            && let Some(level) = lanes.adapt_level(rate)
        {
            tracing::debug!(level, "compression");
            self.tally.level(level);
        }
    }
}

/// Pages that cost bytes.
fn content_pages(stats: &BatchStats) -> u64 {
    stats.copy.pages + stats.known.pages + stats.delta.pages + stats.literal.pages + stats.raw.pages
}
