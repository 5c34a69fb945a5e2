//! The kernel's BBR (version 1) as a flow of bare packets: somebody to share a simulated link with.
//!
//! Its model and cycle, not its corners: no long-term rate for policers, no idle restart, every packet
//! acknowledged alone, the link in order. Loss changes nothing but for the packets that are gone.
//= draft-cardwell-iccrg-bbr-congestion-control-00, sections 4.1 to 4.3

use std::collections::VecDeque;
use std::time::Duration;

/// IP bytes of a packet, and what of them is goodput.
pub(super) const PACKET_BYTES: u32 = 1500;
pub(super) const PAYLOAD_BYTES: u64 = 1448;
/// IP bytes of an acknowledgement.
pub(super) const ACK_BYTES: u32 = 52;

const HIGH_GAIN: f64 = 2.885;
const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
const RATE_ROUNDS: u64 = 10;
const RTT_WINDOW: Duration = Duration::from_secs(10);
const PROBE_RTT: Duration = Duration::from_millis(200);
const WINDOW_MIN: f64 = 4.0;

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Startup,
    Drain,
    /// Place in the cycle, and since when.
    Probe(usize, Duration),
    /// Until when, once the flight is small.
    ProbeRtt(Option<Duration>),
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    number: u64,
    at: Duration,
    delivered: u64,
    delivered_at: Duration,
    first_sent: Duration,
}

/// The sending side.
#[derive(Debug)]
pub(super) struct Rival {
    state: State,
    flight: VecDeque<Sent>,
    next_number: u64,
    delivered: u64,
    delivered_at: Duration,
    first_sent: Duration,
    /// Packets per second, by round.
    rates: VecDeque<(u64, f64)>,
    rtt_min: Option<(Duration, Duration)>,
    rounds: u64,
    round_ends: u64,
    full_rate: f64,
    stalled: u32,
    lost_in_round: bool,
    next_send: Duration,
    /// Packets that its target got.
    pub(super) received: u64,
}

impl Rival {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            state: State::Startup,
            flight: VecDeque::new(),
            next_number: 0,
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            rates: VecDeque::new(),
            rtt_min: None,
            rounds: 0,
            round_ends: 0,
            full_rate: 0.0,
            stalled: 0,
            lost_in_round: false,
            next_send: now,
            received: 0,
        }
    }

    fn rate(&self) -> Option<f64> {
        self.rates.front().map(|&(_, rate)| rate)
    }

    fn bdp(&self) -> Option<f64> {
        Some(self.rate()? * self.rtt_min?.1.as_secs_f64())
    }

    fn window(&self) -> f64 {
        let gain = match self.state {
            State::Startup | State::Drain => HIGH_GAIN,
            State::Probe(..) => 2.0,
            State::ProbeRtt(_) => return WINDOW_MIN,
        };
        self.bdp()
            .map_or(10.0, |bdp| (bdp * gain + 3.0).max(WINDOW_MIN))
    }

    fn pacing(&self) -> f64 {
        let gain = match self.state {
            State::Startup => HIGH_GAIN,
            State::Drain => 1.0 / HIGH_GAIN,
            State::Probe(place, _) => CYCLE[place],
            State::ProbeRtt(_) => 1.0,
        };
        gain * self.rate().unwrap_or(10_000.0)
    }

    /// When it next has something to do by itself.
    pub(super) fn due(&self) -> Option<Duration> {
        ((self.flight.len() as f64) < self.window()).then_some(self.next_send)
    }

    /// The number of a packet that goes out now.
    pub(super) fn send(&mut self, now: Duration) -> Option<u64> {
        if self.due()? > now {
            return None;
        }
        if self.flight.is_empty() {
            (self.delivered_at, self.first_sent) = (now, now);
        }
        self.next_send = self.next_send.max(now) + Duration::from_secs_f64(1.0 / self.pacing());
        let number = self.next_number;
        self.next_number += 1;
        self.flight.push_back(Sent {
            number,
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
        });
        Some(number)
    }

    pub(super) fn acked(&mut self, now: Duration, number: u64) {
        while self.flight.front().is_some_and(|sent| sent.number < number) {
            self.flight.pop_front();
            self.lost_in_round = true;
        }
        if self.flight.front().is_none_or(|sent| sent.number != number) {
            return;
        }
        let Some(sent) = self.flight.pop_front() else {
            return;
        };
        self.delivered += 1;
        (self.delivered_at, self.first_sent) = (now, sent.at);
        let new_round = sent.delivered >= self.round_ends;
        if new_round {
            (self.rounds, self.round_ends) = (self.rounds + 1, self.delivered);
        }
        let took = (now - sent.delivered_at).max(sent.at - sent.first_sent);
        self.take_rate((self.delivered - sent.delivered) as f64 / took.as_secs_f64());
        self.take_rtt(now, now - sent.at);
        self.step(now, new_round);
        if new_round {
            self.lost_in_round = false;
        }
    }

    fn take_rate(&mut self, rate: f64) {
        while self.rates.back().is_some_and(|&(_, last)| last <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((self.rounds, rate));
        while (self.rates.front()).is_some_and(|&(round, _)| round + RATE_ROUNDS <= self.rounds) {
            self.rates.pop_front();
        }
    }

    fn take_rtt(&mut self, now: Duration, rtt: Duration) {
        let expired = self.rtt_min.is_some_and(|(at, _)| now - at > RTT_WINDOW);
        if expired || self.rtt_min.is_none_or(|(_, least)| rtt <= least) {
            self.rtt_min = Some((now, rtt));
        }
        if expired && !matches!(self.state, State::ProbeRtt(_)) {
            self.state = State::ProbeRtt(None);
        }
    }

    fn step(&mut self, now: Duration, new_round: bool) {
        let bdp = self.bdp().unwrap_or(0.0);
        let flight = self.flight.len() as f64;
        self.state = match self.state {
            State::Startup if new_round => {
                let rate = self.rate().unwrap_or(0.0);
                if rate >= self.full_rate * 1.25 {
                    (self.full_rate, self.stalled) = (rate, 0);
                } else {
                    self.stalled += 1;
                }
                if self.stalled >= 3 {
                    State::Drain
                } else {
                    State::Startup
                }
            }
            State::Drain if flight <= bdp => State::Probe(2, now),
            State::Probe(place, since) => {
                let least = self.rtt_min.map_or(Duration::ZERO, |(_, rtt)| rtt);
                let over = now - since > least;
                let next = match place {
                    0 => over && (self.lost_in_round || flight >= 1.25 * bdp),
                    1 => over || flight <= bdp,
                    _ => over,
                };
                if next {
                    State::Probe((place + 1) % CYCLE.len(), now)
                } else {
                    State::Probe(place, since)
                }
            }
            State::ProbeRtt(None) if flight <= WINDOW_MIN => State::ProbeRtt(Some(now + PROBE_RTT)),
            State::ProbeRtt(Some(until)) if now >= until => State::Probe(2, now),
            other @ (State::Startup | State::Drain | State::ProbeRtt(_)) => other,
        };
    }
}
