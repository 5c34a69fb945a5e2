//! What both loops wait for, and the one place where they read the clock.

use std::future::pending;
use std::time::Instant;

use tokio::sync::mpsc;

/// The driver is the edge where time is read.
#[expect(
    clippy::disallowed_methods,
    reason = "the driver reads the clock for the machine"
)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// The next item of a channel that may not be there; a closed one is as good as none.
pub(crate) async fn next<T>(receiver: &mut Option<mpsc::Receiver<T>>) -> T {
    if let Some(channel) = receiver {
        if let Some(item) = channel.recv().await {
            return item;
        }
        *receiver = None;
    }
    pending().await
}

pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}
