//! The way to the other host's agent: who dials, who is trusted, what the hellos agree on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::BytesMut;
use tokio::sync::mpsc;
use transport::quic::{
    CloseCode, Connection, ControlReceiver, ControlSender, Endpoint, QuicError, Shaping, Tuning,
};
use transport::session::{Agreed, greet};
use transport::wire::{
    AbortCode, AttemptId, FEATURES, Frame, FrameReader, Hello, PROTOCOL_VERSION, Purpose, Role,
};

use crate::state_dir::StateDir;
use crate::trust::{Expected, Trust};

/// Longest wait for the other side's hello once connected.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// Between two tries to meet again.
const MEET_INTERVAL: Duration = Duration::from_secs(1);
/// How long a dialer tries before it gives up.
const DIAL_MAX: Duration = Duration::from_secs(30);

/// Which side opens the connection.
#[derive(Debug, Clone)]
pub(crate) enum Way {
    Dial(String),
    Listen(SocketAddr),
}

/// What one side says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Me {
    pub(crate) role: Role,
    pub(crate) vm: String,
    pub(crate) attempt: AttemptId,
    pub(crate) incarnation: u64,
}

/// The endpoint and who may be at its other end.
#[derive(Debug)]
pub(crate) struct Door {
    endpoint: Endpoint,
    way: Way,
    expected: Expected,
    trust: Trust,
}

/// A greeted peer.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) connection: Connection,
    pub(crate) sender: ControlSender,
    pub(crate) inbox: Inbox,
    pub(crate) agreed: Agreed,
    pub(crate) secret: [u8; 32],
}

/// Reads control frames. Cancel safe.
#[derive(Debug)]
pub(crate) struct Inbox {
    receiver: ControlReceiver,
    reader: FrameReader,
}

