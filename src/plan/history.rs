//! What earlier moves of this host were like, and what they teach the model.
//!
//! `STATE_DIR/history/moves.jsonl` (0600) has one line for each guest that was sent: figures only. At most
//! [`RECORDS_MAX`] are kept.

use std::path::PathBuf;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::model::Middle;
use crate::estimate::to_f64;
use crate::state_dir::{StateDir, replace_file};

/// Records that are kept.
const RECORDS_MAX: usize = 256;
/// Longest file that is read.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// Fewer teach nothing.
const TEACHING_MIN: usize = 3;
/// The latest so many are looked at.
const TEACHING_MAX: usize = 32;
/// No correction goes further than this, either way.
const FACTOR_MAX: f64 = 4.0;
/// How wide a range is without anything learned, and at least.
const SPREAD_START: f64 = 1.96;
const SPREAD_LEAST: f64 = 1.5;

/// One guest that was sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Move {
    /// Seconds since 1970.
    pub(crate) time_s: u64,
    pub(crate) vm: String,
    /// Fingerprint of the peer's key.
    pub(crate) peer: String,
    pub(crate) rate_bps: Option<u64>,
    pub(crate) rtt_min_ms: Option<f64>,
    pub(crate) pages_total: Option<u64>,
    pub(crate) wire_bytes: Option<u64>,
    pub(crate) total_ms: u64,
    pub(crate) downtime_ms: Option<u64>,
    /// What the model said before it, if it was asked.
    pub(crate) predicted: Option<Middle>,
}

/// By what the model's figures are multiplied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Learned {
    /// From how many moves.
    pub(crate) moves: usize,
    pub(crate) total: f64,
    pub(crate) downtime: f64,
    pub(crate) wire: f64,
    /// High end of a range by its low end.
    pub(crate) spread: f64,
}

impl Default for Learned {
    fn default() -> Self {
        Learned {
            moves: 0,
            total: 1.0,
            downtime: 1.0,
            wire: 1.0,
            spread: SPREAD_START,
        }
    }
}

fn path(state: &StateDir) -> anyhow::Result<PathBuf> {
    Ok(state.folder("history")?.join("moves.jsonl"))
}

/// All records, oldest first. A line that cannot be read is passed over.
pub(crate) fn load(state: &StateDir) -> anyhow::Result<Vec<Move>> {
    let path = path(state)?;
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => {
            let bytes = found.with_context(|| path.display().to_string())?.len();
            anyhow::ensure!(bytes <= FILE_MAX_BYTES, "{} is too long", path.display());
        }
    }
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let records = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    Ok(records.collect())
}

/// Adds one, and drops the oldest.
pub(crate) fn append(state: &StateDir, record: &Move) -> anyhow::Result<()> {
    // A file that cannot be read is begun anew: it only teaches.
    let mut records = load(state).unwrap_or_default();
    records.push(record.clone());
    let from = records.len().saturating_sub(RECORDS_MAX);
    let mut text = Vec::new();
    for record in &records[from..] {
        serde_json::to_writer(&mut text, record)?;
        text.push(b'\n');
    }
    replace_file(&path(state)?, &text)
}

/// An actual figure and the predicted one.
type Pair<'a> = &'a dyn Fn(&Move, &Middle) -> Option<(f64, f64)>;

