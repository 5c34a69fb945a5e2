//! One file of a chain.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom};

use super::qcow2::Qcow2;
use super::{DiskError, Format, Kind, beside, identity_of};

/// An open file and how it is read.
#[derive(Debug)]
pub(super) struct Layer {
    path: PathBuf,
    file: File,
    found: Metadata,
    /// `None`: raw.
    qcow2: Option<Qcow2>,
}

impl Layer {
    pub(super) fn open(path: &Path, format: Format) -> Result<Self, DiskError> {
        let failed = |cause| DiskError::LocalFile {
            path: path.into(),
            cause,
        };
        // Not to hang on a FIFO in its place.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(DiskError::UnsupportedFile(path.into()));
        }
        let qcow2 = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(Qcow2::open(path, &file)?),
        };
        Ok(Self {
            path: path.into(),
            file,
            found,
            qcow2,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.qcow2
            .as_ref()
            .map_or(self.found.len(), |qcow2| qcow2.bytes())
    }

    pub(super) fn identity(&self) -> String {
        identity_of(&self.path, &self.found)
    }

    /// The file below this one.
    pub(super) fn backing(&self) -> Result<Option<(PathBuf, Format)>, DiskError> {
        let Some(backing) = self.qcow2.as_ref().and_then(|qcow2| qcow2.backing()) else {
            return Ok(None);
        };
        let unsupported = |what| DiskError::UnsupportedFeature {
            path: self.path.clone(),
            what,
        };
        let Some(format) = &backing.format else {
            return Err(unsupported(
                "a backing file whose format is not stated (qemu-img rebase -u -F states it)",
            ));
        };
        let format = Format::from_name(format)
            .ok_or_else(|| unsupported("a backing file that is neither raw nor qcow2"))?;
        // QEMU takes what stands before a colon, up to the first slash, for a protocol.
        let before_slash = backing.name.split('/').next().unwrap_or_default();
        if before_slash.contains(':') {
            return Err(unsupported("a backing file that is not named by its path"));
        }
        Ok(Some((beside(&self.path, &backing.name), format)))
    }

    /// What `at` is in this layer, and for how many bytes; `None`: what the layers below say.
    pub(super) fn map(&self, at: u64, limit: u64) -> io::Result<(Option<Kind>, u64)> {
        match &self.qcow2 {
            Some(qcow2) => qcow2.map(&self.file, at, limit),
            None => self.map_raw(at, limit),
        }
    }

    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let at = match &self.qcow2 {
            Some(qcow2) => qcow2.host_offset(&self.file, at)?,
            None => at,
        };
        read_or_zero(&self.file, at, into)
    }

    fn map_raw(&self, at: u64, limit: u64) -> io::Result<(Option<Kind>, u64)> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) if data > at => Ok((Some(Kind::Zero), limit.min(data - at))),
            Ok(_) => {
                let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(at))?;
                Ok((Some(Kind::Data), limit.min(hole.saturating_sub(at))))
            }
            Err(rustix::io::Errno::NXIO) => Ok((Some(Kind::Zero), limit)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads; what lies behind the end of the file is zero, as for QEMU.
pub(super) fn read_or_zero(file: &File, at: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64) {
            Ok(0) => {
                into[done..].fill(0);
                break;
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
