//! One connection to a peer: its key, its streams, what it measures of the link.

use std::net::SocketAddr;
use std::time::Duration;

use quinn::rustls::pki_types::CertificateDer;
use quinn::{Side, VarInt};

use super::congestion::Scaleaway;
use super::streams::{self, ControlStream, LaneReceiver, LaneSender, UrgentReceiver, UrgentSender};
use super::{CloseCode, Fingerprint, QuicError};

/// Longest wait for the end of the handshake before a refusal is sent without it.
const CONFIRM_MAX: Duration = Duration::from_secs(1);
const CONFIRM_POLL: Duration = Duration::from_millis(5);
/// IPv4 and UDP headers of a packet.
const HEADER_V4_BYTES: u64 = 28;
/// IPv6 and UDP headers of a packet.
const HEADER_V6_BYTES: u64 = 48;

/// What is known of the link at one moment: the one source for the report, the progress line, the
/// end of pre-copy and `plan`. Counts are since the connection began; what is said of "recent
/// rounds" is of the last 64 round trips. With other controllers than ours the rates are `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkSample {
    /// Delivery rate in bit/s of IP bytes, from our controller's model; `None` before its first
    /// sample and with other controllers. Only a side that sends bulk has a true one.
    pub rate_bps: Option<u64>,
    /// The rate of a bad recent round (tenth percentile), in bit/s of IP bytes: what to reckon
    /// with where arriving late costs more than arriving early.
    pub rate_low_bps: Option<u64>,
    /// The rate of a good one (ninetieth percentile).
    pub rate_high_bps: Option<u64>,
    /// Smoothed round trip time.
    pub rtt: Duration,
    /// Least round trip time that the controller remembers (quinn's all-time least with others).
    pub rtt_min: Duration,
    /// Round trip time above the base: the queue that this sender and others hold.
    pub queueing: Duration,
    /// Median of recent rounds; `None` before the first round and with other controllers.
    pub queueing_p50: Option<Duration>,
    /// 95th percentile of recent rounds.
    pub queueing_p95: Option<Duration>,
    /// Congestion window in bytes of UDP payload.
    pub cwnd: u64,
    /// Packets declared lost, also those that came late.
    pub lost_packets: u64,
    /// Bytes in lost packets.
    pub lost_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// UDP payload bytes sent.
    pub udp_tx_bytes: u64,
    /// UDP payload bytes received.
    pub udp_rx_bytes: u64,
    /// Largest UDP payload that the path is known to carry.
    pub mtu: u16,
}

impl LinkSample {
    /// Lost packets of all that were sent, 0 to 1; 0 before the first packet.
    pub fn lost_share(&self) -> f64 {
        if self.sent_packets == 0 {
            return 0.0;
        }
        self.lost_packets as f64 / self.sent_packets as f64
    }
}

/// A connection whose peer has proved its key. Dropping all of it and its streams closes it.
#[derive(Debug, Clone)]
pub struct Connection {
    inner: quinn::Connection,
    peer: Fingerprint,
}

impl Connection {
    pub(super) fn new(inner: quinn::Connection) -> Result<Self, QuicError> {
        let keys = inner
            .peer_identity()
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
        let spki = keys
            .as_ref()
            .and_then(|keys| keys.first())
            .ok_or(QuicError::PeerKey)?;
        let peer = Fingerprint::of_spki(spki);
        Ok(Self { inner, peer })
    }

    /// The key that the peer has proved to hold. Whether it is trusted is the caller's decision,
    /// before anything else is done with the connection.
    pub fn peer(&self) -> Fingerprint {
        self.peer
    }

    /// Where the peer's packets come from.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// True on the side that dialled.
    pub fn is_dialer(&self) -> bool {
        self.inner.side() == Side::Client
    }

    /// Closes with words for the peer's operator: its calls fail with [`QuicError::Refused`].
    pub async fn refuse(&self, detail: &str) {
        // Until the handshake is confirmed QUIC may not send an application's words, and the
        // listener would see a bare "application error".
        let confirmed = async {
            while self.is_dialer()
                && self.inner.close_reason().is_none()
                && self.inner.stats().frame_rx.handshake_done == 0
            {
                tokio::time::sleep(CONFIRM_POLL).await;
            }
        };
        if tokio::time::timeout(CONFIRM_MAX, confirmed).await.is_err() {
            tracing::debug!("refusing before the handshake is confirmed");
        }
        self.close(CloseCode::Refused, detail);
    }

