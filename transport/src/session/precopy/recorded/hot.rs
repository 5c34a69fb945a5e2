//! Would it save bytes to leave hot pages for the last round? What a walk over the dirty pages of real
//! guests sends, with and without.
//!
//! A page is written many times in a round and sent once, when the walk comes by: that is most of what
//! could be saved. Here the rest is counted.

use std::time::Duration;

use super::{IDLE, Recorded, USE};

const STEP: Duration = Duration::from_millis(50);
/// QEMU is asked for what is dirty as often.
const SYNC_STEPS: u32 = 20;
/// Of the last eight seconds those in which a hot page is written.
const HOT_SECONDS: u32 = 6;
const ROUNDS: u32 = 4;
const STEPS_MAX: u32 = 4000;

struct Walk {
    guest: Recorded,
    dirty: Vec<bool>,
    left: u32,
    /// Bits of seconds, the present one the highest.
    heat: Vec<u8>,
    cursor: usize,
}

impl Walk {
    fn sync(&mut self, from: Duration, to: Duration) {
        for page in self.guest.between(from, to) {
            let page = usize::try_from(page).expect("an index");
            self.heat[page] |= 0x80;
            if !std::mem::replace(&mut self.dirty[page], true) {
                self.left += 1;
            }
        }
    }

    /// Sends so many pages at most; hot ones are passed over while there are others.
    fn send(&mut self, most: u32, leaves_hot: bool) -> u32 {
        let mut sent = 0;
        for looked in 0..2 * self.dirty.len() {
            if sent == most || self.left == 0 {
                break;
            }
            let page = self.cursor;
            self.cursor = (page + 1) % self.dirty.len();
            let waits = leaves_hot
                && looked < self.dirty.len()
                && self.heat[page].count_ones() >= HOT_SECONDS;
            if self.dirty[page] && !waits {
                self.dirty[page] = false;
                self.left -= 1;
                sent += 1;
            }
        }
        sent
    }
}

/// Pages sent until the link has caught up so many times.
fn pages_sent(recording: &str, pages_per_s: u32, leaves_hot: bool) -> u32 {
    let guest = Recorded::parse(recording);
    let pages = usize::try_from(guest.pages).expect("an index");
    let mut walk = Walk {
        left: guest.pages,
        guest,
        dirty: vec![true; pages],
        heat: vec![0; pages],
        cursor: 0,
    };
    let (mut sent, mut rounds, mut synced) = (0, 0, Duration::ZERO);
    for step in 1..STEPS_MAX {
        sent += walk.send(pages_per_s / 20, leaves_hot);
        let is_drained = walk.left == 0;
        rounds += u32::from(is_drained);
        if rounds == ROUNDS {
            return sent;
        }
        if step % SYNC_STEPS == 0 {
            walk.heat.iter_mut().for_each(|bits| *bits >>= 1);
        }
        if step % SYNC_STEPS == 0 || is_drained {
            let now = STEP * step;
            walk.sync(synced, now);
            synced = now;
        }
    }
    panic!("the link never catches up");
}

/// Less than one page in two hundred: not worth a second order of pages in pre-copy.
#[test]
fn leaving_hot_pages_saves_next_to_nothing() {
    for (name, recording) in [("idle", IDLE), ("use", USE)] {
        for pages_per_s in [3_000, 6_000] {
            let [as_is, later] =
                [false, true].map(|leaves_hot| pages_sent(recording, pages_per_s, leaves_hot));
            println!("{name}, {pages_per_s} pages/s: {as_is} pages, hot ones last {later}");
            assert!(later * 1000 > as_is * 995, "{name}: {as_is}, {later}");
        }
    }
}
