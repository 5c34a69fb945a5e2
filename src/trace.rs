//! `send --trace FILE`: what the controllers saw, ten times a second, one JSON object a line.
//!
//! ```text
//! {"t_ms":1200,"phase":"precopy","round":3,"rate_bps":94000000,"queueing_ms":3.1, …}
//! {"t_ms":1234,"event":"round"}
//! ```

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// One look.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Look {
    pub(crate) t_ms: u64,
    pub(crate) phase: &'static str,
    pub(crate) round: usize,
    /// Delivery rate that the congestion controller sees.
    pub(crate) rate_bps: Option<u64>,
    pub(crate) queueing_ms: Option<f64>,
    /// Applied at the target.
    pub(crate) goodput_bps: Option<u64>,
    pub(crate) backlog_pages: u64,
    /// Estimated on the link.
    pub(crate) backlog_bytes: u64,
    /// Part of the backlog that was announced as zero.
    pub(crate) zero_share: f64,
    /// What QEMU's first pass has not come to.
    pub(crate) unannounced_pages: u64,
    /// So far, and the pages with content in them.
    pub(crate) sent_bytes: u64,
    pub(crate) sent_pages: u64,
    pub(crate) in_flight_bytes: u64,
    pub(crate) dirty_pages_per_s: Option<f64>,
    pub(crate) predicted_downtime_ms: Option<u64>,
    pub(crate) throttle_percent: u8,
}

#[derive(Debug, Serialize)]
struct Happening<'a> {
    t_ms: u64,
    event: &'a str,
}

/// The file. One that cannot be written any more ends the trace, not the move.
#[derive(Debug)]
pub(crate) struct Trace {
    file: Option<BufWriter<File>>,
}

impl Trace {
    /// `None`: nothing is traced.
    pub(crate) fn create(path: Option<&Path>) -> anyhow::Result<Trace> {
        let create = |path: &Path| {
            let file = File::create(path);
            file.with_context(|| format!("cannot write the trace {}", path.display()))
        };
        let file = path.map(create).transpose()?.map(BufWriter::new);
        Ok(Trace { file })
    }

    pub(crate) fn is_on(&self) -> bool {
        self.file.is_some()
    }

    pub(crate) fn look(&mut self, look: &Look) {
        self.line(look);
    }

    pub(crate) fn event(&mut self, t_ms: u64, event: &str) {
        self.line(&Happening { t_ms, event });
    }

    fn line(&mut self, line: &impl Serialize) {
        let Some(file) = &mut self.file else { return };
        let written = serde_json::to_writer(&mut *file, line)
            .map_err(std::io::Error::other)
            .and_then(|()| file.write_all(b"\n"));
        if let Err(error) = written {
            tracing::warn!(%error, "the trace ends here");
            self.file = None;
        }
    }
}
