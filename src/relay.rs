//! The byte relay (S4): for a stream with a section that we do not know, chosen before its first
//! page. Bytes go as they come, through a spool file, over lane 0; nothing is parsed, so there are no
//! rounds, no ledger and no proof of memory. The return path is filtered as ever.
//!
//! ```text
//! QEMU -unix-> capture thread -> spool (unlinked file) -> lane 0 ==WAN== -> target QEMU
//! ```
//!
//! While the guest runs the spool holds at most [`RUNNING_MAX_BYTES`] that are not sent, so QEMU
//! measures the link and stops when what is left fits its own limit. Once the guest is stopped
//! everything is taken (S5); a disk that is full closes the socket, and the guest stays.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

/// Unsent bytes beyond which QEMU has to wait while its guest runs.
const RUNNING_MAX_BYTES: u64 = 16 << 20;
/// Bytes that are read and sent at once.
const PIECE_BYTES: u64 = 256 * 1024;
/// Space of sent bytes is given back in steps of this.
const PUNCH_BYTES: u64 = 64 << 20;

/// Bytes on their way from QEMU's socket to the lane.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    state: Mutex<State>,
    room: Condvar,
    filled: Notify,
}

#[derive(Debug, Default)]
struct State {
    written: u64,
    sent: u64,
    punched: u64,
    /// The guest is stopped, or the session is over: QEMU must not wait any more.
    open_wide: bool,
    ended: bool,
}

impl Spool {
    /// Makes the file in `folder`, mode 0600, without a name.
    pub(crate) fn create(folder: &Path) -> io::Result<Spool> {
        let tmpfile = i32::try_from(rustix::fs::OFlags::TMPFILE.bits()).unwrap_or(0);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(tmpfile)
            .mode(0o600)
            .open(folder)?;
        Ok(Spool {
            file,
            state: Mutex::new(State::default()),
            room: Condvar::new(),
            filled: Notify::new(),
        })
    }

    /// Takes bytes; waits for the link while the guest runs.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let at = {
            let mut state = self.lock();
            while !state.open_wide && state.written - state.sent > RUNNING_MAX_BYTES {
                state = self
                    .room
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.written
        };
        self.file.write_all_at(bytes, at)?;
        self.lock().written += bytes.len() as u64;
        self.filled.notify_one();
        Ok(())
    }

    /// From here on nothing waits: the guest is stopped, or nobody sends any more.
    pub(crate) fn open_wide(&self) {
        self.lock().open_wide = true;
        self.room.notify_all();
    }

    /// No byte follows.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.filled.notify_one();
    }

    /// The next piece in order, `None` after the last one.
    pub(crate) async fn next(&self) -> io::Result<Option<Bytes>> {
        let (at, length) = loop {
            {
                let state = self.lock();
                let length = (state.written - state.sent).min(PIECE_BYTES);
                if length > 0 {
                    break (state.sent, length);
                }
                if state.ended {
                    return Ok(None);
                }
            }
            self.filled.notified().await;
        };
        let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
        self.file.read_exact_at(&mut piece, at)?;
        Ok(Some(piece.into()))
    }

    /// The lane has taken so many bytes.
    pub(crate) fn sent(&self, bytes: usize) {
        let mut state = self.lock();
        state.sent += bytes as u64;
        if state.sent - state.punched >= PUNCH_BYTES {
            let (from, length) = (state.punched, state.sent - state.punched);
            state.punched = state.sent;
            drop(state);
            use rustix::fs::FallocateFlags as Flags;
            let flags = Flags::PUNCH_HOLE | Flags::KEEP_SIZE;
            if let Err(error) = rustix::fs::fallocate(&self.file, flags, from, length) {
                tracing::debug!(%error, "the spool's space is not given back");
            }
        }
        self.room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Bytes come out in order; a running guest's QEMU waits at the limit, a stopped one's does not.
    #[test]
    fn limit_holds_until_the_stop() {
        let spool = Arc::new(Spool::create(&std::env::temp_dir()).unwrap());
        let chunk = vec![7; 1 << 20];
        for _ in 0..=RUNNING_MAX_BYTES >> 20 {
            spool.write(&chunk).unwrap();
        }
        let writer = {
            let (spool, chunk) = (spool.clone(), chunk.clone());
            std::thread::spawn(move || spool.write(&chunk))
        };
        assert_eq!(spool.lock().written, RUNNING_MAX_BYTES + (1 << 20));
        spool.open_wide();
        writer.join().unwrap().unwrap();
        spool.end();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut total = 0;
        while let Some(piece) = runtime.block_on(spool.next()).unwrap() {
            assert!(piece.iter().all(|byte| *byte == 7));
            total += piece.len();
            spool.sent(piece.len());
        }
        assert_eq!(total as u64, RUNNING_MAX_BYTES + (2 << 20));
    }
}
