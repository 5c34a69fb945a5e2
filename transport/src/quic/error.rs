//! What can go wrong between two hosts' sockets, and whose fault it is.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use quinn::{ConnectError, ConnectionError};

/// Longest reason text that is taken from a peer, in characters.
const DETAIL_MAX_CHARS: usize = 1024;

/// Why a side closed a connection. The number is what the other side sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseCode {
    /// All that was to be said has been said.
    Done,
    /// The key of the peer is not trusted here.
    Refused,
    /// The speaker gave up; the control stream or the detail says why.
    Abort,
}

impl CloseCode {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Done => 0,
            Self::Refused => 1,
            Self::Abort => 2,
        }
    }
}

/// An error of the QUIC driver.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The key file could not be read or made.
    #[error("key file {path}")]
    LocalKeyFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The key file may be read by others than its owner.
    #[error("key file {path} has mode {mode:03o}, others can read it; run: chmod 600 {path}")]
    LocalKeyExposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The key file does not hold an Ed25519 key in PKCS#8.
    #[error("key file {path} holds no Ed25519 key in PKCS#8 form; move it away to get a new key")]
    LocalKeyInvalid {
        /// The file.
        path: PathBuf,
    },
    /// The random number generator failed.
    #[error("the system's random number generator failed")]
    LocalRandom,
    /// The UDP socket could not be made or set up.
    #[error("UDP socket on {address}")]
    LocalSocket {
        /// The address that it was to be bound to.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// TLS could not be set up.
    #[error("TLS set-up")]
    LocalTls(#[source] rustls::Error),
    /// The address cannot be dialled from this socket.
    #[error("cannot dial {address}")]
    LocalDial {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: ConnectError,
    },
    /// This side closed the connection or the endpoint.
    #[error("closed here")]
    LocalClosed,
    /// Nobody answered.
    #[error("no answer from {address}: is a scaleaway listening there, and UDP let through?")]
    NoAnswer {
        /// The address that was dialled.
        address: SocketAddr,
    },
    /// The peer does not trust this host's key; its own words.
    #[error("the other side refused this host: {detail}")]
    Refused {
        /// The peer's reason, made safe to print.
        detail: String,
    },
    /// The peer closed the connection on purpose.
    #[error("the other side closed the connection (code {code}): {detail}")]
    PeerClosed {
        /// The application's close code.
        code: u64,
        /// The peer's reason, made safe to print.
        detail: String,
    },
    /// The peer showed no Ed25519 raw public key.
    #[error("the other side showed no Ed25519 key")]
    PeerKey,
    /// The peer's streams do not follow the protocol.
    #[error("the other side broke the stream rules: {what}")]
    PeerStreams {
        /// The broken rule.
        what: &'static str,
    },
    /// The peer's process has lost this connection, probably by a restart.
    #[error("the other side no longer knows this connection: was it restarted?")]
    PeerReset,
    /// The link is silent for longer than the idle timeout.
    #[error("the link is silent")]
    LinkTimedOut,
    /// The QUIC layers do not agree.
    #[error("QUIC")]
    Protocol(#[source] ConnectionError),
}

impl From<ConnectionError> for QuicError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                let code = close.error_code.into_inner();
                let detail = printable(&close.reason);
                if code == u64::from(CloseCode::Refused.number()) {
                    Self::Refused { detail }
                } else {
                    Self::PeerClosed { code, detail }
                }
            }
            ConnectionError::TimedOut => Self::LinkTimedOut,
            ConnectionError::Reset => Self::PeerReset,
            ConnectionError::LocallyClosed => Self::LocalClosed,
            ConnectionError::VersionMismatch
            | ConnectionError::TransportError(_)
            | ConnectionError::ConnectionClosed(_)
            | ConnectionError::CidsExhausted => Self::Protocol(error),
        }
    }
}

/// A peer's text goes to terminals and logs: no control characters, and not without end.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .take(DETAIL_MAX_CHARS)
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer cannot paint the operator's terminal.
    #[test]
    fn reasons_are_made_printable_and_short() {
        assert_eq!(printable(b"\x1b[2Jno\nway\xff"), " [2Jno way\u{fffd}");
        assert_eq!(printable(&[b'a'; 5000]).len(), DETAIL_MAX_CHARS);
    }
}
