//! The guest's counter, read over one TCP connection through the overlay.
//!
//! The guest sends a line `COUNT n ERRORS e WRITES w …` every 20 ms. Read by a process in the user's
//! host (`testbed __counter`), which stamps each line and connects again when the connection breaks.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::host::Host;
use crate::probe::lines::Lines;

/// A longer line is none of the guest's.
const LINE_BYTES_MAX: u64 = 512;
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// One line of the guest, or the end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Microseconds since 1970.
    pub at_us: u64,
    /// The connection's number; it grows with every break.
    pub connection: u32,
    /// The counter.
    pub count: u64,
    /// Errors that the guest found in its memory.
    pub errors: u64,
    /// Pages that it wrote.
    pub writes: u64,
}

/// All that a probe saw.
#[derive(Clone, Debug, Default)]
pub struct CounterLog {
    /// In order of arrival.
    pub samples: Vec<Sample>,
}

impl CounterLog {
    /// How often the counter went backwards.
    #[must_use]
    pub fn resets(&self) -> u64 {
        let falls = self
            .samples
            .windows(2)
            .filter(|pair| pair[1].count < pair[0].count)
            .count();
        u64::try_from(falls).unwrap_or(u64::MAX)
    }

    /// How often a connection broke and another was made.
    #[must_use]
    pub fn breaks(&self) -> u64 {
        let changes = self
            .samples
            .windows(2)
            .filter(|pair| pair[1].connection != pair[0].connection);
        u64::try_from(changes.count()).unwrap_or(u64::MAX)
    }

    /// The most errors that the guest has reported.
    #[must_use]
    pub fn errors(&self) -> Option<u64> {
        self.samples.iter().map(|sample| sample.errors).max()
    }

    /// Longest time between two lines.
    #[must_use]
    pub fn longest_gap_ms(&self) -> Option<f64> {
        let gaps = self
            .samples
            .windows(2)
            .map(|pair| pair[1].at_us.saturating_sub(pair[0].at_us));
        gaps.max()
            .map(|gap_us| Duration::from_micros(gap_us).as_secs_f64() * 1e3)
    }
}

/// A running reader.
#[derive(Debug)]
pub struct CounterProbe {
    lines: Lines<Sample>,
}

impl CounterProbe {
    /// Starts reading the counter at `address` from `host`; `program` is the testbed's.
    ///
    /// # Errors
    /// If the reader cannot be started. A guest that does not answer yet is no error.
    pub fn start(host: &Host, address: SocketAddr, program: &Path) -> anyhow::Result<Self> {
        let mut command = host.command(program);
        let lines = Lines::start(host, command.args(["__counter", &address.to_string()]))?;
        Ok(Self { lines })
    }

    /// What was seen so far.
    #[must_use]
    pub fn so_far(&self) -> CounterLog {
        CounterLog {
            samples: self.lines.so_far(),
        }
    }

    /// Ends the reader; all that it saw.
    ///
    /// # Errors
    /// If it cannot be ended.
    pub fn stop(self) -> anyhow::Result<CounterLog> {
        Ok(CounterLog {
            samples: self.lines.stop()?,
        })
    }
}

/// Reads the counter at `address` for ever; one [`Sample`] as JSON a line on stdout.
///
/// # Errors
/// If stdout is gone.
pub fn watch(address: SocketAddr) -> anyhow::Result<()> {
    let mut connection = 0;
    loop {
        match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
            Ok(stream) => {
                follow(stream, connection)?;
                connection += 1;
            }
            Err(_) => clock::pause(RETRY_PAUSE),
        }
    }
}

/// Passes on the lines of one connection until it breaks.
fn follow(stream: TcpStream, connection: u32) -> anyhow::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut stdout = io::stdout().lock();
    loop {
        let mut line = Vec::new();
        let read = Read::take(&mut stream, LINE_BYTES_MAX).read_until(b'\n', &mut line);
        if !matches!(read, Ok(len) if len > 0) {
            return Ok(());
        }
        let at_us = clock::epoch_us();
        if let Some(sample) = parse(&String::from_utf8_lossy(&line), at_us, connection) {
            writeln!(stdout, "{}", serde_json::to_string(&sample)?).context("write a sample")?;
        }
    }
}

/// Words and numbers in turn; words that it does not know are passed over.
fn parse(line: &str, at_us: u64, connection: u32) -> Option<Sample> {
    let mut sample = Sample {
        at_us,
        connection,
        ..Sample::default()
    };
    let mut has_count = false;
    let mut words = line.split_whitespace();
    while let (Some(name), Some(value)) = (words.next(), words.next()) {
        let value = value.parse().ok()?;
        match name {
            "COUNT" => {
                sample.count = value;
                has_count = true;
            }
            "ERRORS" => sample.errors = value,
            "WRITES" => sample.writes = value,
            _ => {}
        }
    }
    has_count.then_some(sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as the guest sends them, and what is none.
    #[test]
    fn lines() {
        let sample = Sample {
            at_us: 9,
            connection: 1,
            count: 5,
            errors: 0,
            writes: 77,
        };
        assert_eq!(
            parse("COUNT 5 ERRORS 0 WRITES 77 SWEEPS 3\n", 9, 1),
            Some(sample)
        );
        assert_eq!(parse("VERIFIED errors=0", 9, 1), None);
        assert_eq!(parse("COUNT x", 9, 1), None);
        assert_eq!(parse("", 9, 1), None);
    }

    /// A counter that fell is a reset; a new connection is a break, and no reset by itself.
    #[test]
    fn resets_and_breaks() {
        let at = |at_us, connection, count| Sample {
            at_us,
            connection,
            count,
            ..Sample::default()
        };
        let samples = vec![
            at(0, 0, 1),
            at(20_000, 0, 2),
            at(520_000, 1, 27),
            at(540_000, 1, 3),
        ];
        let log = CounterLog { samples };
        assert_eq!((log.resets(), log.breaks(), log.errors()), (1, 1, Some(0)));
        assert_eq!(log.longest_gap_ms(), Some(500.0));
    }
}
