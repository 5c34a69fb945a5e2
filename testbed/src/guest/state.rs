//! Saved states: one warmed-up guest, from which every run starts.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use super::image::{lock, short_key};
use super::{Files, Guest, Image, Machine, Network, Place};
use crate::clock;
use crate::progress::Progress;

/// Time in which the guest settles after its start and its first fill.
const WARM_UP: Duration = Duration::from_secs(3);
const SAVE_MAX: Duration = Duration::from_secs(60);
const LOAD_MAX: Duration = Duration::from_secs(60);

/// A guest's RAM and devices in a file (QEMU's mapped-ram format, holes where pages are zero).
#[derive(Clone, Debug)]
pub struct State {
    file: PathBuf,
    key: String,
}

impl State {
    /// The state of such a machine: from the cache, else the guest is booted and saved now.
    ///
    /// # Errors
    /// When the guest does not boot or QEMU cannot save it.
    pub fn ready(image: &Image, machine: &Machine, progress: &Progress) -> anyhow::Result<Self> {
        // RAM of either sort loads from the same state.
        let key = short_key(&Machine {
            ram: Default::default(),
            ..machine.clone()
        });
        let file = image.folder().join(format!("state-{key}.ram"));
        let _lock = lock(image.folder(), "state.lock")?;
        if !file.exists() {
            progress.step("booting the guest once and saving its state");
            let work = image.folder().join(format!("state-{key}.work"));
            let saved = save(image, machine, &work, &file);
            fs::remove_dir_all(&work).ok();
            saved?;
        }
        Ok(Self { file, key })
    }

    /// The file, never written again.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Names the machine it belongs to.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Starts the guest from this state; it runs when this returns. `file` is the state as the
    /// guest's host sees it.
    ///
    /// # Errors
    /// When QEMU does not start or refuses the state.
    pub fn restore(
        file: &Path,
        place: Place<'_>,
        files: &Files,
        machine: &Machine,
        network: &Network,
        folder: &Path,
    ) -> anyhow::Result<Guest> {
        let guest = Guest::incoming(place, files, machine, network, folder)?;
        let monitor = guest.monitor();
        monitor.set_capabilities(&[("mapped-ram", true)])?;
        monitor.execute(
            "migrate-incoming",
            &json!({ "uri": format!("file:{}", file.display()) }),
        )?;
        clock::wait_until("loading the saved state", LOAD_MAX, || {
            Ok((monitor.run_state()? != "inmigrate").then_some(()))
        })?;
        // With it on, QEMU refuses to migrate to anything but a file.
        monitor.set_capabilities(&[("mapped-ram", false)])?;
        // A state of a stopped guest stays paused after loading.
        monitor.execute("cont", &json!({}))?;
        Ok(guest)
    }
}

fn save(image: &Image, machine: &Machine, work: &Path, file: &Path) -> anyhow::Result<()> {
    let guest = Guest::boot(Place::Here, image, machine, work)?;
    guest.wait_ready()?;
    clock::pause(WARM_UP);
    let monitor = guest.monitor();
    monitor.execute("stop", &json!({}))?;
    monitor.set_capabilities(&[("mapped-ram", true)])?;
    monitor.execute(
        "migrate-set-parameters",
        &json!({ "max-bandwidth": 1_u64 << 40 }),
    )?;
    let part = file.with_extension("part");
    monitor.execute(
        "migrate",
        &json!({ "uri": format!("file:{}", part.display()) }),
    )?;
    clock::wait_until("saving the guest", SAVE_MAX, || {
        let status = monitor.migration_status()?;
        anyhow::ensure!(status != "failed", "QEMU could not save the guest");
        Ok((status == "completed").then_some(()))
    })?;
    guest.quit();
    fs::rename(&part, file).context("cannot put the state in its place")
}
