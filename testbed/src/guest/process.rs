//! One QEMU process and its guest.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;

use super::Image;
use super::control::Control;
use super::machine::{Files, Machine, Network};
use super::place::Place;
use super::qmp::Monitor;
use crate::clock;

const BOOT_MAX: Duration = Duration::from_secs(60);
const QUIT_MAX: Duration = Duration::from_secs(3);

/// A QEMU that the lab started. It is killed when this is dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    monitor: Monitor,
    /// The folder of its sockets and logs as this process sees it.
    folder: PathBuf,
    /// The same folder as its own host sees it.
    inner: PathBuf,
    network: Network,
}

impl Guest {
    /// Starts a guest from power-on, without a network; its files are in `folder`.
    ///
    /// # Errors
    /// When QEMU does not start; the text has the end of its log.
    pub fn boot(
        place: Place<'_>,
        image: &Image,
        machine: &Machine,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        Self::start(
            place,
            &image.into(),
            machine,
            &Network::Nothing,
            folder,
            &[],
        )
    }

    /// Starts a QEMU that waits for a migration (`-incoming defer`).
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn incoming(
        place: Place<'_>,
        files: &Files,
        machine: &Machine,
        network: &Network,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        Self::start(
            place,
            files,
            machine,
            network,
            folder,
            &["-incoming", "defer"],
        )
    }

    /// Starts a QEMU with more arguments.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn start(
        place: Place<'_>,
        files: &Files,
        machine: &Machine,
        network: &Network,
        folder: &Path,
        more: &[&str],
    ) -> anyhow::Result<Self> {
        let mut arguments = machine.arguments(files, network, folder);
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        Self::of_arguments(place, &machine.qemu, &arguments, network, folder)
    }

    /// Starts a QEMU of any sort. Its monitors must be `lab.sock` and `product.sock` in `folder`.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn of_arguments(
        place: Place<'_>,
        qemu: &Path,
        arguments: &[String],
        network: &Network,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let outside = place.outside(folder);
        fs::create_dir_all(&outside)
            .with_context(|| format!("cannot make {}", outside.display()))?;
        for name in ["lab.sock", "product.sock", "control.sock", "console.log"] {
            // From an earlier guest in the same folder.
            fs::remove_file(outside.join(name)).ok();
        }
        let log = File::create(outside.join("qemu.log"))?;
        let mut child = place
            .command(qemu)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", qemu.display()))?;
        match Monitor::connect(&outside.join("lab.sock")) {
            Ok(monitor) => {
                let (inner, network) = (folder.to_owned(), network.clone());
                Ok(Self {
                    child,
                    monitor,
                    folder: outside,
                    inner,
                    network,
                })
            }
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                let log = fs::read_to_string(outside.join("qemu.log")).unwrap_or_default();
                bail!("QEMU did not start: {error}\n{log}");
            }
        }
    }

    /// Waits until the program inside has filled its memory and serves.
    ///
    /// # Errors
    /// When it does not within a minute; the text has the console.
    pub fn wait_ready(&self) -> anyhow::Result<()> {
        let console = self.folder.join("console.log");
        let read = || fs::read_to_string(&console).unwrap_or_default();
        clock::wait_until("the guest's start", BOOT_MAX, || {
            Ok(read().contains("LAB READY").then_some(()))
        })
        .with_context(|| format!("its console says:\n{}", read()))
    }

    /// The lab's own monitor.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Path of the monitor for the program under test, as the guest's host sees it.
    pub fn product_monitor(&self) -> PathBuf {
        self.inner.join("product.sock")
    }

    /// Folder of its sockets and logs, as this process sees it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What its card is plugged into.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// QEMU's process, in this process's numbering.
    pub fn pid(&self) -> i32 {
        self.monitor.pid()
    }

    /// Opens the guest's serial line; one at a time.
    ///
    /// # Errors
    /// As [`Control::connect`].
    pub fn control(&self) -> anyhow::Result<Control> {
        Control::connect(&self.folder.join("control.sock"))
    }

    /// Whether the virtual CPUs run.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn is_running(&self) -> anyhow::Result<bool> {
        Ok(self.monitor.run_state()? == "running")
    }

    /// Whether QEMU still lives.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for QEMU to end by itself; its exit code, or 128 and the signal.
    ///
    /// # Errors
    /// When it still lives after the limit.
    pub fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<i32> {
        let child = &mut self.child;
        let status = clock::wait_until("QEMU's end", limit, || Ok(child.try_wait()?))?;
        Ok(status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    /// Ends QEMU now.
    pub fn quit(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if !self.is_alive() {
            return;
        }
        if self.monitor.execute("quit", &json!({})).is_ok() && self.wait_exit(QUIT_MAX).is_ok() {
            return;
        }
        // The child may be a wrapper that entered a namespace: QEMU itself is killed by its id.
        if let Some(pid) = rustix::process::Pid::from_raw(self.monitor.pid()) {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}
