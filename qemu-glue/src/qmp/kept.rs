//! A monitor connection that outlives its client, because QEMU itself keeps our end of it.
//!
//! ```text
//! client  -getfd, SCM_RIGHTS: its own socket->  QEMU         the connection never closes
//! client dies; the next one: pidfd_getfd of that socket, same connection, commands out of band
//! ```
//!
//! A QEMU whose main loop waits for a page of post-copy greets no new client, since the greeting's
//! `qmp_capabilities` runs in that loop. On a connection that has been greeted, out-of-band commands
//! run all the same: `migrate-recover` is one, and it is what makes the page come.
//! //= qemu docs/interop/qmp-spec.rst, "Out-of-band execution"

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, getpeername};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::error::QmpError;
use super::process::ProcessId;

/// QEMU's name for the descriptor.
pub(super) const NAME: &str = "scaleaway-monitor";

/// The client's end of a connection to the monitor at `path`, if its QEMU keeps one.
///
/// It needs the right to trace QEMU: root, or QEMU's own user.
///
/// # Errors
/// [`QmpError::Process`] when QEMU's descriptors cannot be looked at.
pub(super) fn find(process: &ProcessId, path: &Path) -> Result<Option<OwnedFd>, QmpError> {
    if !process.is_alive()? {
        return Ok(None);
    }
    let folder = format!("/proc/{}/fd", process.pid);
    let failed = |source: io::Error| QmpError::Kept {
        pid: process.pid,
        source,
    };
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let opened = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()))?;
    // From here on the descriptor names one process; that it is the right one is looked at again.
    if !process.is_alive()? {
        return Ok(None);
    }
    for entry in std::fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_socket = std::fs::read_link(entry.path()).is_ok_and(|target| {
            target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"socket:")
        });
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (true, Some(number)) = (is_socket, number) else {
            continue;
        };
        // It may have been closed since.
        let copy = match pidfd_getfd(&opened, number, PidfdGetfdFlags::empty()) {
            Ok(copy) => copy,
            Err(rustix::io::Errno::BADF) => continue,
            Err(error) => return Err(failed(error.into())),
        };
        if is_clients_end(&copy, process.pid, path).unwrap_or(false) {
            return Ok(Some(copy));
        }
    }
    Ok(None)
}

/// Whether a socket of QEMU's is connected to QEMU's own monitor, rather than the monitor's end.
fn is_clients_end(socket: &impl AsFd, pid: u32, path: &Path) -> rustix::io::Result<bool> {
    if socket_domain(socket)? != AddressFamily::UNIX || socket_acceptconn(socket)? {
        return Ok(false);
    }
    let listener = socket_peercred(socket)?.pid.as_raw_nonzero().get();
    let Some(peer) = getpeername(socket)? else {
        return Ok(false);
    };
    let peer = SocketAddrUnix::try_from(peer)?;
    // QEMU may have bound a relative path.
    let name = peer.path_bytes().and_then(|bytes| {
        let peer = std::str::from_utf8(bytes).ok()?;
        Path::new(peer).file_name().map(std::ffi::OsStr::to_owned)
    });
    Ok(u32::try_from(listener) == Ok(pid) && name.is_some() && name.as_deref() == path.file_name())
}
