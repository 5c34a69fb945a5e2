//! How a move would go: a pure function of what was measured.
//!
//! ```text
//! first walk   all pages with content, at the rate of the link or of the encoder
//! rounds       what was dirtied behind the walk, shorter each time; a page that is dirtied again before
//!              its turn costs nothing
//! stop         what was dirtied since the last look, one and a half round trips, a fixed part
//! ```
//! The rule of when to look and when to stop is that of `transport::session::decide`.

use serde::{Deserialize, Serialize};

use super::cost::Costs;
use super::dirtying::Dirtying;
use super::history::Learned;
use crate::estimate::to_u64;

/// What the model is told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inputs {
    pub(crate) pages_total: f64,
    pub(crate) costs: Costs,
    pub(crate) dirtying: Dirtying,
    /// Lane bytes per second that the link takes, a cap included.
    pub(crate) rate_bytes_per_s: f64,
    pub(crate) rtt_s: f64,
    /// Bytes of IP both ways for each lane byte.
    pub(crate) wire_per_byte: f64,
    pub(crate) cores: f64,
    /// Programs that want a core, by cores.
    pub(crate) load: f64,
    /// Longest stop that is asked for.
    pub(crate) downtime_s: f64,
    /// What earlier moves teach.
    pub(crate) learned: Learned,
}

/// Two bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Range {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

/// Whether rounds shrink until the stop fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Converges {
    Yes,
    No,
    Unsure,
}

/// The model's own figures, before what was learned and without ranges: what later moves are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Middle {
    pub(crate) total_ms: f64,
    pub(crate) downtime_ms: f64,
    pub(crate) wire_bytes: f64,
}

/// How a move would go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Prediction {
    pub(crate) total_ms: Range,
    pub(crate) downtime_ms: Range,
    pub(crate) wire_bytes: Range,
    pub(crate) converges: Converges,
    pub(crate) rounds: u32,
    /// The downtime that would do where the asked one does not.
    pub(crate) downtime_needed_ms: u64,
    pub(crate) middle: Middle,
}

/// From the start to the first page: hellos, QEMU's capabilities, its stream's head, the block list.
const SETUP_S: f64 = 0.35;
/// Round trips of it, and of finding the link's rate.
const SETUP_RTTS: f64 = 7.0;
/// How fast QEMU's first pass goes through memory, zero pages or not, with what was kept of it.
const PASS_PAGES_PER_S: f64 = 450_000.0;
/// Part of all cores that encoding may take.
const CORES_SHARE: f64 = 0.75;
/// From asking QEMU for its dirty pages to having them.
const SYNC_S: f64 = 0.15;
/// Longest time between two looks at what is dirty.
const RESYNC_MAX_S: f64 = 1.0;
/// From the last look to the guest's stop: QEMU's window, and what the look itself takes.
const LAST_LOOK_S: f64 = 0.25;
/// The link goes on in QEMU's window: what it takes then does not wait for the stop.
const STOP_WINDOW_S: f64 = 0.1;
/// Where the stop would be longer than asked, the session waits for a better moment and then throttles the
/// guest: it ends near what was asked.
const NEAR_ASKED: f64 = 0.9;
/// Part of a stop that does not depend on what is dirty: device state, its load, journals, `cont`; and for
/// each page of the guest, of its comparison and of QEMU's bitmaps.
const STOP_FIXED_S: f64 = 0.02;
const STOP_PER_PAGE_S: f64 = 0.53e-6;
/// On a busy host each step of the stop waits for its turn: so much more for each program too many on a core,
/// and at most.
const STOP_PER_LOAD: f64 = 0.08;
const STOP_LOAD_MAX: f64 = 1.5;
/// Of one and a half round trips a part passes while something else is done.
const STOP_RTTS: f64 = 1.1;
/// What the rule of the session takes for both.
const POLICY_RTTS: f64 = 1.5;
const POLICY_FIXED_S: f64 = 0.1;
/// Where a guest dirties nearly as fast as the link takes it, a small error of either decides: the course
/// leans to the slow side.
const LEAN: f64 = 1.05;
/// Rounds in a row that do not shrink by a tenth.
const STUCK_ROUNDS: u32 = 3;
/// Step of the course, and its longest.
const STEP_S: f64 = 0.05;
const STEPS_MAX: u32 = 20_000;
/// Bytes beside pages: hellos, block list, device state, progress.
const EXTRA_BYTES: f64 = 110_000.0;
/// The widest range: its high end by its low one.
const WIDEST: f64 = 1.96;

