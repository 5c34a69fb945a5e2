//! What is kept on disk: the source's shadow of pages that are announced and not sent yet, and the
//! checkpoints, replicas of the image as the peer last had it, that make the next move cheap, and
//! indexes of disk images whose blocks a peer may name.
//! docs/store.md has layout, crash rules and budgets.

mod checkpoint;
mod content;
mod ranges;
mod replica;
mod shadow;
mod threads;
mod uring;
mod whole_file;

pub use checkpoint::{
    CheckpointError, Checkpoints, Limits, Meta, Opening, Role, Settled, State, Stored, Usage,
};
pub use content::{BlockSource, ContentIndex, OpenImage, Share, Shares};
pub use ranges::{BasisKey, RangeHashes};
pub use replica::ReplicaFile;
pub use shadow::Shadow;
pub use uring::WriteRing;
