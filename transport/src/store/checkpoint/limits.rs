//! How much and how long.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::store::whole_file;

const FILE: &str = "limits.json";
/// Guests that come back after a month have changed in most places.
const AGE_DEFAULT_S: u64 = 30 * 24 * 3600;
/// Share of free space that checkpoints may take unless it is set: enough for some guests, and the
/// disk stays usable.
const SHARE_DEFAULT: u64 = 4;

/// Budget and age limit of all checkpoints of a state dir.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes on disk of all checkpoints; without: a quarter of what is free or held by them.
    pub bytes_max: Option<u64>,
    /// Seconds without use after which a checkpoint goes; 30 days unless it is set.
    pub age_max_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes_max: None,
            age_max_s: AGE_DEFAULT_S,
        }
    }
}

impl Limits {
    /// Reads them; the defaults where there is no file or none that makes sense.
    pub(super) fn load(checkpoints: &Path) -> Self {
        let Ok(text) = fs::read(checkpoints.join(FILE)) else {
            return Self::default();
        };
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, "limits of checkpoints cannot be read; the defaults count");
            Self::default()
        })
    }

    pub(super) fn save(&self, checkpoints: &Path) -> io::Result<()> {
        whole_file::replace(&checkpoints.join(FILE), &serde_json::to_vec_pretty(self)?)
    }

    /// Bytes that checkpoints may take when they take `held` bytes.
    pub(super) fn budget(&self, checkpoints: &Path, held: u64) -> io::Result<u64> {
        if let Some(bytes) = self.bytes_max {
            return Ok(bytes);
        }
        let found = match rustix::fs::statvfs(checkpoints) {
            // None was ever kept: what counts is the disk of the state dir.
            Err(rustix::io::Errno::NOENT) => {
                let state_dir = checkpoints.parent().ok_or(io::ErrorKind::NotFound)?;
                rustix::fs::statvfs(state_dir)?
            }
            found => found?,
        };
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        Ok(free.saturating_add(held) / SHARE_DEFAULT)
    }
}
