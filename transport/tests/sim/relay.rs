//! A stream that the capture cannot parse: its bytes go as they come, over lane 0.
//!
//! ```text
//! 1 | page u32 | content    a page          2 | length u32 | bytes    device state, the end
//! ```

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use transport::block::{PAGE_SIZE, Sink};
use transport::session::source::Input;

use crate::content;
use crate::net::Way;
use crate::source_qemu::Said;
use crate::world::{Event, Life, World};

/// Unsent bytes beyond which QEMU waits while its guest runs.
const RUNNING_BYTES_MAX: usize = 512 * 1024;
/// What QUIC takes of the lane beyond what is on the wire.
const STREAM_BYTES_MAX: usize = 128 * 1024;
const LANE_STREAM: usize = 1;
const TAIL_BYTES: usize = 60_000;

/// Bytes between source QEMU and the lane.
#[derive(Debug, Default)]
pub(crate) struct Spool {
    pieces: VecDeque<Bytes>,
    queued_bytes: usize,
    total_bytes: u64,
    ended: bool,
    told: bool,
    pub(crate) is_open: bool,
}

impl Spool {
    fn put(&mut self, piece: BytesMut) {
        self.queued_bytes += piece.len();
        self.total_bytes += u64::try_from(piece.len()).expect("a piece is small");
        self.pieces.push_back(piece.freeze());
    }
}

impl World {
    /// Whether QEMU blocks in its write: only while the guest runs (S5).
    pub(crate) fn relay_is_full(&self) -> bool {
        let full = self.source.spool.queued_bytes > RUNNING_BYTES_MAX;
        self.plan.relay && full && self.source_qemu.is_running
    }

    pub(crate) fn relay(&mut self, said: Said) {
        let mut piece = BytesMut::new();
        match said {
            Said::Head => self.source_input(Input::Relay),
            Said::Page { page, version } => {
                let mut bytes = [0; PAGE_SIZE];
                content::content(page, version, &mut bytes);
                piece.put_u8(1);
                piece.put_u32(u32::try_from(page).expect("a small guest"));
                piece.put_slice(&bytes);
            }
            Said::Tail => {
                piece.put_u8(2);
                piece.put_u32(u32::try_from(TAIL_BYTES).expect("a small state"));
                piece.put_bytes(7, TAIL_BYTES);
                self.source.spool.ended = true;
            }
            Said::Section { .. } | Said::RamEnd => {}
            Said::Stop | Said::Resume | Said::Pass | Said::Failed | Said::Completed => {}
        }
        if !piece.is_empty() {
            self.source.spool.put(piece);
        }
    }

    /// Sends what the lane takes; says once when all is sent.
    pub(crate) fn pump_relay(&mut self) {
        let live = self.source.life == Life::Live && self.source.has_peer;
        if !live || !self.source.spool.is_open {
            return;
        }
        while self.net.queued_bytes(Way::ToTarget, LANE_STREAM) < STREAM_BYTES_MAX {
            let Some(piece) = self.source.spool.pieces.pop_front() else {
                break;
            };
            self.source.spool.queued_bytes -= piece.len();
            self.net.send(Way::ToTarget, LANE_STREAM, piece);
        }
        let is_out = self.net.queued_bytes(Way::ToTarget, LANE_STREAM) == 0;
        let spool = &mut self.source.spool;
        if spool.ended && spool.pieces.is_empty() && is_out && !spool.told {
            spool.told = true;
            let bytes = spool.total_bytes;
            // The lane's end is acknowledged a round trip later.
            self.after(
                3 * self.plan.link.delay,
                Event::Source(Input::Relayed { bytes }),
            );
        }
    }

    /// Target QEMU reads the stream itself.
    pub(crate) fn relayed_bytes(&mut self, bytes: &[u8]) {
        self.target.relayed.extend_from_slice(bytes);
        let layout = content::layout(self.plan.ram_pages);
        loop {
            let buffer = &mut self.target.relayed;
            let Some(head) = buffer.first_chunk::<5>() else {
                return;
            };
            let [kind, number @ ..] = *head;
            let number = u32::from_be_bytes(number);
            let length = if kind == 1 { PAGE_SIZE } else { TAIL_BYTES };
            if buffer.len() < 5 + length {
                return;
            }
            let mut record = buffer.split_to(5 + length);
            record.advance(5);
            if kind == 1 {
                let page = record.first_chunk().expect("one page was cut off");
                let at = content::address(&layout, number);
                self.target_qemu
                    .page(at, page)
                    .expect("a modelled page is written");
            } else {
                let delay = self.about_ms(15);
                self.after(delay, Event::TargetLoaded);
            }
        }
    }
}
