//! An ssh tunnel between the two hosts, as one puts in front of QEMU's unencrypted migration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::clock;
use crate::guest::Place;
use crate::host::Host;
use crate::netns::PRIVATE;

const SSHD: &str = "/usr/sbin/sshd";
const SSHD_PORT: u16 = 2222;
const START_MAX: Duration = Duration::from_secs(15);

/// sshd at the target, ssh at the source. Both end when this is dropped.
#[derive(Debug)]
pub struct Tunnel {
    ssh: Child,
    sshd: Child,
}

impl Tunnel {
    /// A tunnel from `port` at the source to the same port at the target.
    ///
    /// # Errors
    /// When an end of it does not start.
    pub fn open(source: &Host, target: &Host, address: &str, port: u16) -> anyhow::Result<Self> {
        ensure!(
            Path::new(SSHD).exists(),
            "{SSHD} is missing: run testbed/setup.sh"
        );
        let (source_files, target_files) = (files(source)?, files(target)?);
        key(source, &source_files)?;
        key(target, &target_files)?;
        // What an administrator does once by hand: the keys are made known to each other.
        let public = |host: &Host, files: &Path| {
            fs::read_to_string(host.outside(&files.join("key.pub")))
                .context("an ssh key is missing")
        };
        fs::write(
            target.outside(&target_files.join("authorized_keys")),
            public(source, &source_files)?,
        )?;
        let known = format!("[{address}]:{SSHD_PORT} {}", public(target, &target_files)?);
        fs::write(source.outside(&source_files.join("known_hosts")), known)?;

        let mut sshd = start(
            &mut sshd_command(target, &target_files),
            target,
            &target_files,
        )?;
        let opened = wait_log(target, &target_files, "Server listening", &mut sshd)
            .context("sshd does not start");
        let ssh = opened.and_then(|()| {
            let mut ssh = ssh_command(source, &source_files, address, port);
            start(&mut ssh, source, &source_files)
        });
        let mut tunnel = match ssh {
            Ok(ssh) => Self { ssh, sshd },
            Err(error) => {
                end(&mut sshd);
                return Err(error);
            }
        };
        wait_log(
            source,
            &source_files,
            "Entering interactive session",
            &mut tunnel.ssh,
        )
        .context("the ssh tunnel does not open")?;
        Ok(tunnel)
    }

    /// Whether it still carries data.
    ///
    /// # Errors
    /// When it has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.ssh.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the ssh tunnel has ended: {status}"),
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        end(&mut self.ssh);
        end(&mut self.sshd);
    }
}

fn files(host: &Host) -> anyhow::Result<PathBuf> {
    let folder = Path::new(PRIVATE).join("ssh");
    let outside = host.outside(&folder);
    fs::create_dir_all(&outside).with_context(|| format!("cannot make {}", outside.display()))?;
    Ok(folder)
}

fn key(host: &Host, files: &Path) -> anyhow::Result<()> {
    let mut command = host.command("ssh-keygen");
    command
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"])
        .arg(files.join("key"));
    host.output(&mut command).map(drop)
}

fn sshd_command(target: &Host, files: &Path) -> Command {
    // sshd wants a folder in /run, which is empty in a host.
    let script = "mkdir -p /run/sshd && exec \"$@\"";
    let mut command = Place::Host(target).command("sh");
    command.args(["-c", script, "sh", SSHD, "-D", "-e", "-f", "/dev/null"]);
    let option = |name: &str, value: String| format!("{name}={value}");
    for option in [
        option("Port", SSHD_PORT.to_string()),
        option("HostKey", files.join("key").display().to_string()),
        option(
            "AuthorizedKeysFile",
            files.join("authorized_keys").display().to_string(),
        ),
        // The lab's folders are root's own, but not below a home directory.
        option("StrictModes", "no".to_owned()),
        option("PermitRootLogin", "prohibit-password".to_owned()),
        option("PasswordAuthentication", "no".to_owned()),
        option("PidFile", "none".to_owned()),
        option("UsePAM", "no".to_owned()),
    ] {
        command.args(["-o", &option]);
    }
    command
}

fn ssh_command(source: &Host, files: &Path, address: &str, port: u16) -> Command {
    let mut command = Place::Host(source).command("ssh");
    command.args(["-v", "-N", "-T", "-F", "/dev/null"]);
    command.args([
        "-o",
        "BatchMode=yes",
        "-o",
        "ExitOnForwardFailure=yes",
        "-o",
    ]);
    command.arg(format!(
        "UserKnownHostsFile={}",
        files.join("known_hosts").display()
    ));
    command.arg("-i").arg(files.join("key"));
    command.args([
        "-p",
        &SSHD_PORT.to_string(),
        "-L",
        &format!("{port}:127.0.0.1:{port}"),
    ]);
    command.arg(format!("root@{address}"));
    command
}

fn start(command: &mut Command, host: &Host, files: &Path) -> anyhow::Result<Child> {
    let log = fs::File::create(host.outside(&files.join("log")))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the ssh tunnel")
}

fn wait_log(host: &Host, files: &Path, words: &str, child: &mut Child) -> anyhow::Result<()> {
    let path = host.outside(&files.join("log"));
    clock::wait_until(words, START_MAX, || {
        let text = fs::read_to_string(&path).unwrap_or_default();
        if text.contains(words) {
            return Ok(Some(()));
        }
        match child.try_wait()? {
            None => Ok(None),
            Some(status) => bail!("{status}:\n{text}"),
        }
    })
}

fn end(child: &mut Child) {
    // The program in the host dies with its wrapper.
    child.kill().ok();
    child.wait().ok();
}
