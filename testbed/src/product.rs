//! The program under test: where it is, and its two roles, run as a black box.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::clock;
use crate::guest::Place;

/// Start of `receive`, which is not asked to do anything slow.
const LISTEN_MAX: Duration = Duration::from_secs(10);

/// The program: `$SCALEAWAY`, else beside this program (a test's is one folder deeper).
///
/// # Errors
/// When it has not been built; the text says how to.
pub fn program() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("SCALEAWAY") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("where is this program?")?;
    let beside = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("scaleaway"));
    beside
        .into_iter()
        .find(|path| path.is_file())
        .context("the program `scaleaway` is not built: cargo build --bin scaleaway")
}

/// One end's installation: a state directory and who it trusts.
#[derive(Clone, Debug)]
pub struct Product<'a> {
    place: Place<'a>,
    program: PathBuf,
    /// As its place sees it.
    state_dir: PathBuf,
}

impl<'a> Product<'a> {
    /// An installation with its state in a folder of its own.
    pub fn new(place: Place<'a>, program: &Path, state_dir: &Path) -> Self {
        Self {
            place,
            program: program.to_owned(),
            state_dir: state_dir.to_owned(),
        }
    }

    /// A command: verb and state directory are there, the rest is the caller's.
    pub fn command(&self, verb: &[&str]) -> Command {
        let mut command = self.place.command(&self.program);
        command.args(verb).arg("--state-dir").arg(&self.state_dir);
        command
    }

    /// Its fingerprint; the identity is made on first use.
    ///
    /// # Errors
    /// When the program fails.
    pub fn fingerprint(&self) -> anyhow::Result<String> {
        let line = output(&mut self.command(&["identity"]))?;
        let word = line
            .split_whitespace()
            .last()
            .context("`identity` printed nothing")?;
        ensure!(word.starts_with("SHA256:"), "`identity` printed {line:?}");
        Ok(word.to_owned())
    }

    /// Trusts a peer under a name.
    ///
    /// # Errors
    /// When the program fails.
    pub fn trust(&self, name: &str, fingerprint: &str) -> anyhow::Result<()> {
        output(&mut self.command(&["trust", "add", name, fingerprint])).map(drop)
    }

    /// Lets a peer be told of what stands on a disk image, as the product's host sees it.
    ///
    /// # Errors
    /// When the program fails.
    pub fn share_content(&self, image: &Path, peer: &str) -> anyhow::Result<()> {
        let mut command = self.command(&["content", "add"]);
        output(command.arg(image).args(["--peer", peer])).map(drop)
    }

    /// `status --json`: one object per VM that it knows.
    ///
    /// # Errors
    /// When the program fails or prints no JSON.
    pub fn status(&self) -> anyhow::Result<Value> {
        let output = self
            .command(&["status", "--json"])
            .output()
            .context("cannot run `status`")?;
        // 3 says that something is unsettled.
        ensure!(
            matches!(output.status.code(), Some(0 | 3)),
            "`status`: {}",
            output.status
        );
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "`status` printed {:?}",
                String::from_utf8_lossy(&output.stdout)
            )
        })
    }

    /// Starts `receive` or `send` with its output in `log` (as this process sees it).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, verb: &str, arguments: &[String], log: &Path) -> anyhow::Result<Running> {
        self.start_with(verb, arguments, &[], log)
    }

    /// The same for any verb, with words for its environment.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with(
        &self,
        verb: &str,
        arguments: &[String],
        environment: &[(&str, &str)],
        log: &Path,
    ) -> anyhow::Result<Running> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = self
            .command(&[verb])
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        Ok(Running {
            verb: verb.to_owned(),
            child,
            log: log.to_owned(),
        })
    }
}

/// Makes two installations trust each other as `cloud` and `client`.
///
/// # Errors
/// When the program fails.
pub fn introduce(cloud: &Product<'_>, client: &Product<'_>) -> anyhow::Result<()> {
    cloud.trust("client", &client.fingerprint()?)?;
    client.trust("cloud", &cloud.fingerprint()?)
}

/// A `send` or `receive` that was started. It is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    verb: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// What it has printed.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until `receive` says that it listens.
    ///
    /// # Errors
    /// When it ends before, or does not within 10 s.
    pub fn wait_listening(&mut self) -> anyhow::Result<()> {
        clock::wait_until("the start of `receive`", LISTEN_MAX, || {
            if self.output().contains("listening on") {
                return Ok(Some(()));
            }
            match self.exit_code()? {
                None => Ok(None),
                Some(code) => bail!("`receive` ended with {code}:\n{}", self.output()),
            }
        })
    }

    /// Its exit code if it has ended; -1 if it was killed.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn exit_code(&mut self) -> anyhow::Result<Option<i32>> {
        Ok(self
            .child
            .try_wait()?
            .map(|status| status.code().unwrap_or(-1)))
    }

    /// Waits for its end and returns the exit code.
    ///
    /// # Errors
    /// When it still runs after the limit; the text has what it printed.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<i32> {
        let what = format!("the end of `{}`", self.verb);
        clock::wait_until(&what, limit, || self.exit_code())
            .with_context(|| format!("it printed:\n{}", self.output()))
    }

    /// The process that was started: the program itself, or the wrapper that entered its host.
    pub fn wrapper_pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // In a host the wrapper's child is the program; it dies with its parent too, but later.
            if let Some(pid) = only_child(self.child.id()) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
            self.child.kill().ok();
        }
        self.child.wait().ok();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn only_child(pid: u32) -> Option<rustix::process::Pid> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    let first: i32 = list.split_whitespace().next()?.parse().ok()?;
    rustix::process::Pid::from_raw(first)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{errors}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
