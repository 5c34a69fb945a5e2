//! A TCP stream that takes all that it gets, and how much that is at any time.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::host::{Host, HostProcess};
use crate::probe::lines::Lines;

const LOOK: Duration = Duration::from_millis(100);
const BLOCK_BYTES: usize = 64 << 10;
const START_MAX: Duration = Duration::from_secs(15);
const CONNECT_MAX: Duration = Duration::from_secs(3);
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Bytes received so far.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Total {
    at_us: u64,
    bytes: u64,
}

/// Both ends at work.
#[derive(Debug)]
pub struct BulkProbe {
    receiver: Lines<Total>,
    /// Ends when this is dropped.
    sender: HostProcess,
}

/// Totals about every 100 ms.
#[derive(Clone, Debug, Default)]
pub struct BulkLog {
    totals: Vec<Total>,
}

impl BulkProbe {
    /// Starts the stream from one host to an address of another, with this congestion control;
    /// returns once it arrives. `program` is the testbed's.
    ///
    /// # Errors
    /// If an end cannot be started, or nothing arrives in 15 s.
    pub fn start(
        from: &Host,
        to: &Host,
        address: SocketAddr,
        congestion: &str,
        program: &Path,
    ) -> anyhow::Result<Self> {
        let address = address.to_string();
        let mut command = to.command(program);
        let receiver = Lines::start(to, command.args(["__bulk-receive", &address]))?;
        let mut command = from.command(program);
        command.args(["__bulk-send", &address, "--congestion", congestion]);
        let sender = from.spawn(&mut command)?;
        clock::wait_until("the first bytes of the stream", START_MAX, || {
            let last = receiver.so_far().last().copied();
            Ok(last.filter(|total: &Total| total.bytes > 0).map(drop))
        })?;
        Ok(Self { receiver, sender })
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it cannot be ended.
    pub fn stop(mut self) -> anyhow::Result<BulkLog> {
        self.sender.kill()?;
        Ok(BulkLog {
            totals: self.receiver.stop()?,
        })
    }
}

impl BulkLog {
    /// Bits a second that its application received from `from_us` up to `to_us`.
    #[must_use]
    pub fn rate_bps(&self, from_us: u64, to_us: u64) -> Option<f64> {
        let at = |time_us: u64| {
            let after = self.totals.partition_point(|total| total.at_us <= time_us);
            self.totals.get(after.checked_sub(1)?)
        };
        let (first, last) = (at(from_us)?, at(to_us)?);
        let passed_us = last.at_us.checked_sub(first.at_us).filter(|us| *us > 0)?;
        let bits = last.bytes.checked_sub(first.bytes)?.checked_mul(8)?;
        Some(
            Duration::from_micros(bits).as_secs_f64()
                / Duration::from_micros(passed_us).as_secs_f64()
                * 1e6,
        )
    }
}

/// Sends for ever; connects again when the connection breaks.
///
/// # Errors
/// If this kernel has no such congestion control.
pub fn send(to: SocketAddr, congestion: &str) -> anyhow::Result<()> {
    let block = vec![0; BLOCK_BYTES];
    loop {
        if let Ok(mut stream) = TcpStream::connect_timeout(&to, CONNECT_MAX) {
            rustix::net::sockopt::set_tcp_congestion(&stream, congestion)
                .with_context(|| format!("congestion control {congestion}"))?;
            while stream.write_all(&block).is_ok() {}
        }
        clock::pause(RETRY_PAUSE);
    }
}

/// Receives one connection after the other for ever; one `Total` as JSON a line on stdout.
///
/// # Errors
/// If the address cannot be used, or stdout is gone.
pub fn receive(at: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(at).with_context(|| format!("listen on {at}"))?;
    let mut stdout = io::stdout().lock();
    let mut block = vec![0; BLOCK_BYTES];
    let mut total = Total { at_us: 0, bytes: 0 };
    for stream in listener.incoming() {
        let mut stream = stream.context("take a connection")?;
        stream.set_read_timeout(Some(LOOK))?;
        let mut said = clock::now();
        loop {
            match stream.read(&mut block) {
                Ok(0) => break,
                Ok(len) => total.bytes += u64::try_from(len)?,
                // A stream that gets nothing is said too.
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => break,
            }
            let now = clock::now();
            if now.duration_since(said) >= LOOK {
                said = now;
                total.at_us = clock::epoch_us();
                writeln!(stdout, "{}", serde_json::to_string(&total)?).context("write a total")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A megabyte a second for two seconds, then half of it.
    #[test]
    fn rates() {
        let total = |tenths: u64| Total {
            at_us: tenths * 100_000,
            bytes: tenths.min(20) * 100_000 + tenths.saturating_sub(20) * 50_000,
        };
        let log = BulkLog {
            totals: (0..=40).map(total).collect(),
        };
        let rate = |from_s: u64, to_s: u64| {
            let rate = log.rate_bps(from_s * 1_000_000, to_s * 1_000_000);
            rate.map(f64::round)
        };
        assert_eq!(rate(0, 2), Some(8e6));
        assert_eq!(rate(2, 4), Some(4e6));
        assert_eq!(rate(0, 4), Some(6e6));
        assert_eq!(rate(3, 3), None, "no time passed");
        assert_eq!(BulkLog::default().rate_bps(0, 1), None);
    }
}
