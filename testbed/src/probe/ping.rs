//! Pings at a steady interval, and what their answers say.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use rustix::process::Signal;

use crate::clock;
use crate::host::{Host, HostProcess};

/// Answers kept: 200 s at 10 ms would be 20 000.
const REPLIES_MAX: usize = 1_000_000;
/// A ping counts as lost only if its answer had so long to come.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// An answer that takes longer is of no use to its user: a guest that answers everything seconds
/// late is out of service as one that is silent.
const TIMELY: Duration = Duration::from_secs(1);

/// A running `ping`.
#[derive(Debug)]
pub struct PingProbe {
    process: HostProcess,
    reader: JoinHandle<PingLog>,
    interval_us: u64,
}

/// One answered ping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reply {
    /// When the ping left, microseconds since 1970.
    pub sent_us: u64,
    /// How long its answer took.
    pub rtt_us: u64,
}

/// All that a probe saw.
#[derive(Clone, Debug, Default)]
pub struct PingLog {
    /// By sequence number, counted on beyond 65535.
    pub replies: BTreeMap<u64, Reply>,
    /// Pings sent, as far as known: the greatest number seen.
    pub sent: u64,
    /// Time between two pings.
    pub interval_us: u64,
    /// When the probe was stopped.
    pub stopped_us: u64,
}

/// Figures of a span.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PingStats {
    /// Pings sent in the span that had time to be answered.
    pub sent: u64,
    /// Of those, never answered.
    pub lost: u64,
    /// Of those, answered after more than a second.
    pub late: u64,
    /// Longest time between two answers that arrived in the span, less one interval; None with
    /// fewer than two.
    pub longest_gap_ms: Option<f64>,
    /// The same without late answers, up to the last ping that had time to be answered; None
    /// without any in time.
    pub outage_ms: Option<f64>,
    /// Median round trip.
    pub rtt_p50_ms: Option<f64>,
    /// 95th percentile.
    pub rtt_p95_ms: Option<f64>,
}

impl PingProbe {
    /// Starts pinging `address` from `host` every `interval` (2 ms or more).
    ///
    /// # Errors
    /// If `ping` cannot be started.
    pub fn start(host: &Host, address: &str, interval: Duration) -> anyhow::Result<Self> {
        let interval_s = format!("{:.3}", interval.as_secs_f64());
        let mut command = host.command("ping");
        command
            .args(["-D", "-O", "-n", "-i", &interval_s, address])
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut process = host.spawn(&mut command)?;
        let stdout = process
            .child()
            .stdout
            .take()
            .context("ping's output is no pipe")?;
        let reader = std::thread::spawn(move || read(BufReader::new(stdout)));
        let interval_us = u64::try_from(interval.as_micros()).unwrap_or(u64::MAX);
        Ok(Self {
            process,
            reader,
            interval_us,
        })
    }

    /// Ends `ping` and gives what it saw. Pings of the last 2 s that have no answer yet count neither as
    /// sent nor as lost.
    ///
    /// # Errors
    /// If `ping` had ended by itself.
    pub fn stop(mut self) -> anyhow::Result<PingLog> {
        let stopped_us = clock::epoch_us();
        self.process.signal(Signal::INT).context("end ping")?;
        self.process.wait()?;
        let log = self
            .reader
            .join()
            .map_err(|_| anyhow::anyhow!("reading ping's output failed"))?;
        Ok(PingLog {
            interval_us: self.interval_us,
            stopped_us,
            ..log
        })
    }
}

impl PingLog {
    /// Figures of the pings that left from `from_us` up to `to_us`.
    #[must_use]
    pub fn span(&self, from_us: u64, to_us: u64) -> PingStats {
        let within = |at_us: u64| (from_us..to_us).contains(&at_us);
        let replies: Vec<_> = self
            .replies
            .iter()
            .filter(|(_, reply)| within(reply.sent_us))
            .collect();
        let mut rtts: Vec<u64> = replies.iter().map(|(_, reply)| reply.rtt_us).collect();
        rtts.sort_unstable();
        let (sent, lost) = self.sent_and_lost(from_us, to_us);
        PingStats {
            sent,
            lost,
            late: count(rtts.iter().filter(|rtt| !is_timely(**rtt)).count()),
            longest_gap_ms: self.longest_gap_us(from_us, to_us).map(to_ms),
            outage_ms: self.outage_us(from_us, to_us).map(to_ms),
            rtt_p50_ms: percentile(&rtts, 50).map(to_ms),
            rtt_p95_ms: percentile(&rtts, 95).map(to_ms),
        }
    }

