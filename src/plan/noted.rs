//! The latest prediction for a VM and a peer: a `send` soon after it has it in its report.
//!
//! `STATE_DIR/plans/VM@KEY.json`, mode 0600.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use transport::quic::Fingerprint;

use super::model::{Middle, Prediction, Range};
use crate::journal::safe_name;
use crate::state_dir::{StateDir, replace_file};

/// A prediction says nothing of a guest and a link much later.
const VALID_S: u64 = 600;
/// Longest file that is read.
const FILE_MAX_BYTES: u64 = 64 << 10;

/// What a report says beside the actual figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Predicted {
    pub(crate) total_ms: Range,
    pub(crate) downtime_ms: Range,
    pub(crate) wire_bytes: Range,
}

/// The file's content.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Noted {
    /// Seconds since 1970.
    pub(crate) time_s: u64,
    pub(crate) predicted: Predicted,
    pub(crate) middle: Middle,
}

fn path(state: &StateDir, vm: &str, peer: Fingerprint) -> anyhow::Result<PathBuf> {
    let name = format!("{}@{}.json", safe_name(vm), peer.to_hex());
    Ok(state.folder("plans")?.join(name))
}

/// Keeps it.
pub(crate) fn keep(
    state: &StateDir,
    vm: &str,
    peer: Fingerprint,
    prediction: &Prediction,
    time_s: u64,
) -> anyhow::Result<()> {
    let noted = Noted {
        time_s,
        predicted: Predicted {
            total_ms: prediction.total_ms,
            downtime_ms: prediction.downtime_ms,
            wire_bytes: prediction.wire_bytes,
        },
        middle: prediction.middle,
    };
    replace_file(&path(state, vm, peer)?, &serde_json::to_vec_pretty(&noted)?)
}

/// The one of a short time ago, if there is one.
pub(crate) fn recall(state: &StateDir, vm: &str, peer: Fingerprint, time_s: u64) -> Option<Noted> {
    let path = path(state, vm, peer).ok()?;
    if std::fs::metadata(&path).ok()?.len() > FILE_MAX_BYTES {
        return None;
    }
    let noted: Noted = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
    let age_s = time_s.checked_sub(noted.time_s)?;
    (age_s <= VALID_S).then_some(noted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ending::Ending;
    use crate::plan::model::Converges;
    use crate::state_dir::tests::Scratch;

    /// What was noted is found for ten minutes, for that VM and peer alone.
    #[test]
    fn found_for_ten_minutes() {
        let scratch = Scratch::new("noted");
        let state = StateDir::at(&scratch.0.join("state")).unwrap();
        let peer = state.identity().unwrap().fingerprint();
        let range = Range { low: 1, high: 2 };
        let prediction = Prediction {
            total_ms: range,
            downtime_ms: range,
            wire_bytes: range,
            converges: Converges::Yes,
            ends: Ending::Arrives,
            throttle_percent: 0,
            rounds: 1,
            downtime_needed_ms: Some(1),
            middle: Middle {
                total_ms: 1.5,
                downtime_ms: 1.5,
                wire_bytes: 1.5,
            },
        };
        keep(&state, "vm/1", peer, &prediction, 1_000).unwrap();
        let found = recall(&state, "vm/1", peer, 1_600).unwrap();
        assert_eq!(found.predicted.total_ms, range);
        assert_eq!(recall(&state, "vm/1", peer, 1_601), None);
        assert_eq!(recall(&state, "vm/1", peer, 999), None);
        assert_eq!(recall(&state, "vm/2", peer, 1_000), None);
    }
}
