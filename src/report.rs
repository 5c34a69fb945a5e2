//! The report of one attempt (`--report`), schema 1. A field that was not measured is `null`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use transport::block::BatchStats;
use transport::session::Outcome;

use crate::faults::PostCopyReport;
use crate::plan::noted::Predicted;

/// One JSON document.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) schema: u32,
    pub(crate) role: &'static str,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) outcome: &'static str,
    pub(crate) reason: Option<String>,
    pub(crate) total_ms: u64,
    pub(crate) downtime_ms: Option<u64>,
    pub(crate) phases: Vec<PhaseSpan>,
    pub(crate) rounds: Vec<RoundSpan>,
    pub(crate) bytes_by_encoding: Option<Encodings>,
    pub(crate) udp_payload_bytes: Option<Udp>,
    pub(crate) pages_total: Option<u64>,
    pub(crate) mapped: bool,
    pub(crate) dirty_pages_per_s: Option<f64>,
    pub(crate) link: Option<Link>,
    pub(crate) peak_memory_bytes: Option<u64>,
    pub(crate) cpu_s: Option<f64>,
    pub(crate) root: Option<String>,
    pub(crate) levels: Option<Vec<i32>>,
    /// What `plan` said shortly before.
    pub(crate) predicted: Option<Predicted>,
    pub(crate) post_copy: Option<PostCopyReport>,
}

/// Length of one phase.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PhaseSpan {
    pub(crate) name: &'static str,
    pub(crate) ms: u64,
}

/// One round of pre-copy.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RoundSpan {
    pub(crate) dirty_pages: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) ms: u64,
}

/// UDP payload of the connection.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Udp {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// The link as the transport saw it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Link {
    pub(crate) rate_bps: Option<u64>,
    pub(crate) rtt_min_ms: Option<f64>,
    pub(crate) queueing_p95_ms: Option<f64>,
    pub(crate) lost_share: Option<f64>,
}

/// Pages and bytes of one encoding.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Encoding {
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
}

/// All encodings by name.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Encodings {
    pub(crate) same: Encoding,
    pub(crate) zero: Encoding,
    pub(crate) copy: Encoding,
    pub(crate) known: Encoding,
    pub(crate) delta: Encoding,
    pub(crate) literal: Encoding,
    pub(crate) raw: Encoding,
}

impl Encodings {
    pub(crate) fn of(stats: &BatchStats) -> Encodings {
        let of = |amount: &transport::block::Amount| Encoding {
            pages: amount.pages,
            bytes: amount.bytes,
        };
        Encodings {
            same: of(&stats.same),
            zero: of(&stats.zero),
            copy: of(&stats.copy),
            known: of(&stats.known),
            delta: of(&stats.delta),
            literal: of(&stats.literal),
            raw: of(&stats.raw),
        }
    }
}

/// The word of both reports, and the reason.
pub(crate) fn outcome_words(outcome: &Outcome) -> (&'static str, Option<String>) {
    match outcome {
        Outcome::Arrived => ("arrived", None),
        Outcome::Stayed { detail, .. } => ("stayed", Some(detail.clone())),
        Outcome::Doubt { detail } => ("doubt", Some(detail.clone())),
    }
}

/// Measures phases as they begin.
#[derive(Debug)]
pub(crate) struct PhaseClock {
    current: &'static str,
    since: Instant,
    spans: Vec<PhaseSpan>,
}

impl PhaseClock {
    pub(crate) fn new(now: Instant) -> PhaseClock {
        PhaseClock {
            current: "greet",
            since: now,
            spans: Vec::new(),
        }
    }

    pub(crate) fn enter(&mut self, now: Instant, name: &'static str) {
        let ms = millis(now.duration_since(self.since));
        self.spans.push(PhaseSpan {
            name: self.current,
            ms,
        });
        (self.current, self.since) = (name, now);
    }

    pub(crate) fn current(&self) -> &'static str {
        self.current
    }

    pub(crate) fn finish(mut self, now: Instant) -> Vec<PhaseSpan> {
        self.enter(now, "end");
        self.spans
    }
}

/// Whole milliseconds.
pub(crate) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Anonymous memory at its peak is not kept by the kernel; the caller samples it with this.
pub(crate) fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// CPU seconds of this process so far, all threads.
pub(crate) fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Fields after the command's closing bracket: utime is the 12th, stime the 13th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let utime: u32 = fields.next()?.parse().ok()?;
    let stime: u32 = fields.next()?.parse().ok()?;
    let ticks_per_s = u32::try_from(rustix::param::clock_ticks_per_second()).ok()?;
    Some((f64::from(utime) + f64::from(stime)) / f64::from(ticks_per_s))
}

/// Writes the report where it was asked for.
pub(crate) fn write(report: &Report, path: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(path, text + "\n")
        .with_context(|| format!("cannot write the report {}", path.display()))
}
