//! Delivery rate from marks: quinn tells no packet numbers, only instants.
//!
//! A mark is taken at each instant of sending (a batch of up to ten packets) and notes what had
//! been delivered by then. When a packet of the batch is acknowledged, the bytes delivered since,
//! over the time that it took, are a rate sample.
//= IETF draft-cheng-iccrg-delivery-rate-estimation, with instants for packets

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Marks that are kept: 6 s at 10 000 batches a second, if nothing is ever acknowledged.
const MARKS_MAX: usize = 65_536;
/// Packets that come this much later than their followers are no longer matched.
const LATE_MAX: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy)]
struct Mark {
    sent: Instant,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
}

/// Bytes delivered over a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RateSample {
    pub(super) bytes_per_s: u64,
    /// Time that the sample covers.
    pub(super) interval: Duration,
    /// What had been delivered when its newest packet was sent.
    pub(super) delivered_before: u64,
}

/// What is in flight, as far as rates need it.
#[derive(Debug, Clone, Default)]
pub(super) struct Flight {
    marks: VecDeque<Mark>,
    delivered: u64,
    /// Last delivery and first sending of the current busy period; `None` while nothing is in
    /// flight.
    busy: Option<(Instant, Instant)>,
    /// Newest mark that the current ACK frame covers.
    newest: Option<Mark>,
}

impl Flight {
    /// Bytes acknowledged so far.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    pub(super) fn sent(&mut self, now: Instant) {
        let (delivered_at, first_sent) = *self.busy.get_or_insert((now, now));
        if self.marks.back().is_some_and(|last| last.sent >= now) {
            return;
        }
        if self.marks.len() == MARKS_MAX {
            self.marks.pop_front();
        }
        let delivered = self.delivered;
        self.marks.push_back(Mark {
            sent: now,
            delivered,
            delivered_at,
            first_sent,
        });
    }

    pub(super) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        if let Some((delivered_at, _)) = &mut self.busy {
            *delivered_at = now;
        }
        if self.newest.is_some_and(|newest| newest.sent >= sent) {
            return;
        }
        if let Ok(index) = self.marks.binary_search_by(|mark| mark.sent.cmp(&sent)) {
            self.newest = self.marks.get(index).copied();
        }
    }

    /// Ends an ACK frame; a sample when it acknowledged anything that has a mark.
    pub(super) fn end_acks(&mut self, now: Instant, in_flight: u64) -> Option<RateSample> {
        if in_flight == 0 {
            self.busy = None;
        }
        let mark = self.newest.take()?;
        if let Some((_, first_sent)) = &mut self.busy {
            *first_sent = mark.sent;
        }
        while self
            .marks
            .front()
            .is_some_and(|first| first.sent + LATE_MAX < mark.sent)
        {
            self.marks.pop_front();
        }
        let acking = now.saturating_duration_since(mark.delivered_at);
        let sending = mark.sent.saturating_duration_since(mark.first_sent);
        let interval = acking.max(sending);
        let bytes = self.delivered.saturating_sub(mark.delivered);
        let bytes_per_s = u128::from(bytes) * 1_000_000_000 / interval.as_nanos().max(1);
        Some(RateSample {
            bytes_per_s: u64::try_from(bytes_per_s).unwrap_or(u64::MAX),
            interval,
            delivered_before: mark.delivered,
        })
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an Instant to count from")]
mod tests {
    use super::*;

    /// One packet of 1 000 bytes a millisecond over 50 ms: the samples say 1 MB/s, also after a
    /// pause of a second.
    #[test]
    fn steady_sending_gives_its_rate_and_pauses_do_not_count() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut flight = Flight::default();
        let mut last = None;
        for burst in [0, 1_200] {
            for ms in 0..200 {
                if ms >= 50 {
                    flight.acked(at(burst + ms), at(burst + ms - 50), 1_000);
                    last = flight.end_acks(at(burst + ms), if ms == 199 { 0 } else { 1_000 });
                }
                if ms < 150 {
                    flight.sent(at(burst + ms));
                }
            }
            let sample = last.expect("each ACK has a mark");
            assert_eq!(sample.bytes_per_s, 1_000_000);
            assert_eq!(sample.interval, Duration::from_millis(50));
        }
        assert_eq!(flight.delivered(), 300_000);
    }

    #[test]
    fn marks_are_bounded_without_any_ack() {
        let start = Instant::now();
        let mut flight = Flight::default();
        for step in 0..70_000 {
            flight.sent(start + Duration::from_micros(step));
        }
        assert_eq!(flight.marks.len(), MARKS_MAX);
    }
}