    /// When was ping `number` sent? Answered ones say so; others lie between them.
    fn sent_us(&self, number: u64) -> Option<u64> {
        let before = self.replies.range(..=number).next_back();
        let after = self.replies.range(number..).next();
        match (before, after) {
            (Some((first, reply)), None) => {
                Some(reply.sent_us + (number - first) * self.interval_us)
            }
            (None, Some((last, reply))) => reply
                .sent_us
                .checked_sub((last - number) * self.interval_us),
            (Some((first, _)), Some((last, reply))) if first == last => Some(reply.sent_us),
            (Some((first, early)), Some((last, late))) => {
                let step = late.sent_us.saturating_sub(early.sent_us) / (last - first);
                Some(early.sent_us + (number - first) * step)
            }
            (None, None) => None,
        }
    }

    fn sent_and_lost(&self, from_us: u64, to_us: u64) -> (u64, u64) {
        let patience = u64::try_from(ANSWER_LIMIT.as_micros()).unwrap_or(u64::MAX);
        let answerable_to = to_us.min(self.stopped_us.saturating_sub(patience));
        let mut counts = (0, 0);
        for number in 1..=self.sent {
            let answered = self.replies.contains_key(&number);
            let Some(sent_us) = self.sent_us(number) else {
                continue;
            };
            let limit = if answered { to_us } else { answerable_to };
            if (from_us..limit).contains(&sent_us) {
                counts.0 += 1;
                counts.1 += u64::from(!answered);
            }
        }
        counts
    }

    fn longest_gap_us(&self, from_us: u64, to_us: u64) -> Option<u64> {
        self.gap_us(&self.arrivals(from_us, to_us, |_| true))
    }

    fn outage_us(&self, from_us: u64, to_us: u64) -> Option<u64> {
        let mut arrivals = self.arrivals(from_us, to_us, is_timely);
        // An outage that was not over when nobody looked any more.
        let patience = u64::try_from(TIMELY.as_micros()).unwrap_or(u64::MAX);
        let end_us = to_us.min(self.stopped_us.saturating_sub(patience));
        if arrivals.last()? < &end_us {
            arrivals.push(end_us);
        }
        self.gap_us(&arrivals)
    }

    /// When answers arrived, in order.
    fn arrivals(&self, from_us: u64, to_us: u64, counts: fn(u64) -> bool) -> Vec<u64> {
        let mut arrivals: Vec<u64> = self
            .replies
            .values()
            .filter(|reply| counts(reply.rtt_us))
            .map(|reply| reply.sent_us + reply.rtt_us)
            .filter(|at_us| (from_us..to_us).contains(at_us))
            .collect();
        arrivals.sort_unstable();
        arrivals
    }

    fn gap_us(&self, arrivals: &[u64]) -> Option<u64> {
        let longest = arrivals.windows(2).map(|pair| pair[1] - pair[0]).max()?;
        Some(longest.saturating_sub(self.interval_us))
    }
}

fn is_timely(rtt_us: u64) -> bool {
    u128::from(rtt_us) <= TIMELY.as_micros()
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn read(output: impl BufRead) -> PingLog {
    let mut log = PingLog::default();
    for line in output.lines().map_while(Result::ok) {
        let Some((number, reply)) = parse(&line) else {
            continue;
        };
        // The number on the wire has 16 bits.
        let number = unwrap(number, log.sent);
        log.sent = log.sent.max(number);
        if let Some(reply) = reply
            && log.replies.len() < REPLIES_MAX
        {
            // The first answer counts, a duplicate does not.
            log.replies.entry(number).or_insert(reply);
        }
    }
    log
}

/// `[1700000000.123456] 64 bytes from 10.10.0.10: icmp_seq=5 ttl=64 time=50.5 ms`, or
/// `[1700000000.123456] no answer yet for icmp_seq=6`.
fn parse(line: &str) -> Option<(u64, Option<Reply>)> {
    let (stamp, text) = line.strip_prefix('[')?.split_once("] ")?;
    let after = |word: &str| {
        let (_, rest) = text.split_once(word)?;
        rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()
    };
    let number = after("icmp_seq=")?.parse().ok()?;
    let Some(rtt) = after(" time=") else {
        return text.starts_with("no answer yet").then_some((number, None));
    };
    let rtt_us = decimal(rtt, 3)?;
    let arrived_us = decimal(stamp, 6)?;
    Some((
        number,
        Some(Reply {
            sent_us: arrived_us.checked_sub(rtt_us)?,
            rtt_us,
        }),
    ))
}

/// A decimal number times ten to the power of `places`; more places are cut off.
fn decimal(text: &str, places: usize) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = part
        .chars()
        .chain(std::iter::repeat('0'))
        .take(places)
        .collect();
    format!("{whole}{digits}").parse().ok()
}

