//! Transport parameters, and where their numbers come from.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::congestion::{ScaleawayConfig, Shaping};
use crate::block::LANES;

/// One bulk stream cannot go faster than this per round trip: eight of them give 1.3 Gbit/s at
/// 200 ms. Small windows are also faster on a LAN (cache).
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Lanes at full window, and 8 MiB that they cannot take from control messages: a connection
/// window that bulk can fill makes a control message wait for seconds.
const RECEIVE_WINDOW_BYTES: u32 = 40 << 20;
/// The same on the sending side, with room for buffers that are only partly acknowledged.
const SEND_WINDOW_BYTES: u64 = 48 << 20;
/// UDP payload of a 1500-byte IPv4 packet. Discovery finds less inside tunnels.
const MTU_UPPER_BYTES: u16 = 1472;
/// Packets that may overtake one before it counts as lost. QUIC's three, on a path that reorders,
/// make losses of most packets; so what has not come an eighth of a round trip after its followers
/// is what counts, which costs bulk nothing.
const REORDERED_MAX: u32 = 128;
/// Both directions' lanes, and some to spare.
const UNI_STREAMS_MAX: u32 = 16;
const BIDI_STREAMS_MAX: u32 = 8;

const _: () = assert!(LANES * (STREAM_WINDOW_BYTES as usize) < RECEIVE_WINDOW_BYTES as usize);
const _: () = assert!((RECEIVE_WINDOW_BYTES as u64) < SEND_WINDOW_BYTES);

/// What is spoken inside QUIC; both sides must want the same, or TLS ends the handshake (ALPN).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Migrations, docs/protocol.md.
    Migration,
    /// `bench link`.
    BenchLink,
}

impl Protocol {
    pub(super) fn alpn(self) -> &'static [u8] {
        match self {
            Self::Migration => b"scaleaway/1",
            Self::BenchLink => b"scaleaway-bench-link/1",
        }
    }
}

/// Who decides how fast this side sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controller {
    /// Our own, see [`congestion`](super::congestion).
    Scaleaway,
    /// Quinn's cubic, to compare with.
    Cubic,
    /// Quinn's bbr, to compare with: floods buffers.
    Bbr,
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scaleaway => "scaleaway",
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        })
    }
}

/// The text names no controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("controllers are scaleaway, cubic and bbr")]
pub struct ControllerError;

impl FromStr for Controller {
    type Err = ControllerError;

    fn from_str(text: &str) -> Result<Self, ControllerError> {
        match text {
            "scaleaway" => Ok(Self::Scaleaway),
            "cubic" => Ok(Self::Cubic),
            "bbr" => Ok(Self::Bbr),
            _ => Err(ControllerError),
        }
    }
}

/// Choices of one endpoint; everything else is a constant of this file.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// What is spoken. Default: migrations.
    pub protocol: Protocol,
    /// Congestion controller. Default: ours.
    pub controller: Controller,
    /// Mode and limits of our controller; keep a clone to change them later. Default: fills, no cap.
    pub shaping: Shaping,
    /// Silence after which a connection is dead. Default 15 s: above that the session layer
    /// resumes faster than QUIC, whose probes back off without a limit.
    pub idle_timeout: Duration,
    /// Receive and send buffer of the UDP socket in bytes. Default 4 MiB: 208 KiB, the kernel's
    /// own, lost 13 000 packets in 10 s of loopback.
    pub socket_buffer_bytes: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            protocol: Protocol::Migration,
            controller: Controller::Scaleaway,
            shaping: Shaping::default(),
            idle_timeout: Duration::from_secs(15),
            socket_buffer_bytes: 4 << 20,
        }
    }
}

impl Tuning {
    pub(super) fn transport(&self) -> TransportConfig {
        let mut config = TransportConfig::default();
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(MTU_UPPER_BYTES);
        let idle_ms = u32::try_from(self.idle_timeout.as_millis()).unwrap_or(u32::MAX);
        config
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
            .receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
            .send_window(SEND_WINDOW_BYTES)
            .max_concurrent_uni_streams(VarInt::from_u32(UNI_STREAMS_MAX))
            .max_concurrent_bidi_streams(VarInt::from_u32(BIDI_STREAMS_MAX))
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle_ms))))
            // A receiver that only waits must speak, or its peer cannot tell a changed address
            // from a dead host.
            .keep_alive_interval(Some(Duration::from_secs(1)))
            .packet_threshold(REORDERED_MAX)
            // The default of 333 ms costs a second when the first packet is lost.
            .initial_rtt(Duration::from_millis(100))
            .mtu_discovery_config(Some(mtu))
            // No datagram is ever sent; a peer that sends some is in error.
            .datagram_receive_buffer_size(None);
        match self.controller {
            Controller::Scaleaway => {
                config.congestion_controller_factory(Arc::new(ScaleawayConfig {
                    shaping: self.shaping.clone(),
                }))
            }
            Controller::Cubic => {
                config.congestion_controller_factory(Arc::new(CubicConfig::default()))
            }
            Controller::Bbr => config.congestion_controller_factory(Arc::new(BbrConfig::default())),
        };
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_named() {
        for controller in [Controller::Scaleaway, Controller::Cubic, Controller::Bbr] {
            assert_eq!(controller.to_string().parse(), Ok(controller));
        }
        assert_eq!("reno".parse::<Controller>(), Err(ControllerError));
    }
}
