//! A look at a checkpoint ahead of a move: nothing is made, noted or evicted.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;

use super::{CheckpointError, Checkpoints, IMAGE, META, Meta, Place, lock};
use crate::block::Layout;
use crate::quic::Fingerprint;
use crate::store::replica::ReplicaFile;

impl Checkpoints {
    /// The replica of a VM and peer as it lies there; `None` when there is none that can be read.
    ///
    /// # Errors
    /// When an attempt is using it, or the disk fails.
    pub fn peek(
        &self,
        vm: &str,
        peer: Fingerprint,
    ) -> Result<Option<ReplicaFile>, CheckpointError> {
        let folder = self.folder_of(vm, peer);
        let Some(lock) = lock(&folder)? else {
            return Ok(None);
        };
        let Some(meta) = Meta::load(&folder.join(META)) else {
            return Ok(None);
        };
        let Ok(layout) = Layout::new(meta.blocks()) else {
            return Ok(None);
        };
        let failed = |cause| CheckpointError::LocalFile {
            folder: folder.clone(),
            cause,
        };
        let image = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0))
            .open(folder.join(IMAGE));
        let image = match image {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let place = Place {
            folder: folder.clone(),
            _lock: lock,
            meta: Mutex::new(meta),
            all: self.clone(),
        };
        ReplicaFile::new(image, &Arc::new(layout), place)
            .map(Some)
            .map_err(failed)
    }
}
