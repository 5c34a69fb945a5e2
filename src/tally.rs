//! What a running attempt knows of itself, for progress, the control socket and the report.

use std::time::{Duration, Instant};

use transport::block::{BatchStats, Root};
use transport::quic::LinkSample;
use transport::session::Outcome;
use transport::session::source::Round;

use crate::faults::PostCopyReport;
use crate::journal::hex;
use crate::plan::noted::Predicted;
use crate::report::{
    Encodings, Link, PhaseClock, Report, RoundSpan, Udp, anonymous_bytes, cpu_seconds, millis,
    outcome_words,
};

/// Queueing samples that are kept: four a second for an hour, then every other one is dropped.
const QUEUEING_MAX: usize = 14_400;

/// Changes of the level that are kept.
const LEVELS_MAX: usize = 256;

/// Counters and marks of one attempt.
#[derive(Debug)]
pub(crate) struct Tally {
    started: Instant,
    pub(crate) phases: PhaseClock,
    rounds: Vec<RoundSpan>,
    stopped: Option<Instant>,
    running: Option<Instant>,
    link: Option<LinkSample>,
    queueing_ms: Vec<f64>,
    peak_memory_bytes: Option<u64>,
    pub(crate) stats: BatchStats,
    pub(crate) pages_total: Option<u64>,
    pub(crate) dirty_pages_per_s: Option<f64>,
    pub(crate) root: Option<Root>,
    /// zstd levels in the order of their use.
    pub(crate) levels: Vec<i32>,
    /// Main memory is read or written where QEMU has it.
    pub(crate) mapped: bool,
    /// What `plan` said shortly before.
    pub(crate) predicted: Option<Predicted>,
    pub(crate) post_copy: Option<PostCopyReport>,
}

impl Tally {
    pub(crate) fn new(now: Instant) -> Tally {
        Tally {
            started: now,
            phases: PhaseClock::new(now),
            rounds: Vec::new(),
            stopped: None,
            running: None,
            link: None,
            queueing_ms: Vec::new(),
            peak_memory_bytes: None,
            stats: BatchStats::default(),
            pages_total: None,
            dirty_pages_per_s: None,
            root: None,
            levels: Vec::new(),
            mapped: false,
            predicted: None,
            post_copy: None,
        }
    }

    pub(crate) fn elapsed_ms(&self, now: Instant) -> u64 {
        millis(now.duration_since(self.started))
    }

    pub(crate) fn round_count(&self) -> usize {
        self.rounds.len()
    }

    pub(crate) fn round(&mut self, round: &Round) {
        self.rounds.push(RoundSpan {
            dirty_pages: round.dirty_pages,
            sent_bytes: round.sent_bytes,
            ms: millis(round.length),
        });
    }

    pub(crate) fn level(&mut self, level: i32) {
        if self.levels.len() < LEVELS_MAX {
            self.levels.push(level);
        }
    }

    pub(crate) fn stopped(&mut self, now: Instant) {
        self.stopped = Some(now);
    }

    pub(crate) fn running(&mut self, now: Instant) {
        self.running = Some(now);
    }

    /// Takes a look at the link and at this process's memory.
    pub(crate) fn sample(&mut self, link: LinkSample) {
        if self.queueing_ms.len() == QUEUEING_MAX {
            let mut keep = false;
            self.queueing_ms.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.queueing_ms.push(link.queueing.as_secs_f64() * 1e3);
        self.link = Some(link);
        self.peak_memory_bytes = self.peak_memory_bytes.max(anonymous_bytes());
    }

    /// STOP to the arrival of Running, less half the least round trip.
    fn downtime(&self) -> Option<Duration> {
        let span = self.running?.duration_since(self.stopped?);
        let back = self.link.map_or(Duration::ZERO, |link| link.rtt_min / 2);
        Some(span.saturating_sub(back))
    }

    fn link(&self) -> Option<Link> {
        let link = self.link?;
        let mut queueing = self.queueing_ms.clone();
        queueing.sort_by(f64::total_cmp);
        let p95 = queueing
            .len()
            .checked_sub(1)
            .map(|last| queueing[last * 95 / 100]);
        let lost_share = (link.sent_packets > 0).then(|| {
            let of = |count| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
            of(link.lost_packets) / of(link.sent_packets)
        });
        Some(Link {
            rate_bps: link.rate_bps,
            rtt_min_ms: Some(link.rtt_min.as_secs_f64() * 1e3),
            queueing_p95_ms: p95,
            lost_share,
        })
    }

    /// The report of this attempt.
    pub(crate) fn report(
        self,
        now: Instant,
        role: &'static str,
        vm: String,
        peer: String,
        outcome: &Outcome,
    ) -> Report {
        let (word, reason) = outcome_words(outcome);
        Report {
            schema: 1,
            role,
            vm,
            peer,
            outcome: word,
            reason,
            total_ms: self.elapsed_ms(now),
            downtime_ms: self.downtime().map(millis),
            rounds: self.rounds.clone(),
            bytes_by_encoding: (self.stats.batches > 0).then(|| Encodings::of(&self.stats)),
            udp_payload_bytes: self.link.map(|link| Udp {
                sent: link.udp_tx_bytes,
                received: link.udp_rx_bytes,
            }),
            pages_total: self.pages_total,
            mapped: self.mapped,
            dirty_pages_per_s: self.dirty_pages_per_s,
            link: self.link(),
            peak_memory_bytes: self.peak_memory_bytes.max(anonymous_bytes()),
            cpu_s: cpu_seconds(),
            root: self.root.map(|root| hex(&root.0)),
            levels: (!self.levels.is_empty()).then(|| self.levels.clone()),
            predicted: self.predicted,
            post_copy: self.post_copy,
            phases: self.phases.finish(now),
        }
    }
}