impl Inbox {
    /// The next frame.
    pub(crate) async fn next(&mut self) -> Result<Frame, String> {
        loop {
            if let Some(frame) = self
                .reader
                .next_frame()
                .map_err(|error| error.to_string())?
            {
                return Ok(frame);
            }
            let mut buffer = BytesMut::new();
            match self.receiver.recv_some(&mut buffer).await {
                Ok(Some(_)) => self.reader.push(&buffer),
                Ok(None) => return Err("the peer closed the control stream".into()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

impl Door {
    /// Binds the socket. `peer` narrows who may come to one trusted peer.
    pub(crate) async fn open(
        way: Way,
        peer: Option<&str>,
        state: &StateDir,
    ) -> anyhow::Result<Door> {
        Self::open_shaped(way, peer, state, &Shaping::default()).await
    }

    /// The same, for a side whose bulk keeps to `shaping`.
    pub(crate) async fn open_shaped(
        way: Way,
        peer: Option<&str>,
        state: &StateDir,
        shaping: &Shaping,
    ) -> anyhow::Result<Door> {
        let trust = Trust::load(state)?;
        let expected = trust.expect(peer)?;
        let identity = state.identity()?;
        let tuning = Tuning {
            shaping: shaping.clone(),
            ..Tuning::default()
        };
        let endpoint = match &way {
            Way::Listen(address) => Endpoint::bind(*address, &identity, &tuning)?,
            Way::Dial(host) => Endpoint::bind_to_dial(resolve(host).await?, &identity, &tuning)?,
        };
        Ok(Door {
            endpoint,
            way,
            expected,
            trust,
        })
    }

    /// Where the socket listens, for the ready line.
    pub(crate) fn local_address(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.endpoint.local_address()?)
    }

    pub(crate) fn listens(&self) -> bool {
        matches!(self.way, Way::Listen(_))
    }

    /// The next peer that is trusted and says what fits. A listener goes on waiting after it refused
    /// somebody; a dialer reports what it was told.
    pub(crate) async fn meet(&self, me: &Me, purpose: Purpose) -> anyhow::Result<Peer> {
        self.meet_within(me, purpose, DIAL_MAX).await
    }

    /// The same; a dialer gives up after `patience`.
    pub(crate) async fn meet_within(
        &self,
        me: &Me,
        purpose: Purpose,
        patience: Duration,
    ) -> anyhow::Result<Peer> {
        match &self.way {
            Way::Dial(host) => {
                let connection = self.dial(host, patience).await?;
                self.greet(connection, me, purpose).await
            }
            Way::Listen(_) => loop {
                let connection = self.endpoint.accept().await?;
                let from = connection.remote_address();
                match self.greet(connection, me, purpose).await {
                    Ok(peer) => return Ok(peer),
                    Err(error) => tracing::warn!(%from, "refused a caller: {error:#}"),
                }
            },
        }
    }

    /// Says goodbye properly: nothing that was sent is lost.
    pub(crate) async fn close(&self) {
        self.endpoint.close().await;
    }

    async fn dial(&self, host: &str, patience: Duration) -> anyhow::Result<Connection> {
        let address = resolve(host).await?;
        let dialling = async {
            loop {
                match self.endpoint.dial(address).await {
                    Ok(connection) => return Ok(connection),
                    Err(error @ (QuicError::NoAnswer { .. } | QuicError::PeerReset)) => {
                        tracing::debug!(%error, "dialling again");
                        tokio::time::sleep(Duration::from_millis(300)).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        match tokio::time::timeout(patience, dialling).await {
            Ok(dialled) => Ok(dialled?),
            Err(_) => bail!(
                "{host} does not answer: is `scaleaway` waiting there, and does UDP pass the firewall?"
            ),
        }
    }

    async fn greet(
        &self,
        connection: Connection,
        me: &Me,
        purpose: Purpose,
    ) -> anyhow::Result<Peer> {
        let admitted = match self.trust.admit(&self.expected, connection.peer()) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                connection.refuse(&refusal.to_string()).await;
                bail!(refusal);
            }
        };
        let greeted = tokio::time::timeout(HELLO_MAX, self.hellos(&connection, me, purpose)).await;
        match greeted {
            Ok(Ok((sender, inbox, agreed, secret))) => {
                let name = admitted.name;
                Ok(Peer {
                    name,
                    connection,
                    sender,
                    inbox,
                    agreed,
                    secret,
                })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                connection.close(CloseCode::Done, "no hello");
                bail!("the peer connected and said nothing")
            }
        }
    }

    async fn hellos(
        &self,
        connection: &Connection,
        me: &Me,
        purpose: Purpose,
    ) -> anyhow::Result<(ControlSender, Inbox, Agreed, [u8; 32])> {
        let peer = connection.peer();
        let mut mine = Hello {
            version: PROTOCOL_VERSION,
            features: FEATURES,
            role: me.role,
            purpose,
            vm: me.vm.clone(),
            attempt: me.attempt,
            incarnation: me.incarnation,
            secret_id: self.trust.secret(peer)?.as_ref().map(secret_id),
            secret: None,
            software: concat!("scaleaway ", env!("CARGO_PKG_VERSION")).into(),
        };
        let dialer = connection.is_dialer();
        let stream = if dialer {
            connection.open_control().await?
        } else {
            connection.accept_control().await?
        };
        let mut sender = stream.sender;
        let mut inbox = Inbox {
            receiver: stream.receiver,
            reader: FrameReader::new(),
        };
        if dialer {
            send_frame(&mut sender, &Frame::Hello(mine.clone())).await?;
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "anything else is refused")]
        let theirs = match inbox.next().await.map_err(|error| anyhow::anyhow!(error))? {
            Frame::Hello(theirs) => theirs,
            Frame::Abort { detail, .. } => bail!("the peer refused: {detail}"),
            other => bail!("the peer began with {} in place of Hello", other.name()),
        };
        if !dialer {
            let secret = self.listener_secret(connection)?;
            mine.secret_id = Some(secret_id(&secret));
            mine.secret = (theirs.secret_id != mine.secret_id).then_some(secret);
        }
        let agreed = match greet(&mine, &theirs) {
            Ok(agreed) => agreed,
            Err(detail) => {
                let abort = Frame::Abort {
                    code: AbortCode::Incompatible,
                    detail: detail.clone(),
                };
                send_frame(&mut sender, &abort).await?;
                sender.finish().await?;
                bail!(detail);
            }
        };
        if dialer {
            if let Some(secret) = theirs.secret {
                self.trust.keep_secret(peer, &secret)?;
            }
        } else {
            send_frame(&mut sender, &Frame::Hello(mine)).await?;
        }
        let secret = self
            .trust
            .secret(peer)?
            .context("the listener sent no pair secret")?;
        Ok((sender, inbox, agreed, secret))
    }

    /// The pair's secret: made by the listening side in the first contact.
    fn listener_secret(&self, connection: &Connection) -> anyhow::Result<[u8; 32]> {
        let peer = connection.peer();
        if let Some(secret) = self.trust.secret(peer)? {
            return Ok(secret);
        }
        let secret = random();
        self.trust.keep_secret(peer, &secret)?;
        Ok(secret)
    }
}

/// The next frame of a peer that may not be there. Cancel safe.
pub(crate) async fn next_frame(peer: &mut Option<Peer>) -> Result<Frame, String> {
    match peer {
        Some(peer) => peer.inbox.next().await,
        None => std::future::pending().await,
    }
}

/// Meets the other side again for the status dialogue, beside the caller, however long that takes.
pub(crate) fn meet_again(door: &Arc<Door>, me: &Me) -> mpsc::Receiver<Peer> {
    let (found, met) = mpsc::channel(1);
    let (door, me) = (door.clone(), me.clone());
    tokio::spawn(async move {
        loop {
            match door.meet(&me, Purpose::Settle).await {
                Ok(peer) => {
                    if found.send(peer).await.is_err() {
                        tracing::debug!("the session has ended");
                    }
                    return;
                }
                Err(error) => tracing::info!("the other side is not reached: {error:#}"),
            }
            tokio::time::sleep(MEET_INTERVAL).await;
        }
    });
    met
}

/// Encodes and sends one frame.
pub(crate) async fn send_frame(sender: &mut ControlSender, frame: &Frame) -> anyhow::Result<()> {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes)?;
    sender.send(bytes.freeze()).await?;
    Ok(())
}

/// Names a secret without giving it away.
fn secret_id(secret: &[u8; 32]) -> [u8; 16] {
    let hash = blake3::keyed_hash(secret, b"scaleaway pair secret");
    let (id, _) = hash.as_bytes().split_at(16);
    id.try_into().expect("split at 16")
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    use ring::rand::SecureRandom;
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .expect("the system has random bytes");
    bytes
}

async fn resolve(host: &str) -> anyhow::Result<SocketAddr> {
    let with_port = if host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    {
        host.to_owned()
    } else {
        format!("{host}:{}", crate::cli::PORT)
    };
    tokio::net::lookup_host(&with_port)
        .await
        .with_context(|| format!("cannot resolve {host}"))?
        .next()
        .with_context(|| format!("{host} has no address"))
}
