//! The task that owns a monitor's socket: writes requests, gives replies to their callers, events
//! to their queue. It ends with the connection; its reason is then the answer to every caller.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::codec::{Codec, Greeting, Message};
use super::error::CloseReason;
use super::events::{Event, EventKind};
use super::socket::Socket;

/// Longest request. Ours have a few hundred bytes.
pub(super) const REQUEST_MAX_BYTES: usize = 64 << 10;
/// Requests that wait for the task.
pub(super) const REQUESTS_MAX: usize = 16;
/// Commands without a reply, timed-out ones included: a reply may still come to them.
pub(super) const PENDING_MAX: usize = 64;
/// Bytes that QEMU has not taken; beyond it the task takes no further request.
const OUTGOING_MAX_BYTES: usize = 64 << 10;
/// Bytes of one read.
const READ_BYTES: usize = 16 << 10;

/// A command on its way to QEMU.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: u64,
    /// The whole line.
    pub(super) line: Vec<u8>,
    /// The socket itself goes along.
    pub(super) with_socket: bool,
    pub(super) reply: oneshot::Sender<Reply>,
}

/// What became of a command. A dropped sender means that the monitor is closed.
#[derive(Debug)]
pub(super) enum Reply {
    Done(Value),
    Refused { class: String, description: String },
    TooManyPending,
}

/// State of the task.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: Socket,
    codec: Codec,
    requests: mpsc::Receiver<Request>,
    /// Bytes that QEMU has not taken, at most [`OUTGOING_MAX_BYTES`] + [`REQUEST_MAX_BYTES`].
    outgoing: Vec<u8>,
    pending: BTreeMap<u64, oneshot::Sender<Reply>>,
    /// Taken by the greeting; the client of a kept connection has had it.
    greeting: Option<oneshot::Sender<Greeting>>,
    /// Replies may come that another client waited for.
    is_kept: bool,
    events: mpsc::Sender<Event>,
    closed: Arc<OnceLock<CloseReason>>,
}

/// What the task's owner keeps.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) greeting: oneshot::Receiver<Greeting>,
    pub(super) events: mpsc::Receiver<Event>,
    /// Set before any end is dropped.
    pub(super) closed: Arc<OnceLock<CloseReason>>,
}

/// One thing that can happen to the task.
enum Step {
    Read(std::io::Result<usize>),
    Written(std::io::Result<usize>),
    Request(Option<Request>),
}

impl Monitor {
    /// A connection that begins with QEMU's greeting.
    pub(super) fn new(socket: Socket, events_max: usize) -> (Self, Ends) {
        let (requests_in, requests) = mpsc::channel(REQUESTS_MAX);
        let (events, events_out) = mpsc::channel(events_max);
        let (greeting, greeting_out) = oneshot::channel();
        let closed = Arc::new(OnceLock::new());
        let monitor = Self {
            socket,
            codec: Codec::new(),
            requests,
            outgoing: Vec::new(),
            pending: BTreeMap::new(),
            greeting: Some(greeting),
            is_kept: false,
            events,
            closed: Arc::clone(&closed),
        };
        let ends = Ends {
            requests: requests_in,
            greeting: greeting_out,
            events: events_out,
            closed,
        };
        (monitor, ends)
    }

    /// A connection that another client began and left at any byte.
    pub(super) fn kept(socket: Socket, events_max: usize) -> (Self, Ends) {
        let (monitor, ends) = Self::new(socket, events_max);
        let monitor = Self {
            codec: Codec::mid_line(),
            greeting: None,
            is_kept: true,
            ..monitor
        };
        (monitor, ends)
    }

    /// Serves until the connection ends, and notes why.
    pub(super) async fn run(mut self) {
        let Err(reason) = self.serve().await;
        if reason == CloseReason::Dropped {
            tracing::debug!("monitor connection closed");
        } else {
            tracing::warn!(%reason, pending = self.pending.len(), "monitor connection lost");
        }
        // Only this task sets it, and only here. Callers look at it after their sender is dropped,
        // which happens at the end of this function.
        if self.closed.set(reason).is_err() {
            unreachable!("the reason is set once");
        }
    }

