//! Errors of the monitor client.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::codec::CodecError;
use super::process::ProcessError;

/// Why a call to the monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nothing listens at the path.
    #[error("cannot connect to QEMU's monitor at {}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket is there, but no greeting came: a monitor serves one client at a time.
    #[error(
        "no greeting from QEMU's monitor at {} within {waited:?}: another program holds this \
         monitor; start QEMU with a second -qmp unix:PATH,server=on,wait=off and name that one \
         (or QEMU itself hangs)",
        path.display()
    )]
    MonitorBusy {
        /// The socket's path.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// The connection has ended; every later call gives the same.
    #[error("QEMU's monitor is gone: {reason}")]
    MonitorClosed {
        /// What ended it.
        reason: CloseReason,
    },
    /// No reply in time.
    #[error("QEMU did not answer {command} in {waited:?}{}", if *may_still_run { " and may still run it" } else { "" })]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        waited: Duration,
        /// The command may have been executed or may be executed later: a `cont` that ends so
        /// counts as executed until its QEMU is proven dead (S3).
        may_still_run: bool,
    },
    /// QEMU refused the command or failed in it.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class, most often `GenericError`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// The reply does not have the fields that this command's reply has.
    #[error("QEMU's reply to {command} cannot be read: {detail}")]
    BadReply {
        /// The command.
        command: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Too many commands wait for a reply already; this one was not sent.
    #[error("{pending_max} monitor commands are without a reply, {command} was not sent")]
    TooManyPending {
        /// The command.
        command: String,
        /// The limit.
        pending_max: usize,
    },
    /// The command's arguments are too long; it was not sent.
    #[error("the arguments of {command} pass {request_max_bytes} bytes")]
    RequestTooLong {
        /// The command.
        command: String,
        /// The limit.
        request_max_bytes: usize,
    },
    /// Nobody could look at what QEMU keeps.
    #[error(
        "cannot look at the open files of QEMU (pid {pid}), which may keep its monitor's connection \
         (run as root, or as QEMU's user)"
    )]
    Kept {
        /// The process.
        pid: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process at the other end of the socket could not be named.
    #[error("cannot tell which process owns QEMU's monitor")]
    Process(#[from] ProcessError),
}

impl QmpError {
    /// May the command have had, or still get, its effect in spite of the error?
    pub fn may_have_run(&self) -> bool {
        match self {
            Self::Timeout { may_still_run, .. } => *may_still_run,
            Self::MonitorClosed { .. } | Self::BadReply { .. } => true,
            Self::Connect { .. }
            | Self::MonitorBusy { .. }
            | Self::Refused { .. }
            | Self::TooManyPending { .. }
            | Self::RequestTooLong { .. }
            | Self::Kept { .. }
            | Self::Process(_) => false,
        }
    }
}

/// What ended a monitor's connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// QEMU closed it: it quit, was killed, or crashed.
    #[error("QEMU closed the connection")]
    EndOfFile,
    /// Reading or writing failed.
    #[error("{0:?}")]
    Io(io::ErrorKind),
    /// QEMU sent something that is no message.
    #[error("{0}")]
    Codec(#[from] CodecError),
    /// QEMU sent a second greeting, or something else in place of the first.
    #[error("a greeting is missing or came twice")]
    GreetingOutOfPlace,
    /// A reply came to a command that does not wait for one.
    #[error("a reply came to no command of ours")]
    UnexpectedReply,
    /// More events came than the queue holds before someone read them.
    #[error("{queue_max} events were not read in time")]
    EventsNotRead {
        /// The queue's limit.
        queue_max: usize,
    },
    /// Every [`Client`](super::Client) was dropped.
    #[error("we closed it")]
    Dropped,
}
