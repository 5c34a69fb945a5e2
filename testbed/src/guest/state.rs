//! Saved states: one warmed-up guest, from which every run starts.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::image::{lock, short_key};
use super::{Files, Guest, Image, Machine, Monitor, Network, Past, Place};
use crate::clock;
use crate::progress::Progress;

const SAVE_MAX: Duration = Duration::from_secs(60);
/// How much zstd level 1 shrinks a redis guest that is like a real one.
const REDIS_RATIO: std::ops::RangeInclusive<f64> = 3.0..=3.5;
const PAGE_BYTES: usize = 4096;
const LOAD_MAX: Duration = Duration::from_secs(60);

/// A guest's RAM and devices in a file (QEMU's mapped-ram format, holes where pages are zero; where
/// QEMU is too old for that, a stream).
#[derive(Clone, Debug)]
pub struct State {
    file: PathBuf,
    key: String,
}

impl State {
    /// The state of such a machine after its start: from the cache, else the guest is booted and
    /// saved now.
    ///
    /// # Errors
    /// When the guest does not boot or QEMU cannot save it.
    pub fn ready(image: &Image, machine: &Machine, progress: &Progress) -> anyhow::Result<Self> {
        Self::after(image, machine, &Past::default(), progress)
    }

    /// The state of such a machine with such a past. A stay goes on from the state before it, which
    /// is a state by itself: the one in which the guest left the cloud.
    ///
    /// # Errors
    /// As [`State::ready`], or when a command of its past fails in the guest.
    pub fn after(
        image: &Image,
        machine: &Machine,
        past: &Past,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let before = match past.stay {
            Some(_) => Some(Self::after(image, machine, &past.before_stay(), progress)?),
            None => None,
        };
        // RAM of either sort loads from the same state.
        let same = Machine {
            ram: Default::default(),
            ..machine.clone()
        };
        let key = short_key(&(same, past));
        let file = image.folder().join(format!("state-{key}.ram"));
        let _lock = lock(image.folder(), "state.lock")?;
        if !file.exists() {
            let work = image.folder().join(format!("state-{key}.work"));
            let lived = match &before {
                Some(before) => before.live_on(image, machine, past, &work, progress),
                None => start(image, machine, past, &work, progress),
            };
            let saved = lived.and_then(|guest| save(guest, machine, &file));
            fs::remove_dir_all(&work).ok();
            saved?;
        }
        Ok(Self { file, key })
    }

    /// The file, never written again.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Names the machine and the past that it belongs to.
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
        let guest = Self::restore_paused(file, place, files, machine, network, folder)?;
        // A state of a stopped guest stays paused after loading.
        guest.monitor().execute("cont", &json!({}))?;
        Ok(guest)
    }

    /// The same, but the guest does not run yet.
    ///
    /// # Errors
    /// As [`State::restore`].
    pub fn restore_paused(
        file: &Path,
        place: Place<'_>,
        files: &Files,
        machine: &Machine,
        network: &Network,
        folder: &Path,
    ) -> anyhow::Result<Guest> {
        let guest = Guest::incoming(place, files, machine, network, folder)?;
        let monitor = guest.monitor();
        let mapped = has_mapped_ram(monitor)?;
        let uri = if mapped {
            monitor.set_capabilities(&[("mapped-ram", true)])?;
            format!("file:{}", file.display())
        } else {
            format!("exec:cat '{}'", file.display())
        };
        monitor.execute("migrate-incoming", &json!({ "uri": uri }))?;
        clock::wait_until("loading the saved state", LOAD_MAX, || {
            Ok((monitor.run_state()? != "inmigrate").then_some(()))
        })?;
        if mapped {
            // With it on, QEMU refuses to migrate to anything but a file.
            monitor.set_capabilities(&[("mapped-ram", false)])?;
        }
        Ok(guest)
    }

    fn live_on(
        &self,
        image: &Image,
        machine: &Machine,
        past: &Past,
        work: &Path,
        progress: &Progress,
    ) -> anyhow::Result<Guest> {
        let stay = past.stay.as_ref().context("there is no stay")?;
        progress.step(&format!("the guest's stay, {} s, once", stay.seconds));
        let (files, network) = (image.into(), Network::Nothing);
        let guest = Self::restore(&self.file, Place::Here, &files, machine, &network, work)?;
        stay.live(&guest.control()?)?;
        Ok(guest)
    }
}

fn start(
    image: &Image,
    machine: &Machine,
    past: &Past,
    work: &Path,
    progress: &Progress,
) -> anyhow::Result<Guest> {
    progress.step("booting the guest once and saving its state");
    let guest = Guest::boot(Place::Here, image, machine, work)?;
    guest.wait_ready()?;
    past.warm_up(&guest.control()?)?;
    Ok(guest)
}

fn save(guest: Guest, machine: &Machine, file: &Path) -> anyhow::Result<()> {
    let monitor = guest.monitor();
    monitor.execute("stop", &json!({}))?;
    let mapped = has_mapped_ram(monitor)?;
    if mapped {
        monitor.set_capabilities(&[("mapped-ram", true)])?;
    }
    monitor.execute(
        "migrate-set-parameters",
        &json!({ "max-bandwidth": 1_u64 << 40 }),
    )?;
    let part = file.with_extension("part");
    let uri = match mapped {
        true => format!("file:{}", part.display()),
        false => format!("exec:cat > '{}'", part.display()),
    };
    monitor.execute("migrate", &json!({ "uri": uri }))?;
    clock::wait_until("saving the guest", SAVE_MAX, || {
        let status = monitor.migration_status()?;
        anyhow::ensure!(status != "failed", "QEMU could not save the guest");
        Ok((status == "completed").then_some(()))
    })?;
    guest.quit();
    if machine.redis.is_some() {
        let ratio = zstd_ratio(&part)?;
        ensure!(
            REDIS_RATIO.contains(&ratio),
            "zstd -1 shrinks the redis guest {ratio:.2} times, which is not like text"
        );
    }
    fs::rename(&part, file).context("cannot put the state in its place")
}

/// Since QEMU 9.0.
fn has_mapped_ram(monitor: &Monitor) -> anyhow::Result<bool> {
    let list = monitor.execute("query-migrate-capabilities", &json!({}))?;
    let has = |name: &Value| name["capability"] == "mapped-ram";
    Ok(list.as_array().is_some_and(|list| list.iter().any(has)))
}

/// How many times zstd level 1 shrinks the pages that are not zero.
fn zstd_ratio(file: &Path) -> anyhow::Result<f64> {
    let mut zstd = Command::new("zstd")
        .args(["-1", "-q", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run zstd")?;
    let mut input = zstd.stdin.take().context("zstd has no input")?;
    let mut output = zstd.stdout.take().context("zstd has no output")?;
    let counter = std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    let mut state = File::open(file)?;
    let mut page = vec![0; PAGE_BYTES];
    let mut whole: u64 = 0;
    // The file ends with a part of a page at most, which does not matter here.
    while state.read_exact(&mut page).is_ok() {
        if page.iter().any(|byte| *byte != 0) {
            input.write_all(&page)?;
            whole += 4096;
        }
    }
    drop(input);
    let packed = counter.join().ok().context("reading from zstd failed")??;
    ensure!(zstd.wait()?.success() && packed > 0, "zstd failed");
    let kibibytes = |bytes: u64| u32::try_from(bytes >> 10).map_or(f64::INFINITY, f64::from);
    Ok(kibibytes(whole) / kibibytes(packed))
}
