//! The client: connects, sends commands, waits for their replies within a limit.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::codec::Greeting;
use super::error::{CloseReason, QmpError};
use super::events::Event;
use super::kept;
use super::monitor::{Ends, Monitor, PENDING_MAX, REQUEST_MAX_BYTES, Reply, Request};
use super::process::ProcessId;
use super::socket::Socket;

/// Time between two attempts while QEMU's queue of clients is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Limits of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How long to wait for the greeting; default 5 s (QEMU's main loop may be busy for a while).
    pub greeting_timeout: Duration,
    /// How long to wait for a command's reply; default 10 s.
    pub command_timeout: Duration,
    /// Unread events that are kept, below 0.5 KiB each; default 1024, at least 1. One more breaks
    /// the monitor.
    pub events_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            greeting_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(10),
            events_max: 1024,
        }
    }
}

/// A connection to QEMU's monitor. Clones share it; the last one that is dropped closes it.
#[derive(Debug, Clone)]
pub struct Client {
    requests: mpsc::Sender<Request>,
    command_timeout: Duration,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// A kept connection had its greeting long ago.
    greeting: Option<Greeting>,
    has_oob: bool,
    process: ProcessId,
    next_id: AtomicU64,
    closed: Arc<OnceLock<CloseReason>>,
    _task: AbortOnDrop,
}

/// Ends the monitor task, and with it the connection, even when QEMU takes no bytes.
#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The events of a connection, in QEMU's order.
#[derive(Debug)]
pub struct EventReceiver {
    events: mpsc::Receiver<Event>,
    closed: Arc<OnceLock<CloseReason>>,
    ended: bool,
}

impl Client {
    /// Connects with the default [`Options`].
    ///
    /// # Errors
    /// As [`Client::connect_with`].
    pub async fn connect(path: &Path) -> Result<(Self, EventReceiver), QmpError> {
        Self::connect_with(path, Options::default()).await
    }

    /// Connects to the monitor at `path` and ends its negotiation mode. Must be called on a tokio
    /// runtime; the connection lives on it. Cancel safe: a dropped call closes the connection.
    ///
    /// # Errors
    /// [`QmpError::Connect`] when nothing listens, [`QmpError::MonitorBusy`] when another client
    /// holds the monitor, [`QmpError::Process`] when the process behind it cannot be named.
    pub async fn connect_with(
        path: &Path,
        options: Options,
    ) -> Result<(Self, EventReceiver), QmpError> {
        let attempt = timeout(options.greeting_timeout, greeted(path, options.events_max));
        let Greeted {
            greeting,
            process,
            task,
            ends,
        } = attempt.await.map_err(|_elapsed| QmpError::MonitorBusy {
            path: path.to_owned(),
            waited: options.greeting_timeout,
        })??;
        tracing::debug!(version = %greeting.version, pid = process.pid, "monitor connected");
        let has_oob = greeting.has_oob;
        let shared = Shared {
            greeting: Some(greeting),
            has_oob,
            process,
            next_id: AtomicU64::new(1),
            closed: Arc::clone(&ends.closed),
            _task: task,
        };
        let (client, events) = Self::with(shared, ends, options);
        let enabled = match has_oob {
            true => json!({ "enable": ["oob"] }),
            false => json!({}),
        };
        client.execute("qmp_capabilities", enabled).await?;
        Ok((client, events))
    }

