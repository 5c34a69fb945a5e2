//! Work that several threads share.

use std::io;
use std::panic::resume_unwind;

/// Runs `work` on so many threads, this one included, until all are done; the first error counts.
pub(super) fn on_threads(
    threads: usize,
    work: impl Fn() -> io::Result<()> + Copy + Send + Sync,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for other in others {
            let joined = other.join().unwrap_or_else(|panic| resume_unwind(panic));
            done = done.and(joined);
        }
        done
    })
}
