//! The machine: one queue, one serialiser, packets in flight.
//!
//! Work is done lazily: [`Link::offer`], [`Link::poll`] and the setters first bring the serialiser
//! up to `now`. A packet's fate behind the queue (loss, delay) is drawn when its last bit leaves.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use crate::{LinkParams, Loss, ParamError, Random};

/// What became of an offered packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It waits or is being sent. It may still get lost behind the queue.
    Queued,
    /// The queue was full, or the policer's bucket empty.
    QueueDrop,
    /// The link is cut.
    CutDrop,
}

/// Packets and their IP bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Number of packets.
    pub packets: u64,
    /// Their IP bytes.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, len_bytes: u32) {
        self.packets += 1;
        self.bytes += u64::from(len_bytes);
    }
}

/// What a link has done so far.
///
/// `offered` is the sum of the others and of what is still under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// All that was offered.
    pub offered: Count,
    /// All that left the far end.
    pub delivered: Count,
    /// Did not fit the queue, or was too much for the policer.
    pub queue_drops: Count,
    /// Lost behind the queue.
    pub losses: Count,
    /// Offered while the link was cut, or on it when it was cut.
    pub cut_drops: Count,
    /// The most bytes that ever waited in the queue.
    pub queue_bytes_max: u64,
}

/// One direction of a link, carrying packets of type `P`.
#[derive(Debug)]
pub struct Link<P> {
    params: LinkParams,
    random: Random,
    is_cut: bool,
    counters: Counters,
    /// Waiting packets; the serialiser works on the front one.
    queue: VecDeque<(u32, P)>,
    queue_bytes: u64,
    /// When the front packet's last bit leaves. Meaningful while the queue is not empty.
    front_done_ns: u64,
    /// When the last packet's last bit left: the next one starts no earlier, even if it is offered
    /// with an earlier time than that of the last poll.
    idle_from_ns: u64,
    /// Part of a nanosecond, in bits * 10^9 modulo the rate, so that rounding never adds up.
    carry: u64,
    in_flight: BinaryHeap<Reverse<InFlight<P>>>,
    departures: u64,
    last_delivery_ns: u64,
    in_burst: bool,
    jitter_ns: u64,
    jitter_until_ns: u64,
    /// What the policer has let pass and its rate has not yet paid for, in bits * 10^9, and when
    /// that was.
    policed: u128,
    policed_ns: u64,
}

#[derive(Debug)]
struct InFlight<P> {
    /// Delivery time, then order of departure.
    due: (u64, u64),
    len_bytes: u32,
    packet: P,
}