    /// Goes on with a connection that its client has [left with QEMU](Client::leave_with_qemu);
    /// `None` when `process` keeps none to the monitor at `path`, or is dead. Must be called on a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`QmpError::Kept`] when QEMU's open files cannot be looked at.
    pub fn take_back(
        process: &ProcessId,
        path: &Path,
    ) -> Result<Option<(Self, EventReceiver)>, QmpError> {
        let options = Options::default();
        let Some(descriptor) = kept::find(process, path)? else {
            return Ok(None);
        };
        let socket = Socket::adopt(descriptor).map_err(|source| QmpError::Kept {
            pid: process.pid,
            source,
        })?;
        let (monitor, ends) = Monitor::kept(socket, options.events_max);
        let shared = Shared {
            greeting: None,
            has_oob: true,
            process: process.clone(),
            // Another client's numbers, of which replies may still come, begin elsewhere.
            next_id: AtomicU64::new(u64::from(std::process::id()) << 32),
            closed: Arc::clone(&ends.closed),
            _task: AbortOnDrop(tokio::spawn(monitor.run())),
        };
        tracing::debug!(pid = process.pid, "monitor connection taken back");
        Ok(Some(Self::with(shared, ends, options)))
    }

    /// Whether [`Client::take_back`] would find a connection.
    ///
    /// # Errors
    /// As [`Client::take_back`].
    pub fn is_kept(process: &ProcessId, path: &Path) -> Result<bool, QmpError> {
        kept::find(process, path).map(|found| found.is_some())
    }

    fn with(shared: Shared, ends: Ends, options: Options) -> (Self, EventReceiver) {
        let client = Self {
            requests: ends.requests,
            command_timeout: options.command_timeout,
            shared: Arc::new(shared),
        };
        let events = EventReceiver {
            events: ends.events,
            closed: ends.closed,
            ended: false,
        };
        (client, events)
    }

    /// Gives QEMU our end of this connection to keep, so that it outlives this process: see
    /// [`Client::take_back`]. The monitor serves nobody else until [`Client::release`].
    ///
    /// # Errors
    /// Any [`QmpError`] but those of connecting.
    pub async fn leave_with_qemu(&self) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": kept::NAME });
        let request = Command {
            with_socket: true,
            ..Command::new("getfd", &arguments)
        };
        self.exchange(request).await.map(drop)
    }

    /// QEMU keeps this connection no longer.
    ///
    /// # Errors
    /// Any [`QmpError`] but those of connecting.
    pub async fn release(&self) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": kept::NAME });
        self.execute("closefd", arguments).await.map(drop)
    }

    /// The same connection with another limit for replies.
    #[must_use]
    pub fn with_timeout(&self, command_timeout: Duration) -> Self {
        Self {
            command_timeout,
            ..self.clone()
        }
    }

    /// What QEMU said first; `None` on a connection that was taken back.
    pub fn greeting(&self) -> Option<&Greeting> {
        self.shared.greeting.as_ref()
    }

    /// Whether commands that may be executed out of band are: they need no main loop.
    pub fn has_oob(&self) -> bool {
        self.shared.has_oob
    }

    /// The process that opened the monitor's socket: QEMU, unless it was started with a socket
    /// that another program had opened (libvirt does so).
    pub fn peer_process(&self) -> &ProcessId {
        &self.shared.process
    }

    /// Sends a command and waits for its reply. Every event that QEMU sent before the reply is in
    /// the event queue when this returns.
    ///
    /// Dropping the call is like a timeout: the command may still run.
    ///
    /// # Errors
    /// Any [`QmpError`] but those of connecting; [`QmpError::may_have_run`] tells whether the
    /// command may have had its effect.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.exchange(Command::new(command, &arguments)).await
    }

    /// [`Client::execute`] beside QEMU's main loop, for the few commands that QEMU allows there; in
    /// the loop if the monitor cannot.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = Command {
            out_of_band: self.shared.has_oob,
            ..Command::new(command, &arguments)
        };
        self.exchange(request).await
    }

    async fn exchange(&self, command: Command<'_>) -> Result<Value, QmpError> {
        let (reply, waiting) = oneshot::channel();
        let request = self.request(&command, reply)?;
        // True from the moment at which the monitor task may see the request.
        let mut handed_over = false;
        let exchange = async {
            let permit = self.requests.reserve().await.ok()?;
            handed_over = true;
            permit.send(request);
            waiting.await.ok()
        };
        let waited = self.command_timeout;
        let reply = timeout(waited, exchange).await;
        let command = command.name.to_owned();
        match reply {
            Ok(Some(Reply::Done(value))) => Ok(value),
            Ok(Some(Reply::Refused { class, description })) => Err(QmpError::Refused {
                command,
                class,
                description,
            }),
            Ok(Some(Reply::TooManyPending)) => Err(QmpError::TooManyPending {
                command,
                pending_max: PENDING_MAX,
            }),
            Ok(None) => Err(QmpError::MonitorClosed {
                reason: reason_of(&self.shared.closed),
            }),
            Err(_elapsed) => Err(QmpError::Timeout {
                command,
                waited,
                may_still_run: handed_over,
            }),
        }
    }

    /// [`Client::execute`] with a typed result.
    pub(super) async fn execute_as<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let value = self.execute(command, arguments).await?;
        serde_json::from_value(value).map_err(|error| QmpError::BadReply {
            command: command.to_owned(),
            detail: error.to_string(),
        })
    }

    fn request(
        &self,
        command: &Command<'_>,
        reply: oneshot::Sender<Reply>,
    ) -> Result<Request, QmpError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let verb = match command.out_of_band {
            true => "exec-oob",
            false => "execute",
        };
        let message = json!({ verb: command.name, "arguments": command.arguments, "id": id });
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        if line.len() > REQUEST_MAX_BYTES {
            return Err(QmpError::RequestTooLong {
                command: command.name.to_owned(),
                request_max_bytes: REQUEST_MAX_BYTES,
            });
        }
        Ok(Request {
            id,
            line,
            with_socket: command.with_socket,
            reply,
        })
    }
}