/// Predicts.
pub(crate) fn predict(inputs: &Inputs) -> Prediction {
    let walk = walk(inputs);
    let learned = &inputs.learned;
    let middle = Middle {
        total_ms: walk.total_s * 1e3,
        downtime_ms: walk.downtime_s * 1e3,
        wire_bytes: (walk.lane_bytes * inputs.wire_per_byte + EXTRA_BYTES).max(1.0),
    };
    Prediction {
        total_ms: range(middle.total_ms * learned.total, learned.spread),
        downtime_ms: range(middle.downtime_ms * learned.downtime, learned.spread),
        wire_bytes: range(middle.wire_bytes * learned.wire, learned.spread),
        converges: walk.converges,
        rounds: walk.rounds,
        downtime_needed_ms: to_u64((walk.needed_s * 1e3 * 1.2).ceil()),
        middle,
    }
}

/// A range around a middle, as wide as `spread` (high by low) allows.
fn range(middle: f64, spread: f64) -> Range {
    let half = spread.clamp(1.0, WIDEST).sqrt();
    Range {
        low: to_u64((middle / half).floor()),
        high: to_u64((middle * half).ceil()),
    }
}

/// The course of a move.
#[derive(Debug, Clone, Copy)]
struct Walk {
    total_s: f64,
    downtime_s: f64,
    needed_s: f64,
    lane_bytes: f64,
    rounds: u32,
    converges: Converges,
}

/// What a page takes: seconds of the link or of the encoder, whichever is longer.
struct Pace {
    rate: f64,
    encoder: f64,
}

impl Pace {
    fn seconds(&self, pages: f64, bytes: f64) -> f64 {
        (bytes / self.rate).max(pages / self.encoder)
    }
}

fn walk(inputs: &Inputs) -> Walk {
    let costs = &inputs.costs;
    let pace = Pace {
        rate: inputs.rate_bytes_per_s.max(1.0),
        encoder: inputs.cores * CORES_SHARE * costs.core_bytes_per_s.max(1e6) / 4096.0,
    };
    let dirtying = &inputs.dirtying;
    let first_bytes = inputs.pages_total * costs.bytes_per_page;
    let first_s = pace
        .seconds(inputs.pages_total * costs.content_share, first_bytes)
        .max(inputs.pages_total / PASS_PAGES_PER_S);
    let hot_s = |seconds: f64| {
        let pages = dirtying.hot_in(seconds);
        pace.seconds(pages, pages * costs.hot_bytes_per_page)
    };
    let broad_s = |pages: f64| pace.seconds(pages, pages * costs.again_bytes_per_page);
    let last_s = hot_s(LAST_LOOK_S) + broad_s(dirtying.broad_in(LAST_LOOK_S));
    let left_s = (last_s - STOP_WINDOW_S).max(0.0);
    let asked_s = left_s + POLICY_RTTS * inputs.rtt_s + POLICY_FIXED_S;
    let busy = (1.0 + STOP_PER_LOAD * (inputs.load - 1.0).max(0.0)).min(STOP_LOAD_MAX);
    let fixed_s = (STOP_FIXED_S + STOP_PER_PAGE_S * inputs.pages_total) * busy;
    let least_s = STOP_RTTS * inputs.rtt_s + fixed_s;
    let stop_s = least_s + left_s;
    let drained_s = 0.1 + inputs.rtt_s;
    let mut course = Course {
        waiting: behind_the_walk(dirtying, first_s),
        unseen: 0.0,
        elapsed_s: SETUP_S + SETUP_RTTS * inputs.rtt_s + first_s,
        bytes: first_bytes + dirtying.hot_in(first_s) * costs.hot_bytes_per_page,
        rounds: 1,
    };
    let fits = asked_s <= inputs.downtime_s;
    course.run(inputs, &pace, fits, drained_s);
    let final_s = stop_s.min((NEAR_ASKED * inputs.downtime_s).max(least_s));
    Walk {
        total_s: course.elapsed_s + LAST_LOOK_S + final_s,
        downtime_s: final_s,
        needed_s: stop_s.max(asked_s),
        lane_bytes: course.bytes
            + dirtying.hot_in(LAST_LOOK_S) * costs.hot_bytes_per_page
            + dirtying.broad_in(LAST_LOOK_S) * costs.again_bytes_per_page,
        rounds: course.rounds,
        converges: match asked_s / inputs.downtime_s.max(1e-3) {
            near if near > 1.25 => Converges::No,
            near if near > 0.9 => Converges::Unsure,
            _ => Converges::Yes,
        },
    }
}

