//! The monitor's socket: bytes in, bytes out, and the socket itself as cargo.
//!
//! No call blocks, whatever the mode of the open file is: whoever receives the socket by `SCM_RIGHTS`
//! shares that mode, and QEMU sets what it receives to blocking.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// A connected socket of a monitor.
#[derive(Debug)]
pub(super) struct Socket(UnixStream);

impl Socket {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// A socket that came from another process.
    pub(super) fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let stream = std::os::unix::net::UnixStream::from(descriptor);
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream).map(Self)
    }

    /// 0 at the end. Cancel safe.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0
            .async_io(Interest::READABLE, || {
                let (_, count) = recv(&self.0, &mut *buffer, RecvFlags::DONTWAIT)?;
                Ok(count)
            })
            .await
    }

    /// Cancel safe: bytes were written if and only if it returns.
    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.0
            .async_io(Interest::WRITABLE, || Ok(send(&self.0, bytes, flags)?))
            .await
    }

    /// [`Socket::write`], and the socket itself goes along.
    pub(super) async fn write_with_itself(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.0
            .async_io(Interest::WRITABLE, || {
                let own = [self.0.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut cargo = SendAncillaryBuffer::new(&mut space);
                cargo.push(SendAncillaryMessage::ScmRights(&own));
                Ok(sendmsg(&self.0, &[IoSlice::new(bytes)], &mut cargo, flags)?)
            })
            .await
    }
}
