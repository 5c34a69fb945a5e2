//! One lab run: three hosts, the link between them, and its end.
//!
//! ```text
//!   cloud 10.70.0.1 --+
//!                     +-- site bridge -- emulated link -- client 10.70.0.2
//!   user  10.70.0.3 --+
//! ```
//!
//! The site bridge and the emulator are in a fourth host, `wan`. Cloud and user are neighbours;
//! both reach the client over the emulated link. A run owns a directory with the files of its hosts;
//! a small process of its own (`cleanup`) removes it when the lab's process is gone, whatever ended
//! it, and every start removes what runs left that lost even that process.
//!
//! Reading order: this file, `run_dir`, `cleanup`, `sysctl`; beside it `netns` and `host`.

mod cleanup;
mod run_dir;
mod sysctl;
mod underlay;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;
use testbed_link::LinkParams;

pub use cleanup::run as clean_up_after;
pub use sysctl::set_congestion_control;
pub use underlay::{
    CLIENT_ADDRESS, CLIENT_ADDRESS_2, CLIENT_TUNNEL, CLOUD_ADDRESS, CLOUD_TUNNEL, UNDERLAY_DEVICE,
    USER_ADDRESS, USER_TUNNEL,
};

pub(crate) use underlay::ip;
pub use underlay::wait_for_ports;

use crate::host::{Host, HostProcess, HostSettings, wait_for_ready};
use crate::netns::PRIVATE;
use crate::wan::{LinkJson, Wan};
use cleanup::Cleanup;
use run_dir::RunDir;

/// What a lab is started with.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// The testbed's program (a test names it with `env!("CARGO_BIN_EXE_testbed")`).
    pub program: PathBuf,
    /// Directories below /tmp that every host must see: of programs and images. That of `program`
    /// is always seen, and so is all outside of /tmp, /run and /dev/shm.
    pub visible: Vec<PathBuf>,
    /// Parameters of both directions of the link.
    pub link: LinkParams,
    /// Seed of the link's chance.
    pub seed: u64,
}

impl LabOptions {
    /// A lab run by this process's own program over `link`, seed 1.
    ///
    /// # Errors
    /// If the program's path is unknown.
    pub fn new(link: LinkParams) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        Ok(Self {
            program,
            visible: Vec::new(),
            link,
            seed: 1,
        })
    }
}

/// A running lab. Dropping it ends every process in it and removes its files.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they must end.
    /// Its end frees the network of the link.
    emulator: HostProcess,
    /// Where the guest starts.
    pub cloud: Host,
    /// Where it goes, over the link.
    pub client: Host,
    /// Who uses it; beside cloud.
    pub user: Host,
    middle: Host,
    /// The link between cloud and client.
    pub wan: Wan,
    cleanup: Cleanup,
    dir: RunDir,
}

impl Lab {
    /// Starts the hosts and the link.
    ///
    /// # Errors
    /// If any part does not start (not root, a tool is missing); nothing is left then.
    pub fn start(options: &LabOptions) -> anyhow::Result<Self> {
        let dir = RunDir::create()?;
        let mut cleanup = Cleanup::start(&options.program, &dir)?;
        sysctl::allow_congestion_controls()?;
        let mut start = |role: &str| -> anyhow::Result<Host> {
            let host = Host::start(&host_settings(options, &dir, role)?)?;
            cleanup.wait_for(host.last_process())?;
            Ok(host)
        };
        let [cloud, client, user, middle] = [
            start("cloud")?,
            start("client")?,
            start("user")?,
            start("wan")?,
        ];
        underlay::connect(&cloud, &client, &user, &middle)?;
        let emulator = start_emulator(options, &middle)?;
        let wan = Wan::new(&dir.path().join("wan").join(CONTROL_SOCKET));
        Ok(Self {
            emulator,
            cloud,
            client,
            user,
            middle,
            wan,
            cleanup,
            dir,
        })
    }

    /// The run's short name, part of its hosts' names.
    #[must_use]
    pub fn id(&self) -> &str {
        self.dir.id()
    }

    /// The run's directory on the machine, with one directory per host.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The host that holds the emulator, to look at (tcpdump).
    #[must_use]
    pub fn middle(&self) -> &Host {
        &self.middle
    }

    /// Keeps the run's files when the lab ends; where they are.
    ///
    /// # Errors
    /// If the clean-up process is gone.
    pub fn keep_files(&mut self) -> anyhow::Result<PathBuf> {
        self.cleanup.keep()?;
        Ok(self.dir.path().to_owned())
    }

    /// Is the emulator still running?
    ///
    /// # Errors
    /// If it is not; a lab without its link measures nothing.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.emulator.try_wait()? {
            None => Ok(()),
            Some(status) => anyhow::bail!("the link emulator has ended: {status}"),
        }
    }

    /// Moves the client to its second address, as a laptop that changes networks, or back.
    ///
    /// The overlay keeps the first address for itself; only programs that use the route are moved.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn change_client_address(&self, to_second: bool) -> anyhow::Result<()> {
        underlay::change_client_address(&self.client, to_second)
    }
}

const CONTROL_SOCKET: &str = "control.sock";

fn host_settings(options: &LabOptions, dir: &RunDir, role: &str) -> anyhow::Result<HostSettings> {
    let program_dir = options
        .program
        .parent()
        .context("the program's path has no directory")?;
    let mut visible = vec![program_dir.to_owned()];
    visible.extend(options.visible.iter().cloned());
    Ok(HostSettings {
        program: options.program.clone(),
        name: format!("sclw-{}-{role}", dir.id()),
        private: dir.host(role)?,
        hidden: run_dir::base(),
        visible,
    })
}

fn start_emulator(options: &LabOptions, middle: &Host) -> anyhow::Result<HostProcess> {
    let link = serde_json::to_string(&LinkJson::from(&options.link))?;
    let mut command = middle.prompt_command(&options.program);
    command
        .arg("__wan")
        .args(["--site", underlay::SITE_PORT, "--far", underlay::FAR_PORT])
        .args(["--control", &format!("{PRIVATE}/{CONTROL_SOCKET}")])
        .args(["--link", &link, "--seed", &options.seed.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut emulator = middle.spawn(&mut command)?;
    wait_for_ready(emulator.child()).context("start the link emulator")?;
    Ok(emulator)
}

/// Runs a command of the machine's own and checks its end.
fn run_checked(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(
        output.status.success(),
        "{command:?}: {}\n{errors}",
        output.status
    );
    Ok(())
}

/// Sends text to a child's standard input.
fn tell(child: &mut Child, line: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let stdin = child.stdin.as_mut().context("its input is closed")?;
    writeln!(stdin, "{line}").context("write to its input")
}
