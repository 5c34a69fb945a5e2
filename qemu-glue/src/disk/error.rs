//! Why a disk image cannot be read.

use std::io;
use std::path::PathBuf;

/// What is wrong with which file of the chain.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file system said no.
    #[error("disk image {}", path.display())]
    LocalFile {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        cause: io::Error,
    },
    /// A device, a folder, a socket.
    #[error("{} is not a regular file", .0.display())]
    UnsupportedFile(PathBuf),
    /// The metadata makes no sense.
    #[error("{} is damaged or no qcow2 image: {what}", path.display())]
    ImageDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Something that this reader does not have.
    #[error("{} uses {what}, which is not supported", path.display())]
    UnsupportedFeature {
        /// The file.
        path: PathBuf,
        /// What it uses.
        what: &'static str,
    },
    /// More layers than the limit, most likely a circle.
    #[error("the chain of backing files does not end; the last is {}", .0.display())]
    ImageChain(PathBuf),
}
