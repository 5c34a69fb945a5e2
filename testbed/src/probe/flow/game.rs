//! A flow like a game's: a small datagram every 20 ms, and how late each one is.
//!
//! Both ends stamp by the machine's clock, which all hosts share, so the delay is that of one way.

use std::io::{self, Write};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::host::{Host, HostProcess};
use crate::probe::lines::Lines;
use crate::probe::ping::{percentile, to_ms};

const INTERVAL: Duration = Duration::from_millis(20);
/// Payload; a game's state between two ticks.
const DATAGRAM_BYTES: usize = 150;
const STAMP_BYTES: usize = 16;
const START_MAX: Duration = Duration::from_secs(15);

/// One datagram that arrived.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Arrival {
    number: u64,
    sent_us: u64,
    at_us: u64,
}

/// Both ends at work.
#[derive(Debug)]
pub struct GameProbe {
    receiver: Lines<Arrival>,
    /// Ends when this is dropped.
    sender: HostProcess,
}

/// All that arrived.
#[derive(Clone, Debug, Default)]
pub struct GameLog {
    /// By number.
    arrivals: Vec<Arrival>,
}

/// Figures of the datagrams that were sent in a span.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GameStats {
    /// Median of one way.
    pub p50_ms: Option<f64>,
    /// 95th percentile.
    pub p95_ms: Option<f64>,
    /// Mean difference between one datagram's delay and the next one's.
    pub jitter_ms: Option<f64>,
    /// Share that never arrived.
    pub lost_share: Option<f64>,
}

impl GameProbe {
    /// Starts the flow from one host to an address of another; returns once it arrives. `program` is
    /// the testbed's.
    ///
    /// # Errors
    /// If an end cannot be started, or nothing arrives in 15 s.
    pub fn start(
        from: &Host,
        to: &Host,
        address: SocketAddr,
        program: &Path,
    ) -> anyhow::Result<Self> {
        let address_word = address.to_string();
        let mut command = to.prompt_command(program);
        let receiver = Lines::start(to, command.args(["__game-receive", &address_word]))?;
        let mut command = from.prompt_command(program);
        let sender = from.spawn(command.args(["__game-send", &address_word]))?;
        clock::wait_until("the first datagram of the game", START_MAX, || {
            Ok((!receiver.so_far().is_empty()).then_some(()))
        })?;
        Ok(Self { receiver, sender })
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it cannot be ended.
    pub fn stop(mut self) -> anyhow::Result<GameLog> {
        self.sender.kill()?;
        Ok(GameLog::of(self.receiver.stop()?))
    }
}

impl GameLog {
    /// Duplicates count once, by their first arrival.
    fn of(mut arrivals: Vec<Arrival>) -> Self {
        arrivals.sort_by_key(|arrival| (arrival.number, arrival.at_us));
        arrivals.dedup_by_key(|arrival| arrival.number);
        Self { arrivals }
    }

    /// Figures of what was sent from `from_us` up to `to_us`.
    #[must_use]
    pub fn span(&self, from_us: u64, to_us: u64) -> GameStats {
        let begin = self
            .arrivals
            .partition_point(|arrival| arrival.sent_us < from_us);
        let end = self
            .arrivals
            .partition_point(|arrival| arrival.sent_us < to_us)
            .max(begin);
        let within = &self.arrivals[begin..end];
        let delay = |arrival: &Arrival| arrival.at_us.saturating_sub(arrival.sent_us);
        let steps: Vec<u64> = within
            .windows(2)
            .map(|pair| delay(&pair[0]).abs_diff(delay(&pair[1])))
            .collect();
        let mut delays: Vec<u64> = within.iter().map(delay).collect();
        delays.sort_unstable();
        GameStats {
            p50_ms: percentile(&delays, 50).map(to_ms),
            p95_ms: percentile(&delays, 95).map(to_ms),
            jitter_ms: mean(&steps).map(|mean_us| mean_us / 1000.0),
            lost_share: self.lost_share(begin, end),
        }
    }

