//! One line that never runs backwards, or one JSON object a line (`--json`).

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// What is shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Snapshot {
    pub(crate) phase: &'static str,
    pub(crate) round: usize,
    /// Pages announced and not sent (source), or null.
    pub(crate) left_pages: Option<u64>,
    /// Pages that the guest waited for, in post-copy.
    pub(crate) faults: Option<u64>,
    /// Estimated bytes on the link for them.
    pub(crate) left_bytes: Option<u64>,
    /// Lane bytes so far.
    pub(crate) done_bytes: u64,
    pub(crate) rate_bps: Option<u64>,
    /// Range of the remaining time of pre-copy.
    pub(crate) eta_s: Option<(f64, f64)>,
    pub(crate) elapsed_ms: u64,
    /// 0 to 100, never falls.
    pub(crate) percent: u8,
    /// Pre-copy does not get on: a downtime of so many ms would do.
    pub(crate) stuck_needs_ms: Option<u64>,
    /// How much the guest's processors are slowed, in percent.
    pub(crate) throttle_percent: u8,
}

/// Shows snapshots.
#[derive(Debug)]
pub(crate) struct Progress {
    json: bool,
    bar: Option<ProgressBar>,
    shown_at: Option<Instant>,
    best_percent: u8,
}

/// Lines without a terminal, and JSON, come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

impl Progress {
    pub(crate) fn new(json: bool) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        let bar = (!json && terminal).then(|| {
            let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {percent:>3} %  {msg}");
            bar.set_style(style.expect("the template is well-formed"));
            bar
        });
        Progress {
            json,
            bar,
            shown_at: None,
            best_percent: 0,
        }
    }

    /// Shows the snapshot if it is time for one; a new phase is shown at once.
    pub(crate) fn show(&mut self, now: Instant, snapshot: &mut Snapshot, at_once: bool) {
        self.best_percent = self.best_percent.max(snapshot.percent.min(100));
        snapshot.percent = self.best_percent;
        if let Some(bar) = &self.bar {
            bar.set_position(u64::from(self.best_percent));
            bar.set_message(line(snapshot));
            return;
        }
        let due = self
            .shown_at
            .is_none_or(|at| now.duration_since(at) >= LINE_INTERVAL);
        if !due && !at_once {
            return;
        }
        self.shown_at = Some(now);
        if self.json {
            if let Ok(text) = serde_json::to_string(snapshot) {
                say(&text);
            }
        } else {
            tracing::info!("{:>3} %  {}", self.best_percent, line(snapshot));
        }
    }

    /// Ends the line.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// One line on stdout, seen at once by whoever reads a pipe. A reader that is gone is no error.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        tracing::debug!(%error, "nobody reads stdout");
    }
}

fn line(snapshot: &Snapshot) -> String {
    if let ("post-copy", Some(left)) = (snapshot.phase, snapshot.left_pages) {
        let faults = snapshot.faults.unwrap_or(0);
        return format!("post-copy: {left} pages left, {faults} faults");
    }
    let mut parts = vec![snapshot.phase.to_owned()];
    if snapshot.round > 0 {
        parts.push(format!("round {}", snapshot.round));
    }
    parts.push(format!("{} done", size(snapshot.done_bytes)));
    if let Some(left) = snapshot.left_bytes {
        parts.push(format!("about {} left", size(left)));
    }
    if let Some(rate) = snapshot.rate_bps {
        parts.push(format!(
            "{}.{} Mbit/s",
            rate / 1_000_000,
            rate / 100_000 % 10
        ));
    }
    if let Some((low, high)) = snapshot.eta_s {
        parts.push(format!("{low:.0}-{high:.0} s"));
    }
    if snapshot.throttle_percent > 0 {
        parts.push(format!("guest slowed by {} %", snapshot.throttle_percent));
    }
    if let Some(ms) = snapshot.stuck_needs_ms {
        parts.push(format!("does not converge: --downtime {ms} would do"));
    }
    parts.join(", ")
}

fn size(bytes: u64) -> String {
    if bytes < 10 << 20 {
        format!("{} KiB", bytes >> 10)
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The percentage that is shown never falls, whatever the estimate does.
    #[test]
    fn never_backwards() {
        #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
        let now = Instant::now();
        let mut progress = Progress {
            json: true,
            bar: None,
            shown_at: Some(now),
            best_percent: 0,
        };
        let mut shown = Vec::new();
        for percent in [10, 40, 20, 60, 59] {
            let mut snapshot = Snapshot {
                phase: "precopy",
                round: 1,
                left_pages: None,
                faults: None,
                left_bytes: None,
                done_bytes: 0,
                rate_bps: None,
                eta_s: None,
                elapsed_ms: 0,
                percent,
                stuck_needs_ms: None,
                throttle_percent: 0,
            };
            progress.show(now, &mut snapshot, false);
            shown.push(snapshot.percent);
        }
        assert_eq!(shown, [10, 40, 40, 60, 60]);
    }
}
