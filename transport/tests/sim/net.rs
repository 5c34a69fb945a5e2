//! The connection: QUIC seen from above, reliable ordered streams over a modelled link each way.
//!
//! ```text
//! send -> [stream queues] -> window -> Link (rate, delay, jitter) -> poll
//!          control first, then lanes in turn
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use testbed_link::{Link, LinkParams, Verdict};
use transport::block::LANES;
use transport::wire::Frame;

/// The control stream; lane `n` is stream `n + 1`.
pub(crate) const CONTROL: usize = 0;
const STREAMS: usize = LANES + 1;
/// Payload of one packet.
const SEGMENT_BYTES: usize = 1350;
/// Headers of one packet.
const HEADER_BYTES: usize = 50;

/// A direction of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToTarget,
    ToSource,
}

/// What comes out at the far end.
#[derive(Debug)]
pub(crate) enum Arrived {
    Bytes(usize, Bytes),
    /// The peer closed the connection after everything that it said.
    Closed,
}

#[derive(Debug)]
struct Segment {
    connection: u32,
    bytes: usize,
    arrived: Arrived,
}

#[derive(Debug, Default)]
struct Sender {
    queues: [VecDeque<Bytes>; STREAMS],
    queued_bytes: [usize; STREAMS],
    flying_bytes: usize,
    next_lane: usize,
    closing: bool,
    closed: bool,
}

/// Both directions.
#[derive(Debug)]
pub(crate) struct Net {
    links: [Link<Segment>; 2],
    senders: [Sender; 2],
    connection: u32,
    window_bytes: usize,
    /// The connection has lost packets for good; both sides will notice.
    is_dead: bool,
}

impl Net {
    pub(crate) fn new(params: LinkParams, seed: u64) -> Net {
        // What waits is bounded by the window, so that nothing is dropped: loss is QUIC's business.
        let params = LinkParams {
            buffer_bytes: u64::MAX / 2,
            ..params
        };
        let link = |seed| Link::new(params, seed).expect("sound parameters");
        let rtt_s = 2.0 * (params.delay + params.jitter).as_secs_f64();
        let product = Duration::from_secs_f64(rtt_s * 2.0)
            .as_micros()
            .saturating_mul(u128::from(params.rate_bps))
            / 8_000_000;
        Net {
            links: [link(seed), link(seed ^ 1)],
            senders: Default::default(),
            connection: 0,
            is_dead: false,
            window_bytes: usize::try_from(product).unwrap_or(usize::MAX).max(65_536),
        }
    }

    pub(crate) fn send(&mut self, way: Way, stream: usize, bytes: Bytes) {
        let sender = &mut self.senders[index(way)];
        if sender.closing {
            return;
        }
        sender.queued_bytes[stream] += bytes.len();
        sender.queues[stream].push_back(bytes);
    }

    /// Bytes of a stream that the link has not taken.
    pub(crate) fn queued_bytes(&self, way: Way, stream: usize) -> usize {
        self.senders[index(way)].queued_bytes[stream]
    }

    /// Ends one side's sending: its control stream goes out, its lanes do not.
    pub(crate) fn close(&mut self, way: Way) {
        let sender = &mut self.senders[index(way)];
        for stream in 1..STREAMS {
            sender.queues[stream].clear();
            sender.queued_bytes[stream] = 0;
        }
        sender.closing = true;
    }

    /// A side's process is gone: nothing more of what it queued leaves.
    pub(crate) fn silence(&mut self, way: Way) {
        let flying_bytes = self.senders[index(way)].flying_bytes;
        self.senders[index(way)] = Sender {
            closing: true,
            closed: true,
            flying_bytes,
            ..Sender::default()
        };
    }

    /// Gives the link what its window takes.
    pub(crate) fn pump(&mut self, now: Duration) {
        if self.is_dead {
            return;
        }
        for way in [Way::ToTarget, Way::ToSource] {
            while self.senders[index(way)].flying_bytes < self.window_bytes {
                let Some(arrived) = self.next_segment(way) else {
                    break;
                };
                let payload = match &arrived {
                    Arrived::Bytes(_, bytes) => bytes.len(),
                    Arrived::Closed => 0,
                };
                let segment = Segment {
                    connection: self.connection,
                    bytes: payload,
                    arrived,
                };
                let length = u32::try_from(payload + HEADER_BYTES).expect("a packet is small");
                match self.links[index(way)].offer(now, length, segment) {
                    Verdict::Queued | Verdict::CutDrop => {
                        self.senders[index(way)].flying_bytes += payload;
                    }
                    Verdict::QueueDrop => unreachable!("the buffer is larger than any window"),
                }
            }
        }
    }

    fn next_segment(&mut self, way: Way) -> Option<Arrived> {
        let sender = &mut self.senders[index(way)];
        let lanes = (0..LANES).map(|nth| 1 + (sender.next_lane + nth) % LANES);
        let stream = std::iter::once(CONTROL)
            .chain(lanes)
            .find(|stream| !sender.queues[*stream].is_empty());
        let Some(stream) = stream else {
            let close = sender.closing && !sender.closed;
            sender.closed |= close;
            return close.then_some(Arrived::Closed);
        };
        if stream != CONTROL {
            sender.next_lane = stream % LANES;
        }
        let front = sender.queues[stream].front_mut()?;
        let bytes = front.split_to(front.len().min(SEGMENT_BYTES));
        if front.is_empty() {
            sender.queues[stream].pop_front();
        }
        sender.queued_bytes[stream] -= bytes.len();
        Some(Arrived::Bytes(stream, bytes))
    }

    /// When [`poll`](Self::poll) may have something.
    pub(crate) fn next_delivery(&self) -> Option<Duration> {
        self.links.iter().filter_map(Link::next_delivery).min()
    }

    pub(crate) fn poll(&mut self, now: Duration) -> Option<(Way, Arrived)> {
        for way in [Way::ToTarget, Way::ToSource] {
            while let Some(segment) = self.links[index(way)].poll(now) {
                if segment.connection == self.connection {
                    self.senders[index(way)].flying_bytes -= segment.bytes;
                    return Some((way, segment.arrived));
                }
            }
        }
        None
    }

    /// A new connection: nothing of the old one counts.
    pub(crate) fn connect(&mut self) {
        self.connection += 1;
        self.is_dead = false;
        self.senders = Default::default();
    }

    pub(crate) fn connection(&self) -> u32 {
        self.connection
    }

    pub(crate) fn cut(&mut self, now: Duration) {
        self.is_dead = true;
        self.links.iter_mut().for_each(|link| link.cut(now));
    }

    pub(crate) fn mend(&mut self) {
        self.links.iter_mut().for_each(Link::mend);
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.links.iter().any(Link::is_cut)
    }
}

fn index(way: Way) -> usize {
    match way {
        Way::ToTarget => 0,
        Way::ToSource => 1,
    }
}

/// A frame's bytes.
pub(crate) fn encoded(frame: &Frame) -> Bytes {
    let mut out = BytesMut::new();
    frame
        .encode(&mut out)
        .expect("frames of a session are within limits");
    out.freeze()
}
