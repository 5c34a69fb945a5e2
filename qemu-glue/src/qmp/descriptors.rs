//! Open files of a process, taken through a pidfd: what QEMU holds is had without opening anything
//! that QEMU itself could not (S17). The kernel allows it as it allows ptrace.

use std::fs::DirEntry;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::process::{ProcessError, ProcessId};

/// Descriptors beyond this number are not looked at; a QEMU has some hundreds.
const DESCRIPTORS_MAX: usize = 65_536;

/// A process that is held by a pidfd.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pid: u32,
    pidfd: OwnedFd,
}

/// Why a process cannot be held.
#[derive(Debug)]
pub(crate) enum NotHeld {
    /// It is dead.
    Gone,
    /// Nobody can tell whether it lives.
    Process(ProcessError),
    /// The system's word.
    Io(io::Error),
}

impl Descriptors {
    pub(crate) fn of(process: &ProcessId) -> Result<Self, NotHeld> {
        let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
        let opened = pidfd_open(pid.ok_or(NotHeld::Gone)?, PidfdFlags::empty());
        let pidfd = match opened {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Err(NotHeld::Gone),
            Err(error) => return Err(NotHeld::Io(error.into())),
        };
        // Looked at after the opening: the pidfd names that process for ever.
        if !process.is_alive().map_err(NotHeld::Process)? {
            return Err(NotHeld::Gone);
        }
        let pid = process.pid;
        Ok(Self { pid, pidfd })
    }

    /// The entries of /proc/PID/fd.
    pub(crate) fn entries(&self) -> io::Result<impl Iterator<Item = io::Result<DirEntry>> + use<>> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid))?.take(DESCRIPTORS_MAX))
    }

    /// A copy of the descriptor behind an entry; `None` when it has been closed since.
    pub(crate) fn take(&self, entry: &DirEntry) -> io::Result<Option<OwnedFd>> {
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else {
            return Ok(None);
        };
        match pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty()) {
            Ok(copy) => Ok(Some(copy)),
            Err(Errno::BADF) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
