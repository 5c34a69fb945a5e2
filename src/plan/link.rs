//! The link to a target that waits, and what that target holds: measured by a short probe.
//!
//! ```text
//! <- Ready    -> filler on the lanes    <- Progress: how much has come
//!             -> Probe, Query..         <- LayoutTaken, Known..: what need not cross
//! ```

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;
use transport::quic::probe::Filler;
use transport::quic::{CloseCode, LinkSample};
use transport::session::probe::{LinkMeter, MeasuredRate};
use transport::wire::limits::{PROBE_MAX_BYTES, PROBE_MAX_MS};
use transport::wire::{Frame, Offer};

use crate::estimate::to_f64;
use crate::peer::{Peer, send_frame};
use crate::waiting::{next, now};

/// How often the meter is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Longest wait for the target's first word.
const READY_MAX: Duration = Duration::from_secs(5);
/// Longest probe: the target's limit, less a round trip and the time that it takes to say hello.
const PROBE_MAX: Duration = Duration::from_millis(PROBE_MAX_MS - 1_000);
/// Prefixes of one question frame, and frames without an answer.
const FRAME_PAGES: usize = 2048;
const UNANSWERED_MAX: usize = 4;
/// Filler that is never sent: what the target would refuse.
const MARGIN_BYTES: u64 = 16 << 20;
/// IP and UDP headers of a packet.
const HEADER_BYTES: f64 = 28.0;

/// What the look at memory wants to know from the target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Digests of some ranges of this side's checkpoint.
    pub(crate) ranges: Vec<(u32, [u8; 16])>,
    /// First bytes of the hashes of some pages.
    pub(crate) prefixes: Vec<[u8; 8]>,
}

/// The link as the probe saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct LinkSeen {
    /// Lane bytes per second at the target.
    pub(crate) rate: MeasuredRate,
    pub(crate) rtt_min: Duration,
    pub(crate) lost_share: f64,
    /// Bytes of IP that were sent for each lane byte that came, repeats included.
    pub(crate) sent_per_byte: f64,
    /// Bytes of IP that came back for each.
    pub(crate) back_per_byte: f64,
}

/// What the target said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TargetSaid {
    /// Version of its QEMU; empty when it only answers probes.
    pub(crate) qemu: String,
    /// Pages of disk images that it may name.
    pub(crate) known_pages: u32,
    /// For each wanted range: it holds the same.
    pub(crate) held: Vec<bool>,
    /// For each wanted prefix: it can name such a page.
    pub(crate) known: Vec<bool>,
}

/// A probe that runs.
#[derive(Debug)]
pub(crate) struct LinkProbe {
    peer: Peer,
    pub(crate) nonce: [u8; 16],
    filler: Option<Filler>,
    meter: LinkMeter,
    base: LinkSample,
    lane_bytes: u64,
    said: TargetSaid,
    wanted: Option<Wanted>,
    has_offer: bool,
    /// Prefixes that were asked, and frames of them without an answer.
    asked: usize,
    unanswered: usize,
}

impl LinkProbe {
    /// Waits for the target's first word and begins to fill the link, at most at `bytes_per_s_max`.
    pub(crate) async fn begin(
        mut peer: Peer,
        bytes_per_s_max: Option<u64>,
    ) -> anyhow::Result<LinkProbe> {
        let first = timeout(READY_MAX, peer.inbox.next())
            .await
            .context("the target says nothing")?;
        #[expect(clippy::wildcard_enum_match_arm, reason = "anything else is refused")]
        let (qemu, nonce) = match first.map_err(anyhow::Error::msg)? {
            Frame::Ready { qemu, nonce, .. } => (qemu, nonce),
            Frame::Abort { detail, .. } => bail!("the target refused: {detail}"),
            other => bail!("the target began with {}", other.name()),
        };
        let base = peer.connection.link_sample();
        let lanes = peer.connection.open_lanes().await?;
        let filler = Filler::start(lanes, PROBE_MAX_BYTES - MARGIN_BYTES, bytes_per_s_max);
        Ok(LinkProbe {
            peer,
            nonce,
            filler: Some(filler),
            meter: LinkMeter::default(),
            base,
            lane_bytes: 0,
            said: TargetSaid {
                qemu,
                ..TargetSaid::default()
            },
            wanted: None,
            has_offer: false,
            asked: 0,
            unanswered: 0,
        })
    }