/// The full number whose low 16 bits are `low`, nearest to `last`.
fn unwrap(low: u64, last: u64) -> u64 {
    const TURN: u64 = 1 << 16;
    let guess = last - last % TURN + low % TURN;
    match guess.abs_diff(last) > TURN / 2 {
        true if guess < last => guess + TURN,
        true => guess.checked_sub(TURN).unwrap_or(guess),
        false => guess,
    }
}

/// Nearest rank; None of an empty list.
pub(super) fn percentile(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

pub(super) fn to_ms(time_us: u64) -> f64 {
    Duration::from_micros(time_us).as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of `ping -D -O` of iputils 20221126.
    #[test]
    fn lines() {
        let answered =
            "[1732456789.500000] 64 bytes from 10.10.0.10: icmp_seq=5 ttl=64 time=50.5 ms";
        let reply = Reply {
            sent_us: 1_732_456_789_449_500,
            rtt_us: 50_500,
        };
        assert_eq!(parse(answered), Some((5, Some(reply))));
        let late = "[1732456789.500000] no answer yet for icmp_seq=6";
        assert_eq!(parse(late), Some((6, None)));
        for other in [
            "",
            "PING 10.10.0.10 (10.10.0.10) 56(84) bytes of data.",
            "[x] icmp_seq=1",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
        let unreachable = "[1732456789.5] From 10.10.0.3 icmp_seq=9 Destination Host Unreachable";
        assert_eq!(parse(unreachable), None);
    }

    /// Numbers go on after 16 bits, also when they arrive out of order.
    #[test]
    fn numbers_go_on() {
        assert_eq!(
            [unwrap(65_535, 65_534), unwrap(0, 65_535), unwrap(3, 65_538)],
            [65_535, 65_536, 65_539]
        );
        assert_eq!(unwrap(65_530, 65_540), 65_530);
        assert_eq!(unwrap(1, 0), 1);
    }

    /// Ten pings a second, a second without answers: what is lost, the gap, the percentiles.
    #[test]
    fn figures_of_an_outage() {
        let mut log = PingLog {
            interval_us: 100_000,
            ..PingLog::default()
        };
        for number in (1..=20).chain(31..=50) {
            let rtt_us = if number <= 20 { 1_000 } else { 51_000 };
            log.replies.insert(
                number,
                Reply {
                    sent_us: number * 100_000,
                    rtt_us,
                },
            );
        }
        log.sent = 50;
        log.stopped_us = 9_000_000;
        let all = log.span(0, 6_000_000);
        assert_eq!((all.sent, all.lost), (50, 10));
        assert_eq!(all.longest_gap_ms, Some(1050.0)); // 1.1 s between answers, 50 ms more way
        assert_eq!((all.rtt_p50_ms, all.rtt_p95_ms), (Some(1.0), Some(51.0)));
        let early = log.span(0, 2_000_000);
        assert_eq!(
            (early.sent, early.lost, early.rtt_p95_ms),
            (19, 0, Some(1.0))
        );
        log.stopped_us = 4_100_000;
        assert_eq!(
            log.span(0, 6_000_000).lost,
            0,
            "unanswered, but without time to be"
        );
        assert_eq!(PingLog::default().span(0, 1), PingStats::default());
    }
    /// A guest that answers all, but for three seconds 1.5 s late, was out for three seconds; and
    /// one that never came back was out to the end.
    #[test]
    fn late_answers_are_an_outage() {
        let mut log = PingLog {
            interval_us: 100_000,
            sent: 100,
            stopped_us: 11_000_000,
            ..PingLog::default()
        };
        for number in 1..=100 {
            let rtt_us = match (21..=50).contains(&number) {
                true => 1_500_000,
                false => 1_000,
            };
            let sent_us = number * 100_000;
            log.replies.insert(number, Reply { sent_us, rtt_us });
        }
        let all = log.span(0, 10_100_000);
        assert_eq!((all.lost, all.late), (0, 30));
        assert_eq!(all.longest_gap_ms, Some(1499.0));
        assert_eq!(all.outage_ms, Some(3000.0));
        log.replies.retain(|number, _| *number <= 50);
        let silent = log.span(0, 10_100_000);
        // From the last timely answer at 2.001 s to the last that had its second.
        assert_eq!(silent.outage_ms, Some(7899.0));
    }
}