impl<P> PartialEq for InFlight<P> {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl<P> Eq for InFlight<P> {}

impl<P> PartialOrd for InFlight<P> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<P> Ord for InFlight<P> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

impl<P> Link<P> {
    /// An idle link. Its chance follows from `seed`.
    ///
    /// # Errors
    /// If a parameter is out of range.
    pub fn new(params: LinkParams, seed: u64) -> Result<Self, ParamError> {
        params.check()?;
        Ok(Self {
            params,
            random: Random::new(seed),
            is_cut: false,
            counters: Counters::default(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            front_done_ns: 0,
            idle_from_ns: 0,
            carry: 0,
            in_flight: BinaryHeap::new(),
            departures: 0,
            last_delivery_ns: 0,
            in_burst: false,
            jitter_ns: 0,
            jitter_until_ns: 0,
            policed: 0,
            policed_ns: 0,
        })
    }

    /// Puts a packet of `len_bytes` IP bytes into the queue, if the link takes it.
    pub fn offer(&mut self, now: Duration, len_bytes: u32, packet: P) -> Verdict {
        let now_ns = nanos(now);
        self.advance(now_ns);
        self.counters.offered.add(len_bytes);
        if self.is_cut {
            self.counters.cut_drops.add(len_bytes);
            return Verdict::CutDrop;
        }
        if !self.passes_policer(now_ns, len_bytes) {
            self.counters.queue_drops.add(len_bytes);
            return Verdict::QueueDrop;
        }
        let queue_bytes = self.queue_bytes + u64::from(len_bytes);
        if !self.queue.is_empty() && queue_bytes > self.params.buffer_bytes {
            self.counters.queue_drops.add(len_bytes);
            return Verdict::QueueDrop;
        }
        if self.queue.is_empty() {
            self.carry = 0;
            let start_ns = now_ns.max(self.idle_from_ns);
            self.front_done_ns = start_ns.saturating_add(self.sending_time_ns(len_bytes));
        }
        self.queue.push_back((len_bytes, packet));
        self.queue_bytes = queue_bytes;
        self.counters.queue_bytes_max = self.counters.queue_bytes_max.max(queue_bytes);
        Verdict::Queued
    }

    /// The earliest moment at which [`Link::poll`] may have a packet.
    ///
    /// A bound, not a promise: the packet may turn out lost or late. Ask again after `poll`.
    #[must_use]
    pub fn next_delivery(&self) -> Option<Duration> {
        let flying = self.in_flight.peek().map(|Reverse(first)| first.due.0);
        let queued = (!self.queue.is_empty())
            .then(|| self.front_done_ns.saturating_add(nanos(self.params.delay)));
        let earliest = flying.into_iter().chain(queued).min()?;
        Some(Duration::from_nanos(earliest))
    }

    /// The next packet that has left the far end by `now`. Call until `None`.
    pub fn poll(&mut self, now: Duration) -> Option<P> {
        let now_ns = nanos(now);
        self.advance(now_ns);
        if self.in_flight.peek()?.0.due.0 > now_ns {
            return None;
        }
        let Reverse(arrived) = self.in_flight.pop()?;
        self.counters.delivered.add(arrived.len_bytes);
        Some(arrived.packet)
    }

    /// What the link has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes in the queue, as of the last call that took a time.
    #[must_use]
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Its parameters.
    #[must_use]
    pub fn params(&self) -> &LinkParams {
        &self.params
    }

    /// Changes the parameters. Packets in flight keep their delivery time; the rest of the packet
    /// being sent goes at the new rate; what waits stays, even beyond a smaller buffer.
    ///
    /// # Errors
    /// If a parameter is out of range; then nothing changes.
    pub fn set_params(&mut self, now: Duration, params: LinkParams) -> Result<(), ParamError> {
        params.check()?;
        let now_ns = nanos(now);
        self.advance(now_ns);
        if !self.queue.is_empty() && params.rate_bps != self.params.rate_bps {
            let left_ns = u128::from(self.front_done_ns.saturating_sub(now_ns));
            let scaled = left_ns * u128::from(self.params.rate_bps) / u128::from(params.rate_bps);
            let left_ns = u64::try_from(scaled).unwrap_or(u64::MAX);
            self.front_done_ns = now_ns.saturating_add(left_ns);
            self.carry = 0;
        }
        self.params = params;
        Ok(())
    }

    /// Cuts the link: all that is on it is lost, and so is all that is offered until [`Link::mend`].
    pub fn cut(&mut self, now: Duration) {
        self.advance(nanos(now));
        self.is_cut = true;
        for (len_bytes, _) in self.queue.drain(..) {
            self.counters.cut_drops.add(len_bytes);
        }
        for Reverse(flying) in self.in_flight.drain() {
            self.counters.cut_drops.add(flying.len_bytes);
        }
        self.queue_bytes = 0;
        self.idle_from_ns = 0;
    }

    /// Ends a cut.
    pub fn mend(&mut self) {
        self.is_cut = false;
    }

    /// Is the link cut?
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Moves every packet whose last bit has left by `now_ns` from the queue into flight.
    fn advance(&mut self, now_ns: u64) {
        while !self.queue.is_empty() && self.front_done_ns <= now_ns {
            let left_ns = self.front_done_ns;
            self.idle_from_ns = left_ns;
            let (len_bytes, packet) = self.queue.pop_front().expect("the queue is not empty");
            self.queue_bytes -= u64::from(len_bytes);
            self.depart(left_ns, len_bytes, packet);
            if let Some((next_len, _)) = self.queue.front() {
                let next_len = *next_len;
                self.front_done_ns = left_ns.saturating_add(self.sending_time_ns(next_len));
            }
        }
    }

    fn depart(&mut self, left_ns: u64, len_bytes: u32, packet: P) {
        self.departures += 1;
        if self.is_lost() {
            self.counters.losses.add(len_bytes);
            return;
        }
        let mut due_ns = left_ns.saturating_add(nanos(self.params.delay));
        due_ns = due_ns.saturating_add(self.jitter_of(left_ns));
        if self.random.chance(self.params.reorder_share) {
            // Held back alone: those behind it must not wait for it, so it sets no bound.
            due_ns = due_ns.max(self.last_delivery_ns);
            due_ns = due_ns.saturating_add(nanos(self.params.reorder_by));
        } else if !self.params.jitter_reorders {
            due_ns = due_ns.max(self.last_delivery_ns);
            self.last_delivery_ns = due_ns;
        }
        let bunch_ns = nanos(self.params.bunch_every);
        if bunch_ns > 0 {
            due_ns = due_ns.div_ceil(bunch_ns).saturating_mul(bunch_ns);
        }
        let due = (due_ns, self.departures);
        self.in_flight.push(Reverse(InFlight {
            due,
            len_bytes,
            packet,
        }));
    }

    /// Takes a packet's bits out of the policer's bucket, if they are there.
    fn passes_policer(&mut self, now_ns: u64, len_bytes: u32) -> bool {
        let Some(policer) = self.params.policer else {
            return true;
        };
        let since_ns = now_ns.saturating_sub(self.policed_ns);
        self.policed_ns = self.policed_ns.max(now_ns);
        let paid = u128::from(policer.rate_bps) * u128::from(since_ns);
        self.policed = self.policed.saturating_sub(paid);
        let packet = u128::from(len_bytes) * 8_000_000_000;
        let passes = self.policed + packet <= u128::from(policer.burst_bytes) * 8_000_000_000;
        if passes {
            self.policed += packet;
        }
        passes
    }

    fn is_lost(&mut self) -> bool {
        match self.params.loss {
            Loss::None => false,
            Loss::Random { share } => self.random.chance(share),
            Loss::Bursts {
                share,
                mean_packets,
            } => {
                // The share of time in the bad state is enter / (enter + leave).
                let leave = 1.0 / mean_packets;
                let enter = leave * share / (1.0 - share);
                let turn = if self.in_burst { leave } else { enter };
                self.in_burst ^= self.random.chance(turn);
                self.in_burst
            }
        }
    }

    fn jitter_of(&mut self, left_ns: u64) -> u64 {
        let jitter_ns = nanos(self.params.jitter);
        if jitter_ns == 0 {
            return 0;
        }
        if self.params.jitter_reorders {
            return self.random.up_to(jitter_ns);
        }
        if left_ns >= self.jitter_until_ns {
            self.jitter_ns = self.random.up_to(jitter_ns);
            self.jitter_until_ns = left_ns.saturating_add(jitter_ns);
        }
        self.jitter_ns.min(jitter_ns)
    }

    fn sending_time_ns(&mut self, len_bytes: u32) -> u64 {
        let rate = u128::from(self.params.rate_bps);
        let bits_e9 = u128::from(len_bytes) * 8_000_000_000 + u128::from(self.carry);
        self.carry = u64::try_from(bits_e9 % rate).expect("a rest is below the rate, a u64");
        u64::try_from(bits_e9 / rate).unwrap_or(u64::MAX)
    }
}

/// Nanoseconds as a `u64`: 584 years.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
