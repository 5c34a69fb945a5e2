//! A host of the lab: namespaces of its own, and programs started in them.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::clock;
use crate::netns::PRIVATE;

const START_LIMIT: Duration = Duration::from_secs(20);

/// Programs that [`Host::command`] passes through before the asked one.
const WRAPPERS: [&str; 3] = ["nsenter", "setpriv", "env"];

/// What a host is made of.
#[derive(Clone, Debug)]
pub(crate) struct HostSettings {
    /// The testbed's own program, which the holder runs.
    pub(crate) program: PathBuf,
    /// Host name.
    pub(crate) name: String,
    /// The machine's directory for its files; exists.
    pub(crate) private: PathBuf,
    /// The machine's directory that holds the files of all hosts.
    pub(crate) hidden: PathBuf,
    /// Directories below /tmp that it sees.
    pub(crate) visible: Vec<PathBuf>,
}

/// A running host. Everything in it is killed when this is dropped, or its process ends.
#[derive(Debug)]
pub struct Host {
    name: String,
    private: PathBuf,
    /// `unshare`, parent of the holder. Its standard input is the host's life.
    unshare: Child,
    holder: u32,
}

impl Host {
    pub(crate) fn start(settings: &HostSettings) -> anyhow::Result<Self> {
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--uts",
                "--net",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "private", "--"])
            .arg(&settings.program)
            .arg("__host")
            .args([OsStr::new("--name"), settings.name.as_ref()])
            .args([OsStr::new("--private"), settings.private.as_ref()])
            .args([OsStr::new("--hidden"), settings.hidden.as_ref()]);
        for dir in &settings.visible {
            command.args([OsStr::new("--visible"), dir.as_ref()]);
        }
        // Its own process group: a Ctrl-C on the terminal is for the lab alone.
        command.process_group(0).current_dir("/");
        let mut unshare = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("run unshare")?;
        if let Err(error) = wait_for_ready(&mut unshare) {
            stop(&mut unshare);
            return Err(error).with_context(|| format!("start host {}", settings.name));
        }
        let holder = only_child_of(unshare.id())?;
        let (name, private) = (settings.name.clone(), settings.private.clone());
        Ok(Self {
            name,
            private,
            unshare,
            holder,
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that runs `program` in this host, in its private directory, killed when its parent
    /// ends. The started process is `nsenter`, which passes on the exit status; the program itself
    /// is its child: see [`Host::spawn`] for its number.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder.to_string()])
            .args(["--mount", "--uts", "--net", "--pid", "--"])
            .args(["setpriv", "--pdeathsig", "KILL", "--"])
            .args(["env", "-C", PRIVATE])
            .arg(program);
        command
    }

    /// The same for a program that must be on time whatever the guests do: with real-time priority,
    /// and where that is refused as nice as allowed.
    #[must_use]
    pub fn prompt_command(&self, program: impl AsRef<OsStr>) -> Command {
        let on_time = "chrt --rr 10 true && exec chrt --rr 10 \"$@\"; exec nice -n -10 \"$@\"";
        let mut command = self.command("sh");
        command.args(["-c", on_time, "sh"]).arg(program);
        command
    }

    /// A command that runs `program` in this host's network only, with the machine's own files and
    /// process numbers: for tools that set the network up.
    #[must_use]
    pub fn network_command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder.to_string(), "--net", "--"])
            .arg(program);
        command
    }

    /// Starts a command made by [`Host::command`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> anyhow::Result<HostProcess> {
        let child = command
            .spawn()
            .with_context(|| format!("start a program in {}", self.name))?;
        Ok(HostProcess { child })
    }

    /// Runs a command to its end; its standard output.
    ///
    /// # Errors
    /// If it cannot be started or fails; the text has its standard error.
    pub fn output(&self, command: &mut Command) -> anyhow::Result<String> {
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start a program in {}", self.name))?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "{command:?} in {}: {}\n{}",
            self.name,
            output.status,
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    }

    /// Where this process finds a file of the host's private directory ([`PRIVATE`]). Other paths
    /// are the machine's, or lost in the host's own /run, /tmp and /dev/shm.
    #[must_use]
    pub fn outside(&self, inside: &Path) -> PathBuf {
        match inside.strip_prefix(PRIVATE) {
            Ok(below) => self.private.join(below),
            Err(_) => inside.to_owned(),
        }
    }

    /// Number of the process that holds its namespaces.
    #[must_use]
    pub fn holder(&self) -> u32 {
        self.holder
    }

    /// Number of the holder's parent, the last process of the host to end.
    pub(crate) fn last_process(&self) -> u32 {
        self.unshare.id()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        stop(&mut self.unshare);
    }
}

/// A program in a host.
#[derive(Debug)]
pub struct HostProcess {
    /// `nsenter`, with the program's pipes.
    child: Child,
}

impl HostProcess {
    /// The child with its pipes; its number is that of the wrapper.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The program's own process number, as this process sees it.
    ///
    /// # Errors
    /// If it has ended, or does not begin within 20 s.
    pub fn pid(&mut self) -> anyhow::Result<u32> {
        let wrapper = self.child.id();
        let child = &mut self.child;
        clock::wait_until("the program's start", START_LIMIT, || {
            if let Some(status) = child.try_wait()? {
                bail!("the program has ended: {status}");
            }
            let Ok(pid) = only_child_of(wrapper) else {
                return Ok(None);
            };
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let is_wrapper = name.is_empty() || WRAPPERS.contains(&name.trim_end());
            Ok((!is_wrapper).then_some(pid))
        })
    }

    /// Sends the program a signal.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid()?;
        let pid = Pid::from_raw(pid.try_into().context("a process number")?).context("not 0")?;
        kill_process(pid, signal).with_context(|| format!("send {signal:?}"))
    }

    /// Kills the program and waits for its end.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        // It may have ended by itself.
        drop(self.signal(Signal::KILL));
        self.child.wait().context("wait for the program's end")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        self.child.wait().context("wait for the program's end")
    }

    /// Has it ended, and how?
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn try_wait(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().context("look at the program")
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            drop(self.kill());
        }
    }
}

/// Waits for the line `ready`.
pub(crate) fn wait_for_ready(child: &mut Child) -> anyhow::Result<()> {
    let stdout = child.stdout.take().context("its output is not a pipe")?;
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("read its output")?;
    ensure!(line == "ready\n", "it did not become ready: {line:?}");
    Ok(())
}

/// Ends a holder by the end of its input.
fn stop(unshare: &mut Child) {
    drop(unshare.stdin.take());
    let ended = clock::wait_until("the host's end", START_LIMIT, || Ok(unshare.try_wait()?));
    if ended.is_err() {
        drop(unshare.kill());
        drop(unshare.wait());
    }
}

fn only_child_of(pid: u32) -> anyhow::Result<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let list = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let first = list.split_whitespace().next().context("it has no child")?;
    first
        .parse()
        .with_context(|| format!("{path} holds {list:?}"))
}
