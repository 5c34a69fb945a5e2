//! The two halves of a measurement: fill the link, count what arrives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use transport::quic::{CloseCode, Connection, LinkSample};

use super::ANSWER_MAX;
use super::messages::{Lines, Link, Message, Reception, Sending, Spread};
use super::report::Printer;
use crate::report::cpu_seconds;

/// Piece that is handed to a lane at once.
const PIECE_BYTES: usize = 64 * 1024;
/// How often the sender looks at its controller.
const SAMPLE: Duration = Duration::from_millis(100);
const SAMPLES_PER_LINE: usize = 10;
const TICK: Duration = Duration::from_secs(1);
/// Left out of the steady goodput: Startup.
const STARTUP: Duration = Duration::from_secs(2);
const GIB: f64 = (1u64 << 30) as f64;

/// A measurement that both sides have agreed on.
#[derive(Debug)]
pub(super) struct Flow<'a> {
    pub(super) connection: &'a Connection,
    pub(super) lines: Lines,
    pub(super) printer: Printer,
}

impl Flow<'_> {
    /// Fills the link until the receiver has enough, and prints the summary.
    pub(super) async fn send(mut self) -> Result<()> {
        let cpu_before = cpu_seconds();
        let mut fillers = JoinSet::new();
        let piece = Bytes::from(vec![0; PIECE_BYTES]);
        for mut lane in self.connection.open_lanes().await? {
            let piece = piece.clone();
            fillers.spawn(async move { while lane.send(piece.clone()).await.is_ok() {} });
        }
        let mut samples = Vec::new();
        let mut sampling = interval(SAMPLE);
        sampling.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let reception = loop {
            tokio::select! {
                _ = sampling.tick() => {
                    samples.push(self.connection.link_sample());
                    if samples.len().is_multiple_of(SAMPLES_PER_LINE) {
                        self.lines.say(&Message::Link(link(samples.last()))).await?;
                    }
                }
                message = self.lines.next() => {
                    let message = message?;
                    if let Message::Reception(reception) = message {
                        break reception;
                    }
                    let Message::Received { ms, bytes } = message else {
                        bail!("the receiver said {message:?}");
                    };
                    self.printer.second(ms, bytes, link(samples.last()))?;
                }
            }
        };
        let cpu_s = spent(cpu_before);
        let sending = summarize(
            &samples,
            &self.connection.link_sample(),
            reception.bytes,
            cpu_s,
        );
        self.lines.say(&Message::Sending(sending)).await?;
        self.printer.summary(&reception, &sending)?;
        // The receiver closes once it has the summary; closing here could overtake it.
        if timeout(ANSWER_MAX, self.connection.closed()).await.is_err() {
            tracing::debug!("the receiver has not closed the connection");
        }
        fillers.abort_all();
        Ok(())
    }

    /// Counts what arrives for `seconds`, and prints the summary.
    pub(super) async fn receive(mut self, seconds: u64) -> Result<()> {
        let lanes = timeout(ANSWER_MAX, self.connection.accept_lanes());
        let lanes = lanes.await.context("the sender sends nothing")??;
        let cpu_before = cpu_seconds();
        let received = Arc::new(AtomicU64::new(0));
        let mut drains = JoinSet::new();
        for mut lane in lanes {
            let received = Arc::clone(&received);
            drains.spawn(async move {
                while let Ok(Some(bytes)) = lane.recv().await {
                    received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
            });
        }
        let reception = self
            .count(&received, Duration::from_secs(seconds), cpu_before)
            .await?;
        self.lines.say(&Message::Reception(reception)).await?;
        let sending = timeout(ANSWER_MAX, self.sending())
            .await
            .context("no summary came")??;
        self.connection.close(CloseCode::Done, "measured");
        self.printer.summary(&reception, &sending)
    }

    async fn count(
        &mut self,
        received: &AtomicU64,
        run_for: Duration,
        cpu_before: Option<f64>,
    ) -> Result<Reception> {
        let started = Instant::now();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks.tick().await;
        let mut link = link(None);
        let mut after_startup = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let (spent, bytes) = (started.elapsed(), received.load(Ordering::Relaxed));
                    if spent >= STARTUP {
                        after_startup.get_or_insert((spent, bytes));
                    }
                    let ms = u64::try_from(spent.as_millis()).unwrap_or(u64::MAX);
                    self.printer.second(ms, bytes, link)?;
                    self.lines.say(&Message::Received { ms, bytes }).await?;
                    if spent >= run_for {
                        let cpu_s = self::spent(cpu_before);
                        return Ok(reception(spent, bytes, after_startup, cpu_s));
                    }
                }
                message = self.lines.next() => {
                    let message = message?;
                    let Message::Link(latest) = message else {
                        bail!("the sender said {message:?}");
                    };
                    link = latest;
                }
            }
        }
    }

    async fn sending(&mut self) -> Result<Sending> {
        loop {
            let message = self.lines.next().await?;
            if let Message::Sending(sending) = message {
                return Ok(sending);
            }
            let Message::Link(_) = message else {
                bail!("the sender said {message:?}")
            };
        }
    }
}

