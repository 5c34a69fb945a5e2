//! A packet socket on one interface: whole Ethernet frames in and out.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, SockaddrStorage, bind,
    recv, send, socket,
};

/// Ethernet header; the link counts IP bytes.
pub(crate) const ETHERNET_HEADER_BYTES: usize = 14;

/// The largest frame on an underlay of MTU 1500.
pub(crate) const FRAME_BYTES_MAX: usize = 1500 + ETHERNET_HEADER_BYTES;

/// What the kernel may hold for us while we are not scheduled: 60 ms at 500 Mbit/s, counted with
/// the kernel's own overhead of about as much again.
const RECEIVE_BUFFER_BYTES: usize = 32 << 20;
const SEND_BUFFER_BYTES: usize = 8 << 20;

/// One end of the emulated link.
#[derive(Debug)]
pub(crate) struct Port {
    socket: OwnedFd,
}

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A frame of this many bytes.
    Frame(usize),
    /// A frame larger than the buffer: some offload is on that should be off.
    Oversize,
    /// Nothing waits.
    Empty,
}

impl Port {
    /// Opens a port on the interface called `interface` of this network namespace.
    pub(crate) fn open(interface: &str) -> anyhow::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = SockType::Raw;
        let socket = socket(AddressFamily::Packet, kind, flags, SockProtocol::EthAll)
            .context("open a packet socket")?;
        let address = link_address(interface)?;
        bind(socket.as_raw_fd(), &address).with_context(|| format!("bind to {interface}"))?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER_BYTES)
            .context("size the receive buffer")?;
        rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER_BYTES)
            .context("size the send buffer")?;
        let mut port = Self { socket };
        // Between the two calls above, frames of other interfaces may have come in.
        let mut frame = [0; FRAME_BYTES_MAX];
        while port.receive(&mut frame)? != Received::Empty {}
        Ok(port)
    }

    /// Reads one frame.
    pub(crate) fn receive(&mut self, frame: &mut [u8; FRAME_BYTES_MAX]) -> Result<Received, Errno> {
        // With MSG_TRUNC the result is the frame's true length.
        match recv(self.socket.as_raw_fd(), frame, MsgFlags::MSG_TRUNC) {
            Ok(len) if len > FRAME_BYTES_MAX => Ok(Received::Oversize),
            Ok(len) => Ok(Received::Frame(len)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Received::Empty),
            Err(error) => Err(error),
        }
    }

    /// Writes one frame. False if the kernel had no room or the interface is down.
    pub(crate) fn send(&mut self, frame: &[u8]) -> Result<bool, Errno> {
        match send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS | Errno::ENETDOWN) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The link-layer address of an interface, which is what a packet socket binds to.
///
/// Its protocol field is 0: the kernel then keeps the one that the socket was made with.
fn link_address(interface: &str) -> anyhow::Result<SockaddrStorage> {
    nix::ifaddrs::getifaddrs()
        .context("list the interfaces")?
        .filter(|entry| entry.interface_name == interface)
        .filter_map(|entry| entry.address)
        .find(|address| address.family() == Some(AddressFamily::Packet))
        .with_context(|| format!("no interface {interface}"))
}
