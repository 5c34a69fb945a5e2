//! The folder of one call of `testbed run`: one folder for each scenario, and in it a file for each
//! finished run, so that a broken call can be resumed, the logs of each, and the whole document.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Document, MigrationRun};
use crate::arm::Arm;
use crate::clock;

/// A results folder.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// A new one beside the lab's own program, for scenarios of these names.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(scenarios: &[String]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where is this program?")?;
        let target = program.ancestors().nth(2).unwrap_or(Path::new("."));
        let seconds = clock::epoch_us() / 1_000_000;
        let name = match scenarios {
            [one] => one.replace('/', "-"),
            _ => "matrix".to_owned(),
        };
        Self::open(&target.join("lab").join(format!("{name}-{seconds}")))
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

    /// The part of one scenario, made if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn part(&self, scenario: &str) -> anyhow::Result<Self> {
        Self::open(&self.path.join(scenario.replace('/', "-")))
    }

    /// Folders of scenarios below this one, or this one itself if it is one of a scenario: those
    /// that hold a document, by name.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn parts(&self) -> anyhow::Result<Vec<Self>> {
        if self.document_path().exists() {
            return Ok(vec![self.clone()]);
        }
        let entries = fs::read_dir(&self.path)
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        let mut found: Vec<Self> = entries
            .flatten()
            .map(|entry| Self { path: entry.path() })
            .filter(|part| part.document_path().exists())
            .collect();
        found.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(found)
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

    /// Runs of a migration that were finished before, of arms that are not among these.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn others(&self, arms: &[Arm]) -> anyhow::Result<Vec<MigrationRun>> {
        let arms: Vec<String> = arms.iter().map(ToString::to_string).collect();
        let mut found: Vec<MigrationRun> = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let named = name
                .strip_prefix("run-")
                .map(|rest| rest.trim_end_matches(".json"));
            let Some((arm, repeat)) = named.and_then(|rest| rest.rsplit_once('-')) else {
                continue;
            };
            if let (false, Ok(repeat)) = (arms.iter().any(|asked| asked == arm), repeat.parse()) {
                found.extend(self.kept::<MigrationRun>(arm, repeat));
            }
        }
        found.sort_by(|one, other| (one.repeat, &one.arm).cmp(&(other.repeat, &other.arm)));
        Ok(found)
    }

    /// Writes the whole document.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish<R: Serialize>(&self, document: &Document<R>) -> anyhow::Result<()> {
        write(&self.document_path(), document)
    }

    fn document_path(&self) -> PathBuf {
        self.path.join("report.json")
    }

    /// The whole document.
    ///
    /// # Errors
    /// When there is none.
    pub fn document<R: DeserializeOwned>(&self) -> anyhow::Result<Document<R>> {
        let path = self.document_path();
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
