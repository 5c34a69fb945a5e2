//! The only place of the lab that reads the clock and sleeps.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::bail;

/// Between two looks at something that tells nobody when it changes.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// The monotonic clock.
#[expect(
    clippy::disallowed_methods,
    reason = "the lab drives real programs by the real clock"
)]
pub fn now() -> Instant {
    Instant::now()
}

/// Microseconds since 1970, the clock of QEMU's event stamps.
#[expect(
    clippy::disallowed_methods,
    reason = "compared with stamps that QEMU made from it"
)]
pub fn epoch_us() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Sleeps.
#[expect(
    clippy::disallowed_methods,
    reason = "for observation times and for `wait_until`"
)]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

/// Looks again and again until there is an answer. For files and processes, which cannot call back.
///
/// # Errors
/// The look's own error, or `what` after `limit`.
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if now() >= end {
            bail!("{what}: not within {} s", limit.as_secs_f32());
        }
        pause(LOOK_INTERVAL);
    }
}