impl EventReceiver {
    /// The next event. The last one is [`MonitorClosed`](super::EventKind::MonitorClosed), after
    /// it `None`. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        match self.events.recv().await {
            Some(event) => Some(event),
            None => self.end(),
        }
    }

    /// The next event if it is there. After a command's reply this empties the queue of all that
    /// QEMU sent before that reply.
    pub fn try_next(&mut self) -> Option<Event> {
        match self.events.try_recv() {
            Ok(event) => Some(event),
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => self.end(),
        }
    }

    fn end(&mut self) -> Option<Event> {
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        Some(Event::closed(reason_of(&self.closed)))
    }
}

/// What is asked, and how.
#[derive(Debug, Clone, Copy)]
struct Command<'a> {
    name: &'a str,
    arguments: &'a Value,
    out_of_band: bool,
    with_socket: bool,
}

impl<'a> Command<'a> {
    fn new(name: &'a str, arguments: &'a Value) -> Self {
        Self {
            name,
            arguments,
            out_of_band: false,
            with_socket: false,
        }
    }
}

/// A connection that has its greeting.
struct Greeted {
    greeting: Greeting,
    process: ProcessId,
    task: AbortOnDrop,
    ends: Ends,
}

/// Connects and waits for the greeting; cancelled, it closes the connection.
async fn greeted(path: &Path, events_max: usize) -> Result<Greeted, QmpError> {
    let socket = loop {
        match UnixStream::connect(path).await {
            Ok(socket) => break socket,
            // The queue of the listening socket, of length 1, is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            Err(source) => {
                return Err(QmpError::Connect {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    };
    let process = ProcessId::of_peer(&socket)?;
    let (monitor, mut ends) = Monitor::new(Socket::new(socket), events_max.max(1));
    let task = AbortOnDrop(tokio::spawn(monitor.run()));
    match (&mut ends.greeting).await {
        Ok(greeting) => Ok(Greeted {
            greeting,
            process,
            task,
            ends,
        }),
        Err(_dropped) => Err(QmpError::MonitorClosed {
            reason: reason_of(&ends.closed),
        }),
    }
}

/// A task that was aborted sets no reason: that is the drop of the last client.
fn reason_of(closed: &OnceLock<CloseReason>) -> CloseReason {
    closed.get().cloned().unwrap_or(CloseReason::Dropped)
}
