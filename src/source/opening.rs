//! What the source has kept of the VM, found while QEMU's stream begins.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use transport::block::BlockSpec;
use transport::quic::driver::digests;
use transport::session::source::Input;
use transport::store::{RangeHashes, Role};

use super::driver::Driver;
use crate::capture::Image;
use crate::kept::{Kept, Whose};
use crate::waiting::now;

/// What `open_kept` brings.
#[derive(Debug)]
pub(super) struct Opened {
    head: Bytes,
    blocks: Vec<BlockSpec>,
    kept: Option<Kept>,
    hashes: Option<Arc<RangeHashes>>,
    digests: Vec<[u8; 16]>,
}

impl Driver {
    /// Opens and hashes what this side has kept, beside the loop: QEMU's stream goes on meanwhile.
    pub(super) fn open_kept(&self, head: Bytes, image: &Image) -> mpsc::Receiver<Opened> {
        let (found, opened) = mpsc::channel(1);
        let (layout, whose, nonce, key) =
            (image.layout.clone(), self.whose(), self.nonce, self.secret);
        tokio::spawn(async move {
            let blocks = layout.blocks().to_vec();
            let kept = tokio::task::spawn_blocking(move || Kept::open(&whose?, &layout));
            let kept = kept.await.ok().flatten();
            let hashes = match &kept {
                Some(kept) => kept.hash(key).await.ok().flatten(),
                None => None,
            };
            let digests = hashes
                .as_ref()
                .map_or(Vec::new(), |hashes| digests(hashes, &nonce, &key));
            let opened = Opened {
                head,
                blocks,
                kept,
                hashes,
                digests,
            };
            if found.send(opened).await.is_err() {
                tracing::debug!("the session has ended");
            }
        });
        opened
    }

    fn whose(&self) -> Option<Whose> {
        Some(Whose {
            state: self.options.state.clone(),
            vm: self.me.vm.clone(),
            peer: self.peer.as_ref()?.connection.peer(),
            role: Role::Source,
            attempt: self.me.attempt,
        })
    }

    pub(super) fn opened(&mut self, opened: Opened) {
        self.opened = None;
        self.kept = opened.kept;
        self.hashes = opened.hashes;
        let input = Input::Head {
            head: opened.head,
            blocks: opened.blocks,
            basis: opened.digests,
        };
        self.machine.handle(now(), input);
    }
}
