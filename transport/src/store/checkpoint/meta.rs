//! What is noted beside an image. It names the image and orders eviction; it proves nothing.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Opening, Settled};
use crate::block::{BlockSpec, Layout};
use crate::store::whole_file;

/// Version of the form.
const SCHEMA: u32 = 1;
/// Longest file that is read: [`crate::wire::limits::BLOCKS_MAX`] names of 255 bytes, escaped.
const META_MAX_BYTES: u64 = 4 << 20;

/// What a host was in an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It had the guest.
    Source,
    /// It was to get it.
    Target,
}

/// Whether the attempt that last used the image came to an end that was noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// In use, or its agent died.
    Open,
    /// Noted.
    Settled,
}

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Block {
    name: String,
    pages: u32,
}

/// See the module's doc.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    schema: u32,
    /// The VM: its UUID or given name.
    pub vm: String,
    /// Fingerprint of the peer's key.
    pub peer: String,
    /// What this host was in the last attempt.
    pub role: Role,
    /// Seconds since 1970 when the image was begun.
    pub created_s: u64,
    /// Seconds since 1970 when an attempt last began or ended with it.
    pub used_s: u64,
    /// The last attempt, in hex.
    pub attempt: String,
    /// How that ended.
    pub state: State,
    /// Root of the ledger at the end of it, in hex, where one was agreed on.
    pub root: Option<String>,
    blocks: Vec<Block>,
}

impl Meta {
    pub(super) fn begin(opening: &Opening, layout: &Layout) -> Self {
        let block = |spec: &BlockSpec| Block {
            name: spec.name.clone(),
            pages: spec.pages,
        };
        Self {
            schema: SCHEMA,
            vm: opening.vm.clone(),
            peer: opening.peer.to_string(),
            role: opening.role,
            created_s: opening.now_s,
            used_s: opening.now_s,
            attempt: opening.attempt.clone(),
            state: State::Open,
            root: None,
            blocks: layout.blocks().iter().map(block).collect(),
        }
    }

    /// Bytes of guest memory that the image stands for.
    pub fn image_bytes(&self) -> u64 {
        let pages: u64 = self.blocks.iter().map(|block| u64::from(block.pages)).sum();
        pages * crate::block::PAGE_SIZE as u64
    }

    /// The block list of the image.
    pub(super) fn blocks(&self) -> Vec<BlockSpec> {
        let spec = |block: &Block| BlockSpec {
            name: block.name.clone(),
            pages: block.pages,
        };
        self.blocks.iter().map(spec).collect()
    }

    /// Whether both are of one VM, peer and block list.
    pub(super) fn is_same_image(&self, other: &Self) -> bool {
        self.vm == other.vm && self.peer == other.peer && self.blocks == other.blocks
    }

    pub(super) fn created_at(self, created_s: u64) -> Self {
        Self { created_s, ..self }
    }

    pub(super) fn settle(&mut self, settled: &Settled) {
        let hex = |byte: &u8| format!("{byte:02x}");
        self.state = State::Settled;
        self.used_s = settled.now_s;
        self.root = settled.root.map(|root| root.0.iter().map(hex).collect());
    }

    /// Reads it; `None` when it is not there, too long, torn, or of another version: the image is
    /// begun anew then.
    pub(super) fn load(path: &Path) -> Option<Self> {
        if fs::symlink_metadata(path).ok()?.len() > META_MAX_BYTES {
            return None;
        }
        let mut text = String::new();
        let file = File::open(path).ok()?;
        file.take(META_MAX_BYTES).read_to_string(&mut text).ok()?;
        let meta: Self = serde_json::from_str(&text).ok()?;
        (meta.schema == SCHEMA).then_some(meta)
    }

    pub(super) fn save(&self, path: &Path) -> std::io::Result<()> {
        whole_file::replace(path, &serde_json::to_vec_pretty(self)?)
    }
}
