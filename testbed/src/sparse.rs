//! Copies in which holes stay holes: disks, and what the product keeps of guests.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

/// Copies a file or a folder to a path that is not there yet.
///
/// # Errors
/// When it cannot be copied.
pub(crate) fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status = Command::new("cp")
        .args(["--archive", "--reflink=auto", "--sparse=always", "--"])
        .args([from, to])
        .status()
        .context("cannot run cp")?;
    ensure!(status.success(), "cannot copy {}: {status}", from.display());
    Ok(())
}
