//! The folder of one call of `testbed run`: a file per finished run, so that a broken call can be
//! resumed, the logs of each, and the whole document.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Document;
use crate::clock;

/// A results folder.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// A new one beside the lab's own program, named after scenario and time.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(scenario: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where is this program?")?;
        let target = program.ancestors().nth(2).unwrap_or(Path::new("."));
        let seconds = clock::epoch_us() / 1_000_000;
        Self::open(
            &target
                .join("lab")
                .join(format!("{}-{seconds}", scenario.replace('/', "-"))),
        )
    }

    /// One that is there already, or is made.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a run's logs go.
    pub fn logs(&self, arm: &str, repeat: u32) -> PathBuf {
        self.path.join(format!("{arm}-{repeat}"))
    }

    /// Keeps a finished run.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep<R: Serialize>(&self, arm: &str, repeat: u32, run: &R) -> anyhow::Result<()> {
        write(&self.path.join(format!("run-{arm}-{repeat}.json")), run)
    }

    /// A run that was finished before; `None` if it was not.
    pub fn kept<R: DeserializeOwned>(&self, arm: &str, repeat: u32) -> Option<R> {
        let text = fs::read(self.path.join(format!("run-{arm}-{repeat}.json"))).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Writes the whole document; the path of it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish<R: Serialize>(&self, document: &Document<R>) -> anyhow::Result<PathBuf> {
        let path = self.path.join("report.json");
        write(&path, document)?;
        Ok(path)
    }

    /// The whole document.
    ///
    /// # Errors
    /// When there is none.
    pub fn document<R: DeserializeOwned>(&self) -> anyhow::Result<Document<R>> {
        let path = self.path.join("report.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is broken", path.display()))
    }
}

/// Writes beside and renames: a file that is there is whole.
pub(crate) fn write<R: Serialize>(path: &Path, value: &R) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    let text = serde_json::to_vec_pretty(value)?;
    fs::write(&part, text)
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
