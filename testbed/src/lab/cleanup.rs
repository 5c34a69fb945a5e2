//! The process that cleans up after a run (`testbed __cleanup`).
//!
//! It outlives the lab's process by a moment: when its input ends it waits for the hosts to be gone,
//! kills what is not, and removes the run's directory. It takes the lines `wait PID` and `keep`.

use std::fs::{self, File};
use std::io::{BufRead, stdin};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use super::run_dir::{self, RunDir};
use super::tell;
use crate::clock;

const PATIENCE: Duration = Duration::from_secs(10);

/// The lab's end of it.
#[derive(Debug)]
pub(super) struct Cleanup {
    child: Child,
}

impl Cleanup {
    pub(super) fn start(program: &Path, run: &RunDir) -> anyhow::Result<Self> {
        let child = Command::new(program)
            .arg("__cleanup")
            .arg(run.path())
            .stdin(Stdio::piped())
            // Never written to: an open file that keeps the run's lock until the clean-up is done.
            .stdout(run.share_lock()?)
            .current_dir("/")
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { child })
    }

    /// A process that must have ended before files are removed.
    pub(super) fn wait_for(&mut self, pid: u32) -> anyhow::Result<()> {
        tell(&mut self.child, &format!("wait {pid}"))
    }

    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        tell(&mut self.child, "keep")
    }
}

impl Drop for Cleanup {
    /// Waits until all is gone, so that a lab that has ended has really ended.
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        drop(self.child.wait());
    }
}

/// Cleans up after the run in `run` once standard input ends.
///
/// # Errors
/// If a process cannot be killed or a file not be removed.
pub fn run(run: &Path) -> anyhow::Result<()> {
    let mut last_processes = Vec::new();
    for line in stdin().lock().lines() {
        let line = line.context("read stdin")?;
        match line.split_once(' ') {
            Some(("wait", pid)) => last_processes.push(Process::of(pid.parse()?)),
            _ if line == "keep" => drop(File::create(run.join(run_dir::KEPT))?),
            _ => anyhow::bail!("not a line for the clean-up: {line:?}"),
        }
    }
    for process in &last_processes {
        process.wait_or_kill()?;
    }
    run_dir::remove(run)?;
    run_dir::leave(&run_dir::base(), run)
}

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Debug)]
struct Process {
    pid: i32,
    started: Option<String>,
}

impl Process {
    fn of(pid: i32) -> Self {
        Self {
            pid,
            started: start_time(pid),
        }
    }

    fn is_alive(&self) -> bool {
        self.started.is_some() && start_time(self.pid) == self.started
    }

    fn wait_or_kill(&self) -> anyhow::Result<()> {
        let gone = || Ok((!self.is_alive()).then_some(()));
        if clock::wait_until("a host's end", PATIENCE, gone).is_err() {
            let pid = Pid::from_raw(self.pid).context("process number 0")?;
            kill_process(pid, Signal::KILL).ok();
            clock::wait_until("a killed host's end", PATIENCE, gone)?;
        }
        Ok(())
    }
}

/// Start time of a process that has not ended, in the kernel's own unit.
fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name that may hold anything, in parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?;
    (state != "Z").then(|| started.to_owned())
}