    /// Measures until the rate has settled and every question has its answer, then closes.
    pub(crate) async fn run(
        mut self,
        wanted: mpsc::Receiver<Wanted>,
    ) -> anyhow::Result<(LinkSeen, TargetSaid)> {
        let mut wanted = Some(wanted);
        let mut seen = None;
        let deadline = now() + PROBE_MAX;
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        while seen.is_none() || !self.is_answered() {
            tokio::select! {
                frame = self.peer.inbox.next() => {
                    self.frame(frame.map_err(anyhow::Error::msg)?)?;
                    self.ask().await?;
                }
                asked = next(&mut wanted) => {
                    let ranges = asked.ranges.clone();
                    self.wanted = Some(asked);
                    send_frame(&mut self.peer.sender, &Frame::Probe { ranges }).await?;
                }
                _ = ticks.tick() => {
                    let rtt = self.peer.connection.link_sample().rtt;
                    if seen.is_none() && self.meter.has_settled(now(), rtt) {
                        seen = self.seen();
                        self.filler = None;
                    }
                }
            }
            if now() >= deadline {
                break;
            }
        }
        let seen = seen.or_else(|| self.seen());
        self.peer.connection.close(CloseCode::Done, "probed");
        let seen = seen.context(
            "too little came through the link to measure it: is it up, and is nothing else filling it?",
        )?;
        let asked = self.wanted.as_ref();
        self.said
            .known
            .resize(asked.map_or(0, |asked| asked.prefixes.len()), false);
        Ok((seen, self.said))
    }

    fn is_answered(&self) -> bool {
        let Some(wanted) = &self.wanted else {
            return false;
        };
        self.has_offer
            && self.unanswered == 0
            && (self.said.known_pages == 0 || self.asked == wanted.prefixes.len())
    }

    fn frame(&mut self, frame: Frame) -> anyhow::Result<()> {
        #[expect(clippy::wildcard_enum_match_arm, reason = "all others are refused")]
        match frame {
            Frame::Progress { applied_bytes } => {
                let sum = |sum: u64, bytes: &u64| sum.saturating_add(*bytes);
                self.lane_bytes = applied_bytes.iter().fold(0, sum);
                self.meter.record(now(), self.lane_bytes);
            }
            Frame::LayoutTaken { basis, offer } => self.offered(&basis, offer),
            Frame::Known { numbers, .. } => {
                let left = self.asked.saturating_sub(self.said.known.len());
                if self.unanswered == 0 || numbers.len() > left {
                    bail!("the target answered what was not asked");
                }
                self.unanswered -= 1;
                self.said.known.extend(numbers.iter().map(Option::is_some));
            }
            Frame::Abort { detail, .. } => bail!("the target ended the probe: {detail}"),
            other => bail!("the target sent {} in a probe", other.name()),
        }
        Ok(())
    }

    fn offered(&mut self, basis: &Bytes, offer: Offer) {
        let ranges = self.wanted.as_ref().map_or(0, |wanted| wanted.ranges.len());
        let bit = |place: usize| {
            let bits = basis.get(place / 8);
            bits.is_some_and(|bits| bits & (1 << (place % 8)) != 0)
        };
        self.said.held = (0..ranges).map(bit).collect();
        self.said.known_pages = offer.known_pages;
        self.has_offer = true;
    }

    /// Asks for the next pages, a few frames ahead of the answers.
    async fn ask(&mut self) -> anyhow::Result<()> {
        let Some(wanted) = &self.wanted else {
            return Ok(());
        };
        while self.said.known_pages > 0
            && self.unanswered < UNANSWERED_MAX
            && self.asked < wanted.prefixes.len()
        {
            let rest = &wanted.prefixes[self.asked..];
            let prefixes = rest[..rest.len().min(FRAME_PAGES)].to_vec();
            let first = u32::try_from(self.asked).context("too many questions")?;
            self.asked += prefixes.len();
            self.unanswered += 1;
            let query = Frame::Query { first, prefixes };
            send_frame(&mut self.peer.sender, &query).await?;
        }
        Ok(())
    }

    fn seen(&self) -> Option<LinkSeen> {
        let (best, last) = (self.meter.best()?, self.meter.rate()?);
        // A host that was busy for a moment is slower than its link at the end, and catches up at its best.
        let rate = MeasuredRate {
            low: best.low.min(last.low),
            mean: f64::midpoint(best.mean, last.mean),
            high: best.high.max(last.high),
        };
        let link = self.peer.connection.link_sample();
        let mtu = f64::from(link.mtu);
        let ip = |after: u64, before: u64| {
            to_f64(after.saturating_sub(before)) * (1.0 + HEADER_BYTES / mtu)
        };
        // What is on its way was sent and has not come.
        let came = to_f64(self.lane_bytes)
            + rate.mean * (link.rtt_min + link.queueing).as_secs_f64().min(1.0);
        let lost = link.lost_packets.saturating_sub(self.base.lost_packets);
        let sent = link.sent_packets.saturating_sub(self.base.sent_packets);
        Some(LinkSeen {
            rate,
            rtt_min: link.rtt_min,
            lost_share: if sent > 0 {
                to_f64(lost) / to_f64(sent)
            } else {
                0.0
            },
            sent_per_byte: (ip(link.udp_tx_bytes, self.base.udp_tx_bytes) / came.max(1.0))
                .clamp(1.0, 2.0),
            back_per_byte: (ip(link.udp_rx_bytes, self.base.udp_rx_bytes) / came.max(1.0))
                .clamp(0.0, 1.0),
        })
    }
}
