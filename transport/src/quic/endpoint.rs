//! One UDP socket that listens and dials.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, EndpointConfig, Incoming, ServerConfig, TokioRuntime};
use socket2::{Domain, Socket, Type};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::tls::{self, SERVER_NAME};
use super::{CloseCode, Connection, Identity, QuicError, Tuning};

/// Handshakes that run at once; more callers wait in quinn, and beyond its bound are refused.
const HANDSHAKES_MAX: usize = 16;
/// Callers that wait in quinn before their handshake begins.
const INCOMING_MAX: usize = 64;
/// Longest time that a caller may take for its handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Finished handshakes that wait for [`Endpoint::accept`].
const ACCEPTED_MAX: usize = 4;
/// Longest wait for the last packets of closed connections.
const FAREWELL_MAX: Duration = Duration::from_secs(3);

/// A UDP socket, a key, and the connections over them.
#[derive(Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    client: ClientConfig,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    /// Ends with the endpoint.
    _listener: JoinSet<()>,
}

impl Endpoint {
    /// Binds the socket; when this returns, callers are answered. Needs a tokio runtime.
    ///
    /// # Errors
    /// `LocalSocket`, `LocalTls`.
    pub fn bind(
        address: SocketAddr,
        identity: &Identity,
        tuning: &Tuning,
    ) -> Result<Self, QuicError> {
        let socket = bind_socket(address, tuning.socket_buffer_bytes)
            .map_err(|source| QuicError::LocalSocket { address, source })?;
        let transport = Arc::new(tuning.transport());
        let alpn = tuning.protocol.alpn();

        let server =
            QuicServerConfig::try_from(tls::server_config(identity, alpn)?).map_err(no_cipher)?;
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server
            .transport_config(Arc::clone(&transport))
            .max_incoming(INCOMING_MAX);
        let client =
            QuicClientConfig::try_from(tls::client_config(identity, alpn)?).map_err(no_cipher)?;
        let mut client = ClientConfig::new(Arc::new(client));
        client.transport_config(transport);

        let runtime = Arc::new(TokioRuntime);
        let inner = quinn::Endpoint::new(EndpointConfig::default(), Some(server), socket, runtime)
            .map_err(|source| QuicError::LocalSocket { address, source })?;
        let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
        let mut listener = JoinSet::new();
        listener.spawn(listen(inner.clone(), sender));
        Ok(Self {
            inner,
            client,
            accepted: Mutex::new(accepted),
            _listener: listener,
        })
    }

    /// Binds any free port of the address family in which `target` can be dialled. A wildcard
    /// address lets the kernel choose the source address anew when the host's changes.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_to_dial(
        target: SocketAddr,
        identity: &Identity,
        tuning: &Tuning,
    ) -> Result<Self, QuicError> {
        let any = match target {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        Self::bind(any, identity, tuning)
    }

    /// The socket's address, with the port that was really taken.
    ///
    /// # Errors
    /// `LocalSocket` when the system does not say.
    pub fn local_address(&self) -> Result<SocketAddr, QuicError> {
        self.inner
            .local_addr()
            .map_err(|source| QuicError::LocalSocket {
                address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
                source,
            })
    }

    /// Connects to a listening peer: one round trip, or `NoAnswer` after the idle timeout. A
    /// listener that does not trust this host says so later, in the first answer.
    ///
    /// # Errors
    /// `LocalDial`, `NoAnswer`, `PeerKey`, `Protocol`.
    pub async fn dial(&self, address: SocketAddr) -> Result<Connection, QuicError> {
        let connecting = self
            .inner
            .connect_with(self.client.clone(), address, SERVER_NAME)
            .map_err(|source| QuicError::LocalDial { address, source })?;
        match connecting.await.map_err(QuicError::from) {
            Ok(connection) => Connection::new(connection),
            Err(QuicError::LinkTimedOut) => Err(QuicError::NoAnswer { address }),
            Err(error) => Err(error),
        }
    }

    /// The next peer that dialled and has proved its key. Failed handshakes are only logged.
    /// Cancel safe.
    ///
    /// # Errors
    /// `LocalClosed` after [`close`](Self::close).
    pub async fn accept(&self) -> Result<Connection, QuicError> {
        self.accepted
            .lock()
            .await
            .recv()
            .await
            .ok_or(QuicError::LocalClosed)
    }

    /// Waits, not longer than 3 s, until the peers of closed connections know that they are
    /// closed; then closes the rest. Call it before the process ends.
    pub async fn close(&self) {
        if timeout(FAREWELL_MAX, self.inner.wait_idle()).await.is_err() {
            self.inner.close(CloseCode::Done.number().into(), b"");
            if timeout(FAREWELL_MAX, self.inner.wait_idle()).await.is_err() {
                tracing::debug!("left before all connections were drained");
            }
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn no_cipher(error: NoInitialCipherSuite) -> QuicError {
    QuicError::LocalTls(rustls::Error::General(error.to_string()))
}

/// Runs handshakes side by side, so that a caller that falls silent stops nobody else.
async fn listen(endpoint: quinn::Endpoint, accepted: mpsc::Sender<Connection>) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            incoming = endpoint.accept(), if handshakes.len() < HANDSHAKES_MAX => match incoming {
                Some(incoming) => {
                    let accepted = accepted.clone();
                    handshakes.spawn(async move { shake_hands(incoming, &accepted).await });
                }
                None => break,
            },
            Some(_ended) = handshakes.join_next() => {}
        }
    }
}

async fn shake_hands(incoming: Incoming, accepted: &mpsc::Sender<Connection>) {
    let from = incoming.remote_address();
    let handshake = async { Connection::new(incoming.await?) };
    match timeout(HANDSHAKE_MAX, handshake).await {
        Ok(Ok(connection)) => {
            if accepted.send(connection).await.is_err() {
                tracing::debug!(%from, "caller dropped: the endpoint is closing");
            }
        }
        Ok(Err(error)) => tracing::warn!(%from, %error, "handshake failed"),
        Err(_elapsed) => tracing::warn!(%from, "handshake took too long"),
    }
}

fn bind_socket(address: SocketAddr, buffer_bytes: u32) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // One port for both families, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(false)?;
    }
    size_buffers(&socket, usize::try_from(buffer_bytes).unwrap_or(usize::MAX))?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Root may pass net.core.[rw]mem_max; others get what it allows, and a warning.
fn size_buffers(socket: &Socket, want: usize) -> std::io::Result<()> {
    use rustix::net::sockopt::set_socket_recv_buffer_size_force as force_receive;
    if force_receive(socket, want).is_err() {
        socket.set_recv_buffer_size(want)?;
    }
    socket.set_send_buffer_size(want)?;
    // The kernel doubles what was asked for, for its own bookkeeping.
    let (receive, send) = (
        socket.recv_buffer_size()? / 2,
        socket.send_buffer_size()? / 2,
    );
    if receive < want || send < want {
        tracing::warn!(
            receive,
            send,
            want,
            "small UDP buffers cost speed on fast links; run: \
             sysctl -w net.core.rmem_max={want} net.core.wmem_max={want}"
        );
    }
    Ok(())
}
