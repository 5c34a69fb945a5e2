//! What the two sides of a measurement say to each other: one JSON object a line.

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use transport::quic::{ControlReceiver, ControlSender, ControlStream};

/// Longest line that is taken from the other side.
const LINE_MAX_BYTES: usize = 4096;

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "say")]
pub(super) enum Message {
    /// Dialer: measure for this long; `reverse`: the listener sends.
    Run { seconds: u64, reverse: bool },
    /// Listener: lanes may be opened.
    Ready,
    /// Receiver: so far.
    Received { ms: u64, bytes: u64 },
    /// Sender: the link at this moment.
    Link(Link),
    /// Receiver: it has enough.
    Reception(Reception),
    /// Sender: its half of the summary.
    Sending(Sending),
}

/// The sender's view of the link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Link {
    pub(super) rtt_ms: f64,
    pub(super) queueing_ms: f64,
    pub(super) lost_share: f64,
}

/// The receiver's half of the summary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Reception {
    /// Bytes that the application got, in order.
    pub(super) bytes: u64,
    /// From the first lane byte on.
    pub(super) ms: f64,
    pub(super) goodput_bps: f64,
    /// Without the first two seconds; `None` for runs that are not longer.
    pub(super) steady_goodput_bps: Option<f64>,
    pub(super) cpu_s_per_gib: Option<f64>,
}

/// The sender's half of the summary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sending {
    /// Median of the smoothed round trip time.
    pub(super) rtt_ms: f64,
    pub(super) rtt_min_ms: f64,
    pub(super) queueing_ms: Spread,
    /// Lost packets of all that were sent.
    pub(super) lost_share: f64,
    /// Bytes in lost packets, which are sent again, of all UDP payload.
    pub(super) retransmitted_share: f64,
    pub(super) udp_payload_bytes: u64,
    pub(super) cpu_s_per_gib: Option<f64>,
}

/// Some points of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) p50: f64,
    pub(super) p95: f64,
}

/// The control stream as lines.
#[derive(Debug)]
pub(super) struct Lines {
    sender: ControlSender,
    receiver: ControlReceiver,
    buffer: BytesMut,
}

impl Lines {
    pub(super) fn new(control: ControlStream) -> Self {
        let ControlStream { sender, receiver } = control;
        Self {
            sender,
            receiver,
            buffer: BytesMut::new(),
        }
    }

    pub(super) async fn say(&mut self, message: &Message) -> Result<()> {
        let mut line = serde_json::to_vec(message).context("writing a message")?;
        line.push(b'\n');
        Ok(self.sender.send(Bytes::from(line)).await?)
    }

    /// The other side's next line. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Message> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return serde_json::from_slice(&line).context("the other side's message");
            }
            if self.buffer.len() > LINE_MAX_BYTES {
                bail!("the other side's message is longer than {LINE_MAX_BYTES} bytes");
            }
            if self.receiver.recv_some(&mut self.buffer).await?.is_none() {
                bail!("the other side ended the measurement");
            }
        }
    }
}
