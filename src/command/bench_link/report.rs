//! What a measurement prints: a line a second and a summary, as text or JSON.

use std::io::Write;
use std::net::SocketAddr;

use anyhow::Result;
use serde_json::{Value, json};

use super::messages::{Link, Reception, Sending};

/// Prints to standard output.
#[derive(Debug)]
pub(super) struct Printer {
    json: bool,
    last: (u64, u64),
}

impl Printer {
    pub(super) fn new(json: bool) -> Self {
        Self { json, last: (0, 0) }
    }

    /// The socket is bound.
    pub(super) fn listening(&mut self, address: SocketAddr) -> Result<()> {
        let value = json!({ "event": "listening", "address": address.to_string() });
        self.print(&value, &format!("listening on {address}"))
    }

    /// What had arrived after `ms`.
    pub(super) fn second(&mut self, ms: u64, bytes: u64, link: Link) -> Result<()> {
        let (ms_before, bytes_before) = std::mem::replace(&mut self.last, (ms, bytes));
        let (time, grown) = (
            ms.saturating_sub(ms_before),
            bytes.saturating_sub(bytes_before),
        );
        let goodput_bps = if time == 0 {
            0.0
        } else {
            grown as f64 * 8e3 / time as f64
        };
        let Link {
            rtt_ms,
            queueing_ms,
            lost_share,
        } = link;
        let value = json!({
            "event": "second", "s": ms as f64 / 1e3, "goodput_bps": goodput_bps,
            "rtt_ms": rtt_ms, "queueing_ms": queueing_ms, "lost_share": lost_share,
        });
        let text = format!(
            "{:4.0} s {:9.1} Mbit/s   rtt {rtt_ms:6.1} ms   queue {queueing_ms:6.1} ms   lost {:.2} %",
            ms as f64 / 1e3,
            goodput_bps / 1e6,
            lost_share * 100.0,
        );
        self.print(&value, &text)
    }

    /// Both halves of the summary.
    pub(super) fn summary(&mut self, reception: &Reception, sending: &Sending) -> Result<()> {
        let value = json!({
            "event": "summary",
            "schema": 1,
            "bytes": reception.bytes,
            "ms": reception.ms,
            "goodput_bps": reception.goodput_bps,
            "steady_goodput_bps": reception.steady_goodput_bps,
            "rtt_ms": sending.rtt_ms,
            "rtt_min_ms": sending.rtt_min_ms,
            "queueing_ms": sending.queueing_ms,
            "lost_share": sending.lost_share,
            "retransmitted_share": sending.retransmitted_share,
            "udp_payload_bytes": sending.udp_payload_bytes,
            "cpu_s_per_gib": { "send": sending.cpu_s_per_gib, "receive": reception.cpu_s_per_gib },
        });
        self.print(&value, &summary_text(reception, sending))
    }

    fn print(&mut self, value: &Value, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{value}")?
        } else {
            writeln!(out, "{text}")?
        }
        Ok(out.flush()?)
    }
}

fn summary_text(reception: &Reception, sending: &Sending) -> String {
    let steady = reception
        .steady_goodput_bps
        .map_or_else(String::new, |steady_bps| {
            format!(" ({:.1} without the first 2 s)", steady_bps / 1e6)
        });
    let cpu = |seconds: Option<f64>| seconds.map_or("?".to_owned(), |s| format!("{s:.2}"));
    format!(
        "{:.1} Mbit/s{steady}, rtt {:.1} ms (least {:.1}), queue p50 {:.1} p95 {:.1} ms, \
         lost {:.2} %, CPU s/GiB send {} receive {}",
        reception.goodput_bps / 1e6,
        sending.rtt_ms,
        sending.rtt_min_ms,
        sending.queueing_ms.p50,
        sending.queueing_ms.p95,
        sending.lost_share * 100.0,
        cpu(sending.cpu_s_per_gib),
        cpu(reception.cpu_s_per_gib),
    )
}