    /// Of those numbers that lie between the last before the span and the first after it.
    fn lost_share(&self, begin: usize, end: usize) -> Option<f64> {
        let number = |place: usize| self.arrivals.get(place).map(|arrival| arrival.number);
        let first = match begin.checked_sub(1) {
            Some(before) => number(before)? + 1,
            None => number(0)?,
        };
        let last = match number(end) {
            Some(after) => after.checked_sub(1)?,
            None => self.arrivals.last()?.number,
        };
        let sent = u32::try_from((last + 1).checked_sub(first)?).ok()?;
        let arrived = u32::try_from(end - begin).ok()?;
        (sent > 0).then(|| f64::from(sent.saturating_sub(arrived)) / f64::from(sent))
    }
}

fn mean(values: &[u64]) -> Option<f64> {
    let count = u32::try_from(values.len())
        .ok()
        .filter(|count| *count > 0)?;
    let sum = u32::try_from(values.iter().sum::<u64>()).map_or(f64::INFINITY, f64::from);
    Some(sum / f64::from(count))
}

/// Sends for ever.
///
/// # Errors
/// If there is no socket to send from.
pub fn send(to: SocketAddr) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("make a socket")?;
    let mut due = clock::now();
    for number in 0_u64.. {
        let mut datagram = [0; DATAGRAM_BYTES];
        datagram[..8].copy_from_slice(&number.to_be_bytes());
        datagram[8..STAMP_BYTES].copy_from_slice(&clock::epoch_us().to_be_bytes());
        // A network that is not there yet, or not any more, is what a player meets too.
        drop(socket.send_to(&datagram, to));
        due += INTERVAL;
        clock::pause(due.saturating_duration_since(clock::now()));
    }
    Ok(())
}

/// Receives for ever; one `Arrival` as JSON a line on stdout.
///
/// # Errors
/// If the address cannot be used, or stdout is gone.
pub fn receive(at: SocketAddr) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(at).with_context(|| format!("listen on {at}"))?;
    let mut stdout = io::stdout().lock();
    let mut datagram = [0; DATAGRAM_BYTES];
    loop {
        let len = socket.recv(&mut datagram).context("receive")?;
        let at_us = clock::epoch_us();
        let Ok((number, sent_us)) = stamps(&datagram[..len]) else {
            continue;
        };
        let arrival = Arrival {
            number,
            sent_us,
            at_us,
        };
        writeln!(stdout, "{}", serde_json::to_string(&arrival)?).context("write an arrival")?;
    }
}

fn stamps(datagram: &[u8]) -> anyhow::Result<(u64, u64)> {
    ensure!(datagram.len() == DATAGRAM_BYTES, "none of ours");
    let number = datagram[..8].try_into().map(u64::from_be_bytes)?;
    let sent_us = datagram[8..STAMP_BYTES]
        .try_into()
        .map(u64::from_be_bytes)?;
    Ok((number, sent_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(number: u64, delay_us: u64) -> Arrival {
        let sent_us = number * 20_000;
        Arrival {
            number,
            sent_us,
            at_us: sent_us + delay_us,
        }
    }

    /// 100 datagrams, every second one 10 ms later, ten lost in a row; then a span in which all were.
    #[test]
    fn figures() {
        let arrivals = (0..100)
            .filter(|number| !(40..50).contains(number))
            .map(|number| arrival(number, 25_000 + number % 2 * 10_000));
        let mut twice: Vec<Arrival> = arrivals.collect();
        twice.push(arrival(7, 900_000));
        let log = GameLog::of(twice);
        let all = log.span(0, 2_000_000);
        assert_eq!((all.p50_ms, all.p95_ms), (Some(25.0), Some(35.0)));
        assert_eq!(all.jitter_ms, Some(10.0));
        assert_eq!(all.lost_share, Some(0.1));
        let none = log.span(800_000, 1_000_000);
        assert_eq!((none.p50_ms, none.lost_share), (None, Some(1.0)));
        assert_eq!(
            log.span(0, 800_000).lost_share,
            Some(0.2),
            "those after it too"
        );
        assert_eq!(GameLog::default().span(0, 1), GameStats::default());
    }

    /// What is sent is read again; other datagrams are not.
    #[test]
    fn datagrams() {
        let mut datagram = [0; DATAGRAM_BYTES];
        datagram[7] = 3;
        datagram[15] = 9;
        assert_eq!(stamps(&datagram).unwrap(), (3, 9));
        assert!(stamps(&datagram[..40]).is_err());
    }
}