/// What waits after the first walk, step by step.
struct Course {
    /// Pages that are known to be dirty, and those that the next look will find.
    waiting: f64,
    unseen: f64,
    elapsed_s: f64,
    bytes: f64,
    rounds: u32,
}

impl Course {
    /// Until what waits is drained and the stop fits, or rounds stop shrinking.
    fn run(&mut self, inputs: &Inputs, pace: &Pace, fits: bool, drained_s: f64) {
        let costs = &inputs.costs;
        let dirtying = &inputs.dirtying;
        let page_s = pace.seconds(1.0, costs.again_bytes_per_page);
        let set = dirtying.working_set.max(1e-9);
        let (mut since_look, mut stuck, mut least) = (0.0, 0, f64::INFINITY);
        for _ in 0..STEPS_MAX {
            let drain = self.waiting * page_s;
            let is_drained = drain <= drained_s;
            if is_drained && fits {
                break;
            }
            // A look costs the hot pages once more.
            let every = if is_drained {
                SYNC_S
            } else {
                (drain / 2.0).clamp(SYNC_S, RESYNC_MAX_S)
            };
            if since_look >= every {
                if is_drained {
                    self.rounds += 1;
                    stuck = if self.unseen < 0.9 * least {
                        0
                    } else {
                        stuck + 1
                    };
                    least = least.min(self.unseen);
                    if stuck >= STUCK_ROUNDS {
                        break;
                    }
                }
                self.waiting += std::mem::take(&mut self.unseen);
                let hot = dirtying.hot_in(since_look);
                self.bytes += hot * costs.hot_bytes_per_page;
                self.elapsed_s += pace.seconds(hot, hot * costs.hot_bytes_per_page);
                since_look = 0.0;
            }
            let sent = (STEP_S / page_s).min(self.waiting);
            let clean = (1.0 - (self.waiting + self.unseen) / set).max(0.0);
            self.waiting -= sent;
            self.unseen += LEAN * dirtying.pages_per_s * clean * STEP_S;
            self.bytes += sent * costs.again_bytes_per_page;
            self.elapsed_s += STEP_S;
            since_look += STEP_S;
        }
    }
}

