//! What target QEMU says on its return path, for the session.

use std::io::Read;
use std::os::unix::net::UnixStream;

use qemu_glue::stream::{RamBlock, return_path};
use tokio::sync::mpsc;
use transport::block::{AbsentPages, BlockId, PageAddress};

/// Ping inside of the package: the devices are loaded. Barriers count from 1 and stay below.
pub(crate) const PACKAGE_PING: u32 = u32::MAX;

/// What the session is told.
#[derive(Debug)]
pub(crate) enum Fed {
    /// QEMU has consumed everything before this barrier.
    Barrier(u32),
    /// QEMU says that it has loaded everything.
    Loaded,
    /// Post-copy: QEMU has loaded the devices and takes pages while the guest runs.
    Listening,
    /// Post-copy: QEMU waits for these bytes of a block (or of the one that it named last).
    Wanted {
        block: Option<Vec<u8>>,
        start: u64,
        length: u32,
    },
    /// QEMU closed, or said that it failed, or the stream could not be written.
    Failed(String),
}

/// Reads a bitmap of each block: what QEMU does not have is lacking.
pub(crate) fn read_bitmaps(
    socket: &mut UnixStream,
    blocks: &[RamBlock],
    absent: &AbsentPages,
) -> anyhow::Result<()> {
    let largest = blocks.iter().map(|block| u64::from(block.pages)).max();
    // QEMU rounds up to eight bytes.
    let bytes_max = largest.unwrap_or(0).div_ceil(64) * 8;
    let mut parser = return_path::Parser::in_recovery(bytes_max);
    let mut buffer = [0; 4096];
    let mut found = 0;
    while found < blocks.len() {
        let count = socket.read(&mut buffer)?;
        anyhow::ensure!(count > 0, "target QEMU closed its stream");
        let mut told = Vec::new();
        parser.push(&buffer[..count], &mut |message| told.push(message))?;
        for message in told {
            let return_path::Message::Bitmap { block: name, bits } = message else {
                continue;
            };
            let place = blocks
                .iter()
                .position(|block| block.name.as_bytes() == name);
            let Some(place) = place else {
                anyhow::bail!("target QEMU names a block that does not exist");
            };
            let block = BlockId(u16::try_from(place)?);
            for page in 0..blocks[place].pages {
                let byte = bits.get(usize::try_from(page / 8)?);
                if byte.is_none_or(|byte| byte >> (page % 8) & 1 == 0) {
                    absent.insert_page(PageAddress { block, page });
                }
            }
            found += 1;
        }
    }
    Ok(())
}

pub(crate) fn read_return_path(
    mut socket: UnixStream,
    mut parser: return_path::Parser,
    events: &mpsc::Sender<Fed>,
) {
    let mut buffer = [0; 4096];
    let mut loaded = false;
    loop {
        let mut told = Vec::new();
        let ended = match socket.read(&mut buffer) {
            // QEMU closes its side when it has loaded.
            Ok(0) if loaded => return,
            Ok(0) => Some("target QEMU closed its stream".to_owned()),
            Ok(count) => parser
                .push(&buffer[..count], &mut |message| told.extend(fed(message)))
                .err()
                .map(|error| error.to_string()),
            Err(error) => Some(format!("target QEMU's return path: {error}")),
        };
        for event in told {
            loaded |= matches!(event, Fed::Loaded);
            if events.blocking_send(event).is_err() {
                return;
            }
        }
        if let Some(detail) = ended {
            let told = events.blocking_send(Fed::Failed(detail));
            tracing::trace!(session = told.is_ok(), "return path ended");
            return;
        }
    }
}

/// S4: what target QEMU says stays here; the source's QEMU hears only what the session decides.
fn fed(message: return_path::Message) -> Option<Fed> {
    match message {
        return_path::Message::Pong(PACKAGE_PING) => Some(Fed::Listening),
        return_path::Message::Pong(barrier) => Some(Fed::Barrier(barrier)),
        return_path::Message::Shut(0) => Some(Fed::Loaded),
        return_path::Message::Shut(code) => Some(Fed::Failed(format!(
            "target QEMU could not load the guest (SHUT {code})"
        ))),
        return_path::Message::SwitchoverAck => None,
        return_path::Message::RequestPages {
            block,
            start,
            length,
        } => Some(Fed::Wanted {
            block,
            start,
            length,
        }),
        return_path::Message::ResumeAck => None,
        return_path::Message::Bitmap { .. } => {
            Some(Fed::Failed("target QEMU speaks of a recovery".into()))
        }
    }
}
