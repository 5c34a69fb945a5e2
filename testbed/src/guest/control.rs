//! What the guest's program says on its serial line.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::clock;

/// Ten minutes of lines.
const SAMPLES_MAX: usize = 6000;
const VERIFY_MAX: Duration = Duration::from_secs(60);

/// One counter line.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// When the line arrived, microseconds since 1970.
    pub at_us: u64,
    /// Ticks since the program's start.
    pub count: u64,
    /// Pages found wrong.
    pub errors: u64,
    /// Pages written.
    pub writes: u64,
    /// Whole sweeps done.
    pub sweeps: u64,
}

/// Result of a sweep over all pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Verified {
    /// Wrong pages since the program's start.
    pub errors: u64,
    /// Pages that the sweep looked at.
    pub pages: u64,
}

/// The open serial line. QEMU takes one connection at a time.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Debug, Default)]
struct Heard {
    samples: VecDeque<Counters>,
    verified: Option<Verified>,
    /// Exit code of the last command.
    ran: Option<i32>,
}

impl Control {
    /// Opens the line.
    ///
    /// # Errors
    /// When QEMU is gone or the line is in use.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot reach the guest's serial line {}", path.display()))?;
        let heard = Arc::<Mutex<Heard>>::default();
        let (reader, reader_heard) = (stream.try_clone()?, Arc::clone(&heard));
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                hear(&line, &reader_heard);
            }
        });
        Ok(Self { stream, heard })
    }

    /// Lines so far, oldest first.
    pub fn samples(&self) -> Vec<Counters> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.samples.iter().copied().collect()
    }

    /// The next line that the guest says.
    ///
    /// # Errors
    /// When it says nothing for five seconds: it does not run.
    pub fn next(&self) -> anyhow::Result<Counters> {
        let since = clock::epoch_us();
        clock::wait_until("a line from the guest", Duration::from_secs(5), || {
            Ok(self
                .samples()
                .last()
                .copied()
                .filter(|sample| sample.at_us >= since))
        })
    }

    /// Has the guest look at every page of its working set.
    ///
    /// # Errors
    /// When the guest does not answer in a minute.
    pub fn verify(&self) -> anyhow::Result<Verified> {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .verified = None;
        (&self.stream)
            .write_all(b"VERIFY\n")
            .context("the guest's serial line is closed")?;
        let verified = clock::wait_until("the guest's sweep", VERIFY_MAX, || {
            Ok(self
                .heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .verified)
        })?;
        ensure!(verified.pages > 0, "the guest's sweep looked at no page");
        Ok(verified)
    }

    /// Begins to run a shell command in the guest.
    ///
    /// # Errors
    /// When the guest cannot be told.
    pub fn begin(&self, command: &str) -> anyhow::Result<()> {
        ensure!(!command.contains('\n'), "a command is one line");
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ran = None;
        (&self.stream)
            .write_all(format!("RUN {command}\n").as_bytes())
            .context("the guest's serial line is closed")
    }

    /// Runs a shell command in the guest, to its end.
    ///
    /// # Errors
    /// When it does not end in time, or fails.
    pub fn run(&self, command: &str, limit: Duration) -> anyhow::Result<()> {
        self.begin(command)?;
        let what = format!("the end of `{command}` in the guest");
        let code = clock::wait_until(&what, limit, || {
            Ok(self
                .heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .ran)
        })?;
        ensure!(code == 0, "`{command}` ended with {code} in the guest");
        Ok(())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // The reading thread has the same connection; QEMU takes the next one after its end.
        self.stream.shutdown(Shutdown::Both).ok();
    }
}

/// The guest is hostile as everybody: a line that is not understood is skipped.
fn hear(line: &str, heard: &Mutex<Heard>) {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sample) = parse_counters(line) {
        if heard.samples.len() >= SAMPLES_MAX {
            heard.samples.pop_front();
        }
        heard.samples.push_back(Counters {
            at_us: clock::epoch_us(),
            ..sample
        });
    } else if let Some(verified) = parse_verified(line) {
        heard.verified = Some(verified);
    } else if let Some(code) = line.trim().strip_prefix("RAN ") {
        heard.ran = code.parse().ok();
    }
}

fn parse_counters(line: &str) -> Option<Counters> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [
            "COUNT",
            count,
            "ERRORS",
            errors,
            "WRITES",
            writes,
            "SWEEPS",
            sweeps,
        ] => Some(Counters {
            at_us: 0,
            count: count.parse().ok()?,
            errors: errors.parse().ok()?,
            writes: writes.parse().ok()?,
            sweeps: sweeps.parse().ok()?,
        }),
        _ => None,
    }
}

fn parse_verified(line: &str) -> Option<Verified> {
    let (errors, pages) = line
        .trim()
        .strip_prefix("VERIFIED errors=")?
        .split_once(" pages=")?;
    Some(Verified {
        errors: errors.parse().ok()?,
        pages: pages.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both kinds of line are understood, and half a line is not taken for one.
    #[test]
    fn lines() {
        let expected = Counters {
            at_us: 0,
            count: 12,
            errors: 0,
            writes: 7,
            sweeps: 1,
        };
        assert_eq!(
            parse_counters("COUNT 12 ERRORS 0 WRITES 7 SWEEPS 1"),
            Some(expected)
        );
        assert_eq!(parse_counters("COUNT 12 ERRORS 0 WR"), None);
        let expected = Verified {
            errors: 0,
            pages: 4096,
        };
        assert_eq!(
            parse_verified("VERIFIED errors=0 pages=4096"),
            Some(expected)
        );
        assert_eq!(parse_verified("VERIFIED errors=0 pages="), None);
    }
}