/// Pages dirtied after their turn in a walk over all memory that takes `seconds`.
fn behind_the_walk(dirtying: &Dirtying, seconds: f64) -> f64 {
    let set = dirtying.working_set;
    if set <= 0.0 {
        return 0.0;
    }
    let turns = dirtying.pages_per_s * seconds / set;
    if turns < 1e-6 {
        return 0.0;
    }
    set * (1.0 + (-turns).exp_m1() / turns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs {
            pages_total: 262_144.0,
            costs: Costs {
                zero_share: 0.5,
                content_share: 0.5,
                bytes_per_page: 800.0,
                again_bytes_per_page: 2_100.0,
                hot_bytes_per_page: 300.0,
                core_bytes_per_s: 300e6,
                ..Costs::default()
            },
            dirtying: Dirtying {
                hot: 200.0,
                pages_per_s: 1_000.0,
                working_set: 65_536.0,
            },
            rate_bytes_per_s: 11.5e6,
            rtt_s: 0.05,
            wire_per_byte: 1.08,
            cores: 2.0,
            load: 0.5,
            downtime_s: 0.3,
            learned: Learned::default(),
        }
    }

    fn middle(inputs: &Inputs) -> Middle {
        predict(inputs).middle
    }

    /// A slower link, more content, more writing or a longer way never make a move shorter.
    #[test]
    fn worse_is_never_faster() {
        for step in 1..30 {
            let worse = 1.0 + f64::from(step) / 10.0;
            let before = 1.0 + f64::from(step - 1) / 10.0;
            let check = |change: &dyn Fn(&mut Inputs, f64)| {
                let (mut less, mut more) = (inputs(), inputs());
                change(&mut less, before);
                change(&mut more, worse);
                let (less, more) = (middle(&less), middle(&more));
                // The rule of the session calls a longer link drained a little earlier.
                assert!(less.total_ms <= more.total_ms * 1.02, "{less:?} {more:?}");
            };
            check(&|inputs, by| inputs.rate_bytes_per_s /= by);
            check(&|inputs, by| inputs.costs.bytes_per_page *= by);
            check(&|inputs, by| inputs.rtt_s *= by);
            check(&|inputs, by| inputs.load = by);
            check(&|inputs, by| inputs.dirtying.pages_per_s *= by.min(2.5));
        }
    }

    /// Ranges hold their middle and are at most twice as high as low.
    #[test]
    fn ranges_are_at_most_twice_as_wide() {
        let seen = predict(&inputs());
        let check = |range: Range, middle: f64| {
            let (low, high) = (range.low as f64, range.high as f64);
            assert!(low <= middle && middle <= high, "{range:?} {middle}");
            assert!(high <= 2.0 * low, "{range:?}");
        };
        check(seen.total_ms, seen.middle.total_ms);
        check(seen.downtime_ms, seen.middle.downtime_ms);
        check(seen.wire_bytes, seen.middle.wire_bytes);
    }

    /// A guest at rest costs its content once, and stops for the fixed part and the round trips.
    #[test]
    fn a_guest_at_rest() {
        let mut quiet = inputs();
        quiet.dirtying = Dirtying::default();
        let seen = predict(&quiet);
        let bytes = 262_144.0 * 800.0;
        assert_eq!(seen.converges, Converges::Yes);
        assert!((seen.middle.wire_bytes / (bytes * 1.08) - 1.0).abs() < 0.01);
        assert!(
            (seen.middle.total_ms / (bytes / 11.5e6 * 1e3) - 1.0).abs() < 0.1,
            "{seen:?}"
        );
        assert!(
            (190.0..260.0).contains(&seen.middle.downtime_ms),
            "{seen:?}"
        );
    }

    /// A guest that writes faster than the link takes does not converge, and the budget that would do is
    /// named: with it, it does.
    #[test]
    fn a_guest_that_writes_too_fast() {
        let mut fast = inputs();
        fast.dirtying.pages_per_s = 20_000.0;
        let seen = predict(&fast);
        assert_eq!(seen.converges, Converges::No);
        assert!(seen.downtime_needed_ms > 400, "{seen:?}");
        fast.downtime_s = 1.5 * seen.downtime_needed_ms as f64 / 1e3;
        assert_eq!(predict(&fast).converges, Converges::Yes);
    }

    /// What was learned moves and narrows the ranges.
    #[test]
    fn learned_factors() {
        let mut again = inputs();
        again.learned = Learned {
            moves: 8,
            total: 1.5,
            downtime: 1.0,
            wire: 1.0,
            spread: 1.44,
        };
        let (plain, seen) = (predict(&inputs()), predict(&again));
        assert_eq!(plain.middle, seen.middle);
        let high = plain.middle.total_ms * 1.5 * 1.2;
        assert!((seen.total_ms.high as f64 - high).abs() < 2.0, "{seen:?}");
    }
}
