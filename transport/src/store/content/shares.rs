//! Which disk image may be named by which peer.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::quic::Fingerprint;
use crate::store::whole_file;

const FILE: &str = "shares.json";
const SCHEMA: u32 = 1;
/// Most images of one host.
const SHARES_MAX: usize = 1024;

/// Where everything about content is kept.
pub(super) fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("content")
}

/// One image and who may name its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// The image, absolute.
    pub path: PathBuf,
    /// How it is to be read: `raw` or `qcow2`. Said by the operator and never guessed from the
    /// content, which a guest may have written.
    pub format: String,
    /// Fingerprints of the peers.
    pub peers: BTreeSet<String>,
}

impl Share {
    /// Name of its folder.
    pub(super) fn id(&self) -> String {
        let path = self.path.as_os_str().as_encoded_bytes();
        let hash = blake3::derive_key("scaleaway/1 content folder", path);
        hash[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The list, as it is in the state dir.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    schema: u32,
    images: Vec<Share>,
}

impl Shares {
    /// Reads the list; an absent file is an empty one.
    ///
    /// # Errors
    /// When the file cannot be read or makes no sense: nothing is shared by a guess.
    pub fn load(state_dir: &Path) -> io::Result<Self> {
        let text = match fs::read(folder(state_dir).join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self {
                    schema: SCHEMA,
                    images: Vec::new(),
                });
            }
            text => text?,
        };
        let shares: Self = serde_json::from_slice(&text)?;
        if shares.schema != SCHEMA || shares.images.len() > SHARES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{FILE} is of another version or too long"),
            ));
        }
        Ok(shares)
    }

    /// All shares, by path.
    pub fn all(&self) -> &[Share] {
        &self.images
    }

    /// The images that a peer may name.
    pub fn shared_with(&self, peer: Fingerprint) -> impl Iterator<Item = &Share> {
        let peer = peer.to_string();
        self.images
            .iter()
            .filter(move |share| share.peers.contains(&peer))
    }

    /// Lets peers name an image, more of them when it is there already.
    ///
    /// # Errors
    /// When the list is full.
    pub fn add(&mut self, share: Share) -> io::Result<()> {
        match self
            .images
            .binary_search_by(|kept| kept.path.cmp(&share.path))
        {
            Ok(nth) => {
                let kept = &mut self.images[nth];
                kept.format = share.format;
                kept.peers.extend(share.peers);
            }
            Err(_) if self.images.len() >= SHARES_MAX => {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            Err(nth) => self.images.insert(nth, share),
        }
        Ok(())
    }

    /// No longer lets peers name an image (all of them when none is given) and removes their
    /// indexes. Returns whether the image was in the list.
    ///
    /// # Errors
    /// When an index cannot be removed.
    pub fn remove(
        &mut self,
        state_dir: &Path,
        path: &Path,
        peers: &[Fingerprint],
    ) -> io::Result<bool> {
        let Some(nth) = self.images.iter().position(|share| share.path == path) else {
            return Ok(false);
        };
        let share = &mut self.images[nth];
        let place = folder(state_dir).join(share.id());
        for peer in peers {
            share.peers.remove(&peer.to_string());
            ignore_absent(fs::remove_file(place.join(peer.to_hex())))?;
        }
        if peers.is_empty() || share.peers.is_empty() {
            self.images.remove(nth);
            ignore_absent(fs::remove_dir_all(place))?;
        }
        Ok(true)
    }

    /// Reads the list, changes it and writes it, while no other process does.
    ///
    /// # Errors
    /// What reading, the change or writing says; the list is then as it was.
    pub fn edit<T>(
        state_dir: &Path,
        change: impl FnOnce(&mut Shares) -> io::Result<T>,
    ) -> io::Result<T> {
        let folder = folder(state_dir);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        let lock = File::open(&folder)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        let mut shares = Self::load(state_dir)?;
        let changed = change(&mut shares)?;
        whole_file::replace(&folder.join(FILE), &serde_json::to_vec_pretty(&shares)?)?;
        Ok(changed)
    }
}

fn ignore_absent(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
