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

use super::descriptors::{Descriptors, NotHeld};
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
    let failed = |source: io::Error| QmpError::Kept {
        pid: process.pid,
        source,
    };
    let descriptors = match Descriptors::of(process) {
        Ok(descriptors) => descriptors,
        Err(NotHeld::Gone) => return Ok(None),
        Err(NotHeld::Process(error)) => return Err(error.into()),
        Err(NotHeld::Io(error)) => return Err(failed(error)),
    };
    for entry in descriptors.entries().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_socket = std::fs::read_link(entry.path()).is_ok_and(|target| {
            target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"socket:")
        });
        if !is_socket {
            continue;
        }
        let copy = descriptors.take(&entry).map_err(failed)?;
        if let Some(copy) = copy
            && is_clients_end(&copy, process.pid, path).unwrap_or(false)
        {
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