    async fn serve(&mut self) -> Result<std::convert::Infallible, CloseReason> {
        let mut buffer = vec![0; READ_BYTES];
        let mut messages = Vec::new();
        loop {
            let step = tokio::select! {
                result = self.socket.read(&mut buffer) => Step::Read(result),
                result = self.socket.write(&self.outgoing), if !self.outgoing.is_empty() => {
                    Step::Written(result)
                }
                request = self.requests.recv(), if self.outgoing.len() < OUTGOING_MAX_BYTES => {
                    Step::Request(request)
                }
            };
            match step {
                Step::Read(Ok(0)) => return Err(CloseReason::EndOfFile),
                Step::Read(Ok(count)) => {
                    let result = self.codec.push(&buffer[..count], &mut messages);
                    for message in messages.drain(..) {
                        self.dispatch(message)?;
                    }
                    result?;
                }
                // A killed QEMU shows as a broken pipe while its last lines can still be read:
                // the reader finds the end.
                Step::Written(Err(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                    self.outgoing.clear();
                }
                Step::Written(Ok(count)) => {
                    self.outgoing.drain(..count);
                }
                Step::Request(Some(request)) if request.with_socket => {
                    self.hand_over(request).await?;
                }
                Step::Request(Some(request)) => self.accept(request),
                Step::Request(None) => return Err(CloseReason::Dropped),
                Step::Read(Err(error)) | Step::Written(Err(error)) => {
                    return Err(close_reason(&error));
                }
            }
        }
    }

    /// Queues a request, unless its caller has given up: it is then never sent.
    fn accept(&mut self, request: Request) {
        if request.reply.is_closed() {
            return;
        }
        if self.pending.len() >= PENDING_MAX {
            // A caller that has gone meanwhile needs no answer.
            drop(request.reply.send(Reply::TooManyPending));
            return;
        }
        self.outgoing.extend_from_slice(&request.line);
        self.pending.insert(request.id, request.reply);
    }

    /// Queues a request that takes the socket along: with its first byte, so all before it goes first.
    async fn hand_over(&mut self, request: Request) -> Result<(), CloseReason> {
        let ended = |error: std::io::Error| close_reason(&error);
        while !self.outgoing.is_empty() {
            let count = self.socket.write(&self.outgoing).await.map_err(ended)?;
            self.outgoing.drain(..count);
        }
        let sent = self.socket.write_with_itself(&request.line).await;
        let rest = sent.map_err(ended)?;
        self.accept(request);
        self.outgoing.drain(..rest.min(self.outgoing.len()));
        Ok(())
    }

    fn dispatch(&mut self, message: Message) -> Result<(), CloseReason> {
        match message {
            Message::Greeting(greeting) => {
                let waiting = self
                    .greeting
                    .take()
                    .ok_or(CloseReason::GreetingOutOfPlace)?;
                // Nobody waits any more when connecting timed out.
                drop(waiting.send(greeting));
                Ok(())
            }
            _ if self.greeting.is_some() => Err(CloseReason::GreetingOutOfPlace),
            Message::Return { id, value } => self.answer(id, Reply::Done(value)),
            Message::Error {
                id,
                class,
                description,
            } => self.answer(id, Reply::Refused { class, description }),
            Message::Event {
                name,
                timestamp,
                data,
            } => {
                tracing::trace!(event = %name, "monitor event");
                let event = Event::from_parts(name, &data, timestamp);
                // An armed QEMU begins thousands of passes a second, and each says what the last
                // one said: they never crowd out what counts.
                let is_crowded = self.events.capacity() < self.events.max_capacity() / 2;
                if is_crowded && matches!(event.kind, EventKind::MigrationPass { .. }) {
                    return Ok(());
                }
                match self.events.try_send(event) {
                    Ok(()) => Ok(()),
                    Err(mpsc::error::TrySendError::Full(_)) => Err(CloseReason::EventsNotRead {
                        queue_max: self.events.max_capacity(),
                    }),
                    // The owner said that it wants no events by dropping the receiver.
                    Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
                }
            }
        }
    }

    fn answer(&mut self, id: Option<u64>, reply: Reply) -> Result<(), CloseReason> {
        let waiting = id.and_then(|id| self.pending.remove(&id));
        if waiting.is_none() && self.is_kept {
            return Ok(());
        }
        let waiting = waiting.ok_or(CloseReason::UnexpectedReply)?;
        if waiting.send(reply).is_err() {
            tracing::debug!(id, "reply to a command that had timed out");
        }
        Ok(())
    }
}

/// A reset is how the kernel tells that QEMU died with requests of ours unread.
fn close_reason(error: &std::io::Error) -> CloseReason {
    if error.kind() == std::io::ErrorKind::ConnectionReset {
        CloseReason::EndOfFile
    } else {
        CloseReason::Io(error.kind())
    }
}
