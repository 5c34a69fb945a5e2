//! A small client for QEMU's monitor. It keeps the events with QEMU's own stamps, so that the
//! lab's times do not depend on when it looks.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};

use crate::clock;

const ANSWER_MAX: Duration = Duration::from_secs(30);
const CONNECT_MAX: Duration = Duration::from_secs(20);
/// Enough for any run; older ones are dropped.
const EVENTS_MAX: usize = 4096;

/// Something QEMU said unasked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, …
    pub name: String,
    /// Microseconds since 1970 by QEMU's clock.
    pub at_us: u64,
}

/// A connection to one monitor.
#[derive(Debug)]
pub struct Monitor {
    stream: Mutex<UnixStream>,
    answers: Mutex<Receiver<Value>>,
    events: Arc<Events>,
    pid: i32,
}

#[derive(Debug, Default)]
struct Events {
    state: Mutex<EventState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct EventState {
    seen: Vec<Event>,
    closed: bool,
}

impl Monitor {
    /// Connects as soon as QEMU has made the socket, and enters command mode.
    ///
    /// # Errors
    /// When there is no monitor within 20 s.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let what = format!("QEMU's monitor at {}", path.display());
        let stream = clock::wait_until(&what, CONNECT_MAX, || Ok(UnixStream::connect(path).ok()))?;
        // The kernel knows who is at the other end, in this process's own numbering.
        let pid = rustix::net::sockopt::socket_peercred(&stream)?
            .pid
            .as_raw_nonzero()
            .get();
        let events = Arc::<Events>::default();
        let (sender, answers) = sync_channel(16);
        let (reader, reader_events) = (stream.try_clone()?, Arc::clone(&events));
        std::thread::spawn(move || read(reader, &reader_events, &sender));
        let monitor = Self {
            stream: Mutex::new(stream),
            answers: Mutex::new(answers),
            events,
            pid,
        };
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// QEMU's process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Runs a command and returns what it gave back.
    ///
    /// # Errors
    /// QEMU's own error text, or no answer in 30 s.
    pub fn execute(&self, command: &str, arguments: &Value) -> anyhow::Result<Value> {
        let line = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        // One command at a time: the lock is held until the answer is there.
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream
            .write_all(line.as_bytes())
            .with_context(|| format!("{command}: QEMU is gone"))?;
        let answer = answers
            .recv_timeout(ANSWER_MAX)
            .map_err(|error| anyhow!("{command}: no answer from QEMU: {error}"))?;
        if let Some(error) = answer.get("error") {
            bail!("{command}: {}", error["desc"].as_str().unwrap_or("failed"));
        }
        Ok(answer["return"].clone())
    }

    /// Switches migration capabilities.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn set_capabilities(&self, names: &[(&str, bool)]) -> anyhow::Result<()> {
        let list: Vec<Value> = names
            .iter()
            .map(|(name, on)| json!({ "capability": name, "state": on }))
            .collect();
        self.execute("migrate-set-capabilities", &json!({ "capabilities": list }))?;
        Ok(())
    }

    /// `running`, `paused`, `inmigrate`, `postmigrate`, …
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn run_state(&self) -> anyhow::Result<String> {
        let status = self.execute("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Status word of `query-migrate`; empty when there was no migration.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn migration_status(&self) -> anyhow::Result<String> {
        let status = self.execute("query-migrate", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Event> {
        self.events
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .seen
            .clone()
    }

    /// The first event of that name at or after a moment; `None` if it has not come by the limit.
    pub fn wait_event(&self, name: &str, since_us: u64, limit: Duration) -> Option<Event> {
        let end = clock::now() + limit;
        let mut state = self
            .events
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            let found = state
                .seen
                .iter()
                .find(|event| event.name == name && event.at_us >= since_us);
            let left = end.saturating_duration_since(clock::now());
            if found.is_some() || left.is_zero() || state.closed {
                return found.cloned();
            }
            state = self
                .events
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Whether QEMU has closed the monitor.
    pub fn is_closed(&self) -> bool {
        self.events
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closed
    }
}

/// Sorts what QEMU says into events and answers until it closes.
fn read(stream: UnixStream, events: &Events, answers: &SyncSender<Value>) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let Ok(message) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        if let Some(name) = message["event"].as_str() {
            let stamp = &message["timestamp"];
            let seconds = stamp["seconds"].as_u64().unwrap_or(0);
            let at_us = seconds * 1_000_000 + stamp["microseconds"].as_u64().unwrap_or(0);
            let mut state = events.state.lock().unwrap_or_else(PoisonError::into_inner);
            // Passes come by the thousand at the end of pre-copy; the latest of a row is enough.
            let is_pass = name == "MIGRATION_PASS";
            if is_pass && state.seen.last().is_some_and(|last| last.name == name) {
                state.seen.pop();
            }
            if state.seen.len() >= EVENTS_MAX {
                state.seen.remove(0);
            }
            state.seen.push(Event {
                name: name.to_owned(),
                at_us,
            });
            events.changed.notify_all();
        } else if message.get("return").is_some() || message.get("error").is_some() {
            // An answer that nobody waits for any more is dropped.
            answers.try_send(message).ok();
        }
    }
    events
        .state
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .closed = true;
    events.changed.notify_all();
}
