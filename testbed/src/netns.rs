//! What runs inside a host's namespaces: the process that holds them (`testbed __host`).
//!
//! It is process 1 of the host's own process namespace, so the kernel kills everything in the host
//! when it ends; and it ends when its standard input does, that is when the lab's process is gone,
//! however that went.
//!
//! The host's files are the machine's, read as they are, except: an empty /run, /dev/shm and /tmp
//! of its own, [`PRIVATE`] with its own lasting files, and nothing where the lab keeps the files of
//! all hosts.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, unmount};
use rustix::process::{WaitOptions, wait};

/// Where a host sees its own lasting files.
pub const PRIVATE: &str = "/run/host";

/// Where the machine's /tmp is while the host's own is being made.
const OLD_TMP: &str = "/run/old-tmp";

/// How often orphans are reaped; nothing waits for it.
const REAP_INTERVAL: Duration = Duration::from_secs(1);

/// Kernel settings of a host, where the kernel has them.
const SETTINGS: [(&str, &str); 7] = [
    // Addresses that configure themselves would put packets of their own on the link.
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    // An address may go without taking its subnet's others and the neighbours with it.
    ("ipv4/conf/all/promote_secondaries", "1"),
    ("ipv4/conf/default/promote_secondaries", "1"),
    // Bridges of the lab are cables, not firewalls.
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
    ("bridge/bridge-nf-call-arptables", "0"),
];

/// What the holder is started with.
#[derive(Clone, Debug)]
pub struct Holding {
    /// Host name (UTS).
    pub name: String,
    /// The machine's directory that becomes [`PRIVATE`].
    pub private: PathBuf,
    /// The machine's directory that hosts must not see.
    pub hidden: PathBuf,
    /// Directories below the machine's /tmp that the host sees all the same (programs).
    pub visible: Vec<PathBuf>,
}

/// Makes this process the holder of a host. Says `ready` on stdout, returns when stdin ends.
///
/// The caller has already given it namespaces of its own and process number 1 there.
///
/// # Errors
/// If it is not process 1, or a mount fails.
pub fn hold(holding: &Holding) -> anyhow::Result<()> {
    ensure!(
        std::process::id() == 1,
        "the holder of a host must be process 1 of its namespace"
    );
    rustix::system::sethostname(holding.name.as_bytes()).context("set the host name")?;
    arrange_files(holding)?;
    arrange_network()?;
    writeln!(io::stdout(), "ready").context("say ready")?;
    wait_for_end_of_input()
}

fn arrange_files(holding: &Holding) -> anyhow::Result<()> {
    mount("proc", "/proc", "proc", MountFlags::empty(), None).context("mount /proc")?;
    mount_tmpfs(Path::new("/run"))?;
    make_dir(PRIVATE)?;
    mount_bind(&holding.private, PRIVATE).context("mount the host's files")?;
    mount_tmpfs(Path::new("/dev/shm"))?;

    make_dir(OLD_TMP)?;
    mount_bind_recursive("/tmp", OLD_TMP).context("keep /tmp aside")?;
    mount_tmpfs(Path::new("/tmp"))?;
    for dir in &holding.visible {
        if let Ok(below) = dir.strip_prefix("/tmp") {
            make_dir(dir)?;
            let kept = Path::new(OLD_TMP).join(below);
            mount_bind_recursive(&kept, dir).with_context(|| format!("show {}", dir.display()))?;
        }
    }
    unmount(OLD_TMP, UnmountFlags::DETACH).context("let go of the machine's /tmp")?;
    if !holding.hidden.starts_with("/tmp") {
        mount_tmpfs(&holding.hidden)?;
    }
    Ok(())
}

fn arrange_network() -> anyhow::Result<()> {
    for (setting, value) in SETTINGS {
        let path = Path::new("/proc/sys/net").join(setting);
        if path.exists() {
            fs::write(&path, value).with_context(|| format!("write {}", path.display()))?;
        }
    }
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    ensure!(status.context("run ip")?.success(), "cannot bring lo up");
    Ok(())
}

fn wait_for_end_of_input() -> anyhow::Result<()> {
    let mut stdin = io::stdin().lock();
    let interval = Timespec::try_from(REAP_INTERVAL)?;
    loop {
        let ready = {
            let mut sources = [PollFd::new(&stdin, PollFlags::IN)];
            poll(&mut sources, Some(&interval)).context("wait on stdin")?
        };
        if ready > 0 && stdin.read(&mut [0; 64]).context("read stdin")? == 0 {
            return Ok(());
        }
        // Process 1 inherits every orphan of its namespace.
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    }
}

fn mount_tmpfs(path: &Path) -> anyhow::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", path, "tmpfs", flags, None)
        .with_context(|| format!("mount an empty {}", path.display()))
}

fn make_dir(path: impl AsRef<Path>) -> anyhow::Result<()> {
    let path = path.as_ref();
    fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))
}
