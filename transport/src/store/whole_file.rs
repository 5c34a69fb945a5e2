//! Files that are there whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Replaces a file (mode 0600) by one with these bytes: after a crash it is the old or the new one.
/// The caller holds whatever lock keeps two writers apart; a draft of one that died is overwritten.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("tmp");
    let written = write_synced(&draft, bytes).and_then(|()| fs::rename(&draft, path));
    if let Err(error) = written {
        // A full disk gets back what the draft took of it.
        fs::remove_file(&draft).unwrap_or_default();
        return Err(error);
    }
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    File::open(folder)?.sync_all()
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
