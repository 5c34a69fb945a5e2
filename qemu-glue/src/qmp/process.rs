//! Which process is it? A pid alone may be given to another process; pid, start time and boot
//! together name one process for ever (S2).

use std::fs;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::MissedTickBehavior;

/// Time between two looks at a process that shall die.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A process, named for the journal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid in our pid namespace.
    pub pid: u32,
    /// Its start in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time_ticks: u64,
    /// The kernel's boot (/proc/sys/kernel/random/boot_id).
    pub boot_id: String,
}

/// Why a process could not be named.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no such process.
    #[error("there is no process {pid}")]
    Gone {
        /// The pid.
        pid: u32,
    },
    /// The peer lives in another pid namespace, so its pid says nothing here.
    #[error("the peer's process is not visible from here (another pid namespace)")]
    OtherNamespace,
    /// /proc could not be read.
    #[error("cannot read {path}")]
    Proc {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// /proc has something else than proc(5) says.
    #[error("cannot understand {path}")]
    Format {
        /// The file.
        path: String,
    },
    /// The socket has no credentials.
    #[error("the monitor's socket tells no peer")]
    NoCredentials(#[source] io::Error),
}

impl ProcessId {
    /// Names a process that lives.
    ///
    /// # Errors
    /// [`ProcessError::Gone`] when it does not.
    pub fn of(pid: u32) -> Result<Self, ProcessError> {
        match read_stat(pid)? {
            Some(stat) if stat.may_run => Ok(Self {
                pid,
                start_time_ticks: stat.start_time_ticks,
                boot_id: boot_id()?,
            }),
            Some(_) | None => Err(ProcessError::Gone { pid }),
        }
    }

    /// The process that listened on the socket that `socket` is connected to.
    ///
    /// The kernel notes it at `listen()`: right for a QEMU that opened its monitor itself, wrong
    /// for one that was given an open socket (libvirt does that).
    pub(super) fn of_peer(socket: &tokio::net::UnixStream) -> Result<Self, ProcessError> {
        let credentials = socket.peer_cred().map_err(ProcessError::NoCredentials)?;
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok());
        match pid {
            Some(pid) if pid > 0 => Self::of(pid),
            Some(_) | None => Err(ProcessError::OtherNamespace),
        }
    }

    /// Does this very process still live? A zombie does not: none of its threads can run again.
    ///
    /// # Errors
    /// When /proc cannot be read; the answer is then unknown, and the caller must not take the
    /// process for dead.
    pub fn is_alive(&self) -> Result<bool, ProcessError> {
        if boot_id()? != self.boot_id {
            return Ok(false);
        }
        let alive = |stat: Stat| stat.may_run && stat.start_time_ticks == self.start_time_ticks;
        Ok(read_stat(self.pid)?.is_some_and(alive))
    }

    /// Waits until the process is dead, at most `limit`; says whether it is. Cancel safe.
    ///
    /// # Errors
    /// As [`ProcessId::is_alive`].
    pub async fn wait_dead(&self, limit: Duration) -> Result<bool, ProcessError> {
        // Looked at by the clock: tokio waits for a pidfd only with unsafe code.
        let deadline = tokio::time::sleep(limit);
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(deadline);
        loop {
            if !self.is_alive()? {
                return Ok(true);
            }
            tokio::select! {
                _ = looks.tick() => {}
                () = &mut deadline => return Ok(!self.is_alive()?),
            }
        }
    }
}

struct Stat {
    /// At least one thread is not a zombie.
    may_run: bool,
    start_time_ticks: u64,
}

/// `None` when there is no such process.
fn read_stat(pid: u32) -> Result<Option<Stat>, ProcessError> {
    let path = format!("/proc/{pid}/stat");
    let Some(text) = read_if_there(&path)? else {
        return Ok(None);
    };
    let (state, start_time_ticks) =
        parse_stat(&text).ok_or(ProcessError::Format { path: path.clone() })?;
    // A first thread that ended by itself is a zombie while others run on.
    let may_run = !matches!(state, b'Z' | b'X' | b'x') || thread_count(pid)? > 1;
    Ok(Some(Stat {
        may_run,
        start_time_ticks,
    }))
}

fn read_if_there(path: &str) -> Result<Option<Vec<u8>>, ProcessError> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(ProcessError::Proc {
            path: path.to_owned(),
            source,
        }),
    }
}

/// ESRCH is what a read of an open /proc file gives when the process has just gone.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

fn thread_count(pid: u32) -> Result<usize, ProcessError> {
    let path = format!("/proc/{pid}/task");
    match fs::read_dir(&path) {
        Ok(entries) => Ok(entries.count()),
        Err(error) if is_gone(&error) => Ok(0),
        Err(source) => Err(ProcessError::Proc { path, source }),
    }
}

/// State and start time. The second field is a name in parentheses that may hold anything, so
/// counting begins after the last `)`.
fn parse_stat(text: &[u8]) -> Option<(u8, u64)> {
    let name_end = text.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(text.get(name_end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // proc(5): the state is field 3, starttime field 22.
    let start_time_ticks = fields.nth(22 - 4)?.parse().ok()?;
    Some((state, start_time_ticks))
}

fn boot_id() -> Result<String, ProcessError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|source| ProcessError::Proc {
        path: path.to_owned(),
        source,
    })?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process name may hold spaces, digits and parentheses.
    #[test]
    fn stat_with_an_odd_name() {
        let text = b"42 (a) Z 1 (b) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 11 12\n";
        assert_eq!(parse_stat(text), Some((b'S', 987_654)));
        assert_eq!(parse_stat(b"42 (a) S 1 42"), None);
        assert_eq!(parse_stat(b""), None);
    }

    /// We live; the same pid with another start or another boot does not; a zombie does not.
    #[test]
    fn alive_means_this_very_process() {
        let us = ProcessId::of(std::process::id()).unwrap();
        assert!(us.is_alive().unwrap());
        assert!(
            !ProcessId {
                start_time_ticks: 1,
                ..us.clone()
            }
            .is_alive()
            .unwrap()
        );
        assert!(
            !ProcessId {
                boot_id: "another".to_owned(),
                ..us
            }
            .is_alive()
            .unwrap()
        );
    }

    /// From the start of a child to its zombie, which counts as dead before it is reaped.
    #[tokio::test]
    async fn a_zombie_is_dead() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(!process.wait_dead(Duration::from_millis(10)).await.unwrap());
        child.kill().unwrap();
        assert!(process.wait_dead(Duration::from_secs(20)).await.unwrap());
        assert!(!process.is_alive().unwrap());
        assert!(matches!(
            ProcessId::of(child.id()),
            Err(ProcessError::Gone { .. })
        ));
        child.wait().unwrap();
        assert!(process.wait_dead(Duration::ZERO).await.unwrap());
    }
}