    /// Closes at once: what is unsent or unread is lost. After [`LaneSender::finish`] and
    /// [`ControlSender::finish`](super::ControlSender::finish) nothing is.
    pub fn close(&self, code: CloseCode, detail: &str) {
        self.inner
            .close(VarInt::from_u32(code.number()), detail.as_bytes());
    }

    /// Waits until the connection is closed by either side or dead, and says why.
    pub async fn closed(&self) -> QuicError {
        self.inner.closed().await.into()
    }

    /// Opens the control stream. Only the dialer does; it must send first, since a stream
    /// without data is not seen by the listener.
    ///
    /// # Errors
    /// The connection's end.
    pub async fn open_control(&self) -> Result<ControlStream, QuicError> {
        debug_assert!(self.is_dialer());
        streams::open_control(&self.inner).await
    }

    /// Takes the control stream that the dialer opened. Returns when its first bytes are there.
    ///
    /// # Errors
    /// The connection's end.
    pub async fn accept_control(&self) -> Result<ControlStream, QuicError> {
        debug_assert!(!self.is_dialer());
        streams::accept_control(&self.inner).await
    }

    /// Opens the lanes at the source, in order. Each begins with one byte, its number.
    ///
    /// # Errors
    /// The connection's end.
    pub async fn open_lanes(&self) -> Result<Vec<LaneSender>, QuicError> {
        streams::open_lanes(&self.inner).await
    }

    /// Takes the lanes at the target, in order, and checks their numbers.
    ///
    /// # Errors
    /// The connection's end; `PeerStreams` when a lane's number is wrong.
    pub async fn accept_lanes(&self) -> Result<Vec<LaneReceiver>, QuicError> {
        streams::accept_lanes(&self.inner).await
    }

    /// Opens the urgent stream at the source (post-copy), when the lanes are open.
    ///
    /// # Errors
    /// The connection's end.
    pub async fn open_urgent(&self) -> Result<UrgentSender, QuicError> {
        streams::open_urgent(&self.inner).await
    }

    /// Takes the urgent stream at the target, when the lanes are taken.
    ///
    /// # Errors
    /// The connection's end; `PeerStreams` when it is another stream.
    pub async fn accept_urgent(&self) -> Result<UrgentReceiver, QuicError> {
        streams::accept_urgent(&self.inner).await
    }

    /// Measures the link. Takes the connection's lock and copies the controller: call it some
    /// times a second, not more.
    pub fn link_sample(&self) -> LinkSample {
        let stats = self.inner.stats();
        let controller = self
            .inner
            .congestion_state()
            .into_any()
            .downcast::<Scaleaway>()
            .ok();
        let model = controller.as_ref().map(|controller| controller.estimate());
        let rtt = stats.path.rtt;
        let rtt_min = model
            .and_then(|model| model.rtt_min)
            .unwrap_or(stats.path.min_rtt);
        let ip_bits =
            |rate: Option<u64>| rate.map(|rate| self.ip_bits(rate, stats.path.current_mtu));
        LinkSample {
            rate_bps: ip_bits(model.and_then(|model| model.rate_bytes_per_s)),
            rate_low_bps: ip_bits(model.and_then(|model| model.rate_low_bytes_per_s)),
            rate_high_bps: ip_bits(model.and_then(|model| model.rate_high_bytes_per_s)),
            rtt,
            rtt_min,
            queueing: model
                .and_then(|model| model.queueing)
                .unwrap_or(rtt.saturating_sub(stats.path.min_rtt)),
            queueing_p50: model.and_then(|model| model.queueing_p50),
            queueing_p95: model.and_then(|model| model.queueing_p95),
            cwnd: stats.path.cwnd,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            sent_packets: stats.path.sent_packets,
            udp_tx_bytes: stats.udp_tx.bytes,
            udp_rx_bytes: stats.udp_rx.bytes,
            mtu: stats.path.current_mtu,
        }
    }

    /// Full packets' UDP payload per second as bits of IP packets per second.
    fn ip_bits(&self, payload_bytes: u64, mtu: u16) -> u64 {
        let header = match self.inner.remote_address() {
            SocketAddr::V4(_) => HEADER_V4_BYTES,
            SocketAddr::V6(address) if address.ip().to_ipv4_mapped().is_some() => HEADER_V4_BYTES,
            SocketAddr::V6(_) => HEADER_V6_BYTES,
        };
        let packets = payload_bytes / u64::from(mtu.max(1));
        (payload_bytes + packets * header) * 8
    }
}