/// Medians of actual by predicted, of the moves to this peer; of all where those are too few.
pub(crate) fn learn(records: &[Move], peer: &str) -> Learned {
    let teaching = |wanted: &dyn Fn(&Move) -> bool| -> Vec<(&Move, Middle)> {
        let found = records.iter().rev().filter(|record| wanted(record));
        let found = found.filter_map(|record| Some((record, record.predicted?)));
        found.take(TEACHING_MAX).collect()
    };
    let mut taught = teaching(&|record| record.peer == peer);
    if taught.len() < TEACHING_MIN {
        taught = teaching(&|_| true);
    }
    if taught.len() < TEACHING_MIN {
        return Learned::default();
    }
    let ratios = |of: Pair<'_>| -> Vec<f64> {
        let pairs = taught.iter().filter_map(|(record, said)| of(record, said));
        let mut ratios: Vec<f64> = pairs
            .filter(|(actual, said)| *actual > 0.0 && *said > 0.0)
            .map(|(actual, said)| actual / said)
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    };
    let total = ratios(&|record, said| Some((to_f64(record.total_ms), said.total_ms)));
    let downtime = ratios(&|record, said| Some((to_f64(record.downtime_ms?), said.downtime_ms)));
    let wire = ratios(&|record, said| Some((to_f64(record.wire_bytes?), said.wire_bytes)));
    Learned {
        moves: taught.len(),
        total: median(&total),
        downtime: median(&downtime),
        wire: median(&wire),
        spread: spread(&[&total, &downtime, &wire]),
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.get(sorted.len() / 2).copied().unwrap_or(1.0);
    middle.clamp(1.0 / FACTOR_MAX, FACTOR_MAX)
}

/// As narrow as nine of ten moves allow, once there are enough to say.
fn spread(all: &[&[f64]]) -> f64 {
    const ENOUGH: usize = 10;
    let of = |sorted: &&[f64]| {
        if sorted.len() < ENOUGH {
            return SPREAD_START;
        }
        let middle = median(sorted);
        let most = sorted[sorted.len() * 19 / 20].max(middle) / middle;
        let least = middle / sorted[sorted.len() / 20].min(middle);
        most.max(least).powi(2) * 1.1
    };
    let widest = all.iter().map(of).fold(SPREAD_LEAST, f64::max);
    widest.min(SPREAD_START)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::tests::Scratch;

    fn record(peer: &str, total_ms: u64, said_ms: Option<f64>) -> Move {
        Move {
            time_s: 1,
            vm: "vm".into(),
            peer: peer.into(),
            rate_bps: Some(100),
            rtt_min_ms: Some(50.0),
            pages_total: Some(1),
            wire_bytes: Some(1_000),
            total_ms,
            downtime_ms: Some(200),
            predicted: said_ms.map(|total_ms| Middle {
                total_ms,
                downtime_ms: 100.0,
                wire_bytes: 1_000.0,
            }),
        }
    }

    /// Three moves with a prediction teach, to this peer first; fewer, or without, do not.
    #[test]
    fn learns_from_three() {
        let mut records = vec![
            record("a", 300, Some(100.0)),
            record("a", 200, Some(100.0)),
            record("a", 900, None),
        ];
        assert_eq!(learn(&records, "a"), Learned::default());
        records.push(record("a", 150, Some(100.0)));
        let learned = learn(&records, "a");
        assert_eq!(
            (learned.moves, learned.total, learned.downtime),
            (3, 2.0, 2.0)
        );
        assert_eq!(
            learn(&records, "b").moves,
            3,
            "all moves, where none was to b"
        );
        records.extend((0..3).map(|_| record("b", 50, Some(100.0))));
        assert_eq!(learn(&records, "b").total, 0.5);
    }

    /// Many moves that agree narrow the ranges.
    #[test]
    fn narrows() {
        let agreeing: Vec<Move> = (0..20).map(|_| record("a", 110, Some(100.0))).collect();
        assert_eq!(learn(&agreeing, "a").spread, SPREAD_LEAST);
        let odd: Vec<Move> = (0..20)
            .map(|nth| record("a", 50 + nth * 20, Some(100.0)))
            .collect();
        assert_eq!(learn(&odd, "a").spread, SPREAD_START);
    }

    /// The file is bounded, private, and survives a torn line.
    #[test]
    fn the_file_is_bounded() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new("history");
        let state = StateDir::at(&scratch.0.join("state")).unwrap();
        assert_eq!(load(&state).unwrap(), []);
        for nth in 0..RECORDS_MAX as u64 + 3 {
            append(&state, &record("a", nth, None)).unwrap();
        }
        let records = load(&state).unwrap();
        assert_eq!((records.len(), records[0].total_ms), (RECORDS_MAX, 3));
        let path = path(&state).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{{torn\n{text}")).unwrap();
        assert_eq!(load(&state).unwrap().len(), RECORDS_MAX);
    }
}
