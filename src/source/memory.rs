//! What a move has from the plan before it, and leaves to the plans after it.

use transport::quic::Fingerprint;

use crate::journal::now_s;
use crate::peer::Peer;
use crate::plan::history::{self, Move};
use crate::plan::noted::{self, Noted, Predicted};
use crate::report::Report;
use crate::state_dir::StateDir;

/// Bytes of UDP payload and of IP in a full packet.
const PAYLOAD_BYTES: u64 = 1452;
const PACKET_BYTES: u64 = 1480;

/// The prediction, and whom the move goes to.
#[derive(Debug)]
pub(super) struct Memory {
    peer: Fingerprint,
    noted: Option<Noted>,
}

impl Memory {
    /// Looks for a plan of a short time ago.
    pub(super) fn recall(state: &StateDir, vm: &str, peer: &Peer) -> Memory {
        let peer = peer.connection.peer();
        Memory {
            peer,
            noted: noted::recall(state, vm, peer, now_s()),
        }
    }

    pub(super) fn predicted(&self) -> Option<Predicted> {
        self.noted.map(|noted| noted.predicted)
    }

    /// Notes a guest that has arrived.
    pub(super) fn keep(&self, state: &StateDir, report: &Report) {
        if report.outcome != "arrived" {
            return;
        }
        let udp = report.udp_payload_bytes.as_ref();
        let wire = |bytes: u64| bytes / PAYLOAD_BYTES * PACKET_BYTES + bytes % PAYLOAD_BYTES;
        let record = Move {
            time_s: now_s(),
            vm: report.vm.clone(),
            peer: self.peer.to_string(),
            rate_bps: report.link.as_ref().and_then(|link| link.rate_bps),
            rtt_min_ms: report.link.as_ref().and_then(|link| link.rtt_min_ms),
            pages_total: report.pages_total,
            wire_bytes: udp.map(|udp| wire(udp.sent) + wire(udp.received)),
            total_ms: report.total_ms,
            downtime_ms: report.downtime_ms,
            predicted: self.noted.map(|noted| noted.middle),
        };
        if let Err(error) = history::append(state, &record) {
            tracing::warn!("this move is not noted for later plans: {error:#}");
        }
    }
}
