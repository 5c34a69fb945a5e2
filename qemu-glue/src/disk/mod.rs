//! Disk images as their guest sees them: raw and qcow2 with the whole backing chain, read only.
//!
//! ```text
//! layers[0]   what the operator named      an extent that this one does not have ...
//! layers[1]   its backing file             ... is looked for here, and so on; below the last: zero
//! ```
//!
//! Why not a library: what is wanted is the list of all files that an image is made of (to see that
//! one has changed), extents that are left alone (compressed, encrypted), and limits on metadata
//! that somebody else may have written; all of it read-only and without an event loop.
//!
//! The format is never guessed from the content: a guest that writes a qcow2 header to the begin of
//! its raw disk would choose which file of the host is read.
//!
//! A disk that a VM writes meanwhile may change below a reader. What is read then may be old or
//! mixed; the user of this module checks contents by their hash.

mod error;
mod layer;
mod qcow2;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub use error::DiskError;
use layer::Layer;

/// Most layers of one image.
const LAYERS_MAX: usize = 64;

/// How a file is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

/// What a part of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes that can be read.
    Data,
    /// Zeros.
    Zero,
    /// Bytes that take more than reading: compressed, encrypted.
    Packed,
}

/// A part of a disk, from the place that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// What it is.
    pub kind: Kind,
    /// Its length, at least 1.
    pub bytes: u64,
}

/// See the module's doc.
#[derive(Debug)]
pub struct DiskImage {
    /// From the top of the chain down.
    layers: Vec<Layer>,
}

impl DiskImage {
    /// Opens an image and the chain below it.
    ///
    /// # Errors
    /// Says which file of the chain is at fault, and why.
    pub fn open(path: &Path, format: Format) -> Result<DiskImage, DiskError> {
        let mut layers = Vec::new();
        let mut next = Some((path.to_path_buf(), format));
        while let Some((path, format)) = next {
            if layers.len() >= LAYERS_MAX {
                return Err(DiskError::ImageChain(path));
            }
            let layer = Layer::open(&path, format)?;
            next = layer.backing()?;
            layers.push(layer);
        }
        Ok(DiskImage { layers })
    }

    /// Length of the disk.
    pub fn bytes(&self) -> u64 {
        self.layers[0].bytes()
    }

    /// Text that changes when a file of the chain is replaced, grows or is written: for each its
    /// path, device, inode, length and time of last change.
    pub fn identity(&self) -> String {
        let files = self.layers.iter().map(Layer::identity);
        files.collect::<Vec<_>>().join("\n")
    }

    /// What begins at `at`; `None` at the end of the disk.
    ///
    /// # Errors
    /// When metadata cannot be read or makes no sense.
    pub fn extent(&self, at: u64) -> io::Result<Option<Extent>> {
        if at >= self.bytes() {
            return Ok(None);
        }
        let (_, extent) = self.resolve(at, self.bytes() - at)?;
        Ok(Some(extent))
    }

    /// Reads bytes of the disk.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end, `Unsupported` where bytes are packed, and what the file
    /// system says.
    pub fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let mut at = at;
        let mut rest = into;
        while !rest.is_empty() {
            if at >= self.bytes() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let wanted = (rest.len() as u64).min(self.bytes() - at);
            let (layer, extent) = self.resolve(at, wanted)?;
            let length = usize::try_from(extent.bytes).map_or(rest.len(), |n| n.min(rest.len()));
            let (part, after) = rest.split_at_mut(length);
            match (extent.kind, layer) {
                (Kind::Data, Some(layer)) => layer.read(at, part)?,
                (Kind::Zero, _) | (Kind::Data, None) => part.fill(0),
                (Kind::Packed, _) => return Err(io::ErrorKind::Unsupported.into()),
            }
            at += extent.bytes.min(length as u64);
            rest = after;
        }
        Ok(())
    }

    /// The layer that holds `at`, and for how long, at most `limit` bytes.
    fn resolve(&self, at: u64, limit: u64) -> io::Result<(Option<&Layer>, Extent)> {
        let mut bytes = limit;
        for layer in &self.layers {
            if at >= layer.bytes() {
                // A disk may be longer than its backing file: zeros from there on.
                break;
            }
            bytes = bytes.min(layer.bytes() - at);
            let (kind, length) = layer.map(at, bytes)?;
            bytes = bytes.min(length.max(1));
            if let Some(kind) = kind {
                return Ok((Some(layer), Extent { kind, bytes }));
            }
        }
        let kind = Kind::Zero;
        Ok((None, Extent { kind, bytes }))
    }
}

/// An absolute path of a file that another one names.
fn beside(image: &Path, named: &str) -> PathBuf {
    image.parent().unwrap_or_else(|| Path::new("/")).join(named)
}

/// See [`DiskImage::identity`].
fn identity_of(path: &Path, found: &fs::Metadata) -> String {
    format!(
        "{}\0{} {} {} {}.{:09}",
        path.display(),
        found.dev(),
        found.ino(),
        found.len(),
        found.mtime(),
        found.mtime_nsec()
    )
}

#[cfg(test)]
mod tests;