fn spent(before: Option<f64>) -> Option<f64> {
    Some(cpu_seconds()? - before?)
}

fn reception(
    spent: Duration,
    bytes: u64,
    after_startup: Option<(Duration, u64)>,
    cpu_s: Option<f64>,
) -> Reception {
    let rate = |bytes: u64, time: Duration| bytes as f64 * 8.0 / time.as_secs_f64();
    Reception {
        bytes,
        ms: spent.as_secs_f64() * 1e3,
        goodput_bps: rate(bytes, spent),
        steady_goodput_bps: after_startup
            .filter(|(since, _)| *since < spent)
            .map(|(since, before)| rate(bytes - before, spent - since)),
        cpu_s_per_gib: cpu_s
            .filter(|_| bytes > 0)
            .map(|cpu_s| cpu_s * GIB / bytes as f64),
    }
}

fn link(sample: Option<&LinkSample>) -> Link {
    sample.map_or(
        Link {
            rtt_ms: 0.0,
            queueing_ms: 0.0,
            lost_share: 0.0,
        },
        |sample| Link {
            rtt_ms: sample.rtt.as_secs_f64() * 1e3,
            queueing_ms: sample.queueing.as_secs_f64() * 1e3,
            lost_share: share(sample.lost_packets, sample.sent_packets),
        },
    )
}

fn summarize(
    samples: &[LinkSample],
    last: &LinkSample,
    received_bytes: u64,
    cpu_s: Option<f64>,
) -> Sending {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let rtts = spread(samples.iter().map(|sample| ms(sample.rtt)).collect());
    Sending {
        rtt_ms: rtts.p50,
        rtt_min_ms: ms(last.rtt_min),
        queueing_ms: spread(samples.iter().map(|sample| ms(sample.queueing)).collect()),
        lost_share: share(last.lost_packets, last.sent_packets),
        retransmitted_share: share(last.lost_bytes, last.udp_tx_bytes),
        udp_payload_bytes: last.udp_tx_bytes,
        cpu_s_per_gib: cpu_s
            .filter(|_| received_bytes > 0)
            .map(|cpu_s| cpu_s * GIB / received_bytes as f64),
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    // Nearest rank: the value at or below which `percent` of all lie.
    let at = |percent: usize| {
        let rank = (values.len() * percent).div_ceil(100).max(1);
        values.get(rank - 1).copied().unwrap_or(0.0)
    };
    Spread {
        min: at(0),
        p50: at(50),
        p95: at(95),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_of_a_distribution() {
        let values = (1..=100).rev().map(f64::from).collect();
        assert_eq!(
            spread(values),
            Spread {
                min: 1.0,
                p50: 50.0,
                p95: 95.0
            }
        );
        assert_eq!(
            spread(vec![3.0]),
            Spread {
                min: 3.0,
                p50: 3.0,
                p95: 3.0
            }
        );
        assert_eq!(
            spread(vec![]),
            Spread {
                min: 0.0,
                p50: 0.0,
                p95: 0.0
            }
        );
    }

    #[test]
    fn steady_goodput_leaves_startup_out_and_short_runs_have_none() {
        let s = Duration::from_secs;
        let long = reception(s(10), 9_000, Some((s(2), 1_000)), Some(1.0));
        assert_eq!(long.goodput_bps, 7_200.0);
        assert_eq!(long.steady_goodput_bps, Some(8_000.0));
        let short = reception(s(2), 1_000, Some((s(2), 1_000)), None);
        assert_eq!(short.steady_goodput_bps, None);
    }
}
