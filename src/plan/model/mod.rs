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
use transport::session::Policy;

use super::cost::Costs;
use super::dirtying::Dirtying;
use super::ending::{Ending, Foreseen, Sight, Stall, foresee};
use super::history::Learned;
use super::stop::{LAST_LOOK_S, Pace, Stops, slowed};
use crate::estimate::to_u64;

/// What the model is told.
#[derive(Debug, Clone)]
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
    /// What `send` will be asked for.
    pub(crate) policy: Policy,
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
    pub(crate) ends: Ending,
    /// How much the guest is slowed at the end.
    pub(crate) throttle_percent: u64,
    pub(crate) rounds: u32,
    /// The downtime that would do where the asked one may not.
    pub(crate) downtime_needed_ms: Option<u64>,
    pub(crate) middle: Middle,
}

/// From the start to the first page: hellos, QEMU's capabilities, its stream's head, the block list.
const SETUP_S: f64 = 0.35;
/// Round trips of it, and of finding the link's rate.
const SETUP_RTTS: f64 = 7.0;
/// How fast QEMU's first pass goes through memory, zero pages or not, with what was kept of it.
const PASS_PAGES_PER_S: f64 = 450_000.0;
/// From asking QEMU for its dirty pages to having them.
const SYNC_S: f64 = 0.15;
/// Longest time between two looks at what is dirty.
const RESYNC_MAX_S: f64 = 1.0;
/// Before a guest runs without all pages, hot ones are sent for at most so long.
const STOP_EARLY_S: f64 = 0.1;
/// Where the stop would be longer than asked, the session waits for a better moment and then throttles the
/// guest: it ends near what was asked.
const NEAR_ASKED: f64 = 0.9;
/// Where a guest dirties nearly as fast as the link takes it, a small error of either decides: the course
/// leans to the slow side.
const LEAN: f64 = 1.05;
/// Rounds in a row that do not shrink by a tenth.
const STUCK_ROUNDS: u32 = 3;
/// What waits has not become a tenth shorter for so long, and for this part of what it takes.
const STALL_MIN_S: f64 = 10.0;
const STALL_SHARE: f64 = 0.5;
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
        ends: walk.ends.ending,
        throttle_percent: to_u64(((1.0 - walk.ends.writing) * 100.0).round()),
        rounds: walk.rounds,
        downtime_needed_ms: (walk.converges != Converges::Yes)
            .then(|| to_u64((walk.needed_s * 1e3 * 1.2).ceil())),
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
    /// The stop that would do.
    needed_s: f64,
    lane_bytes: f64,
    rounds: u32,
    converges: Converges,
    ends: Foreseen,
}

fn walk(inputs: &Inputs) -> Walk {
    let costs = &inputs.costs;
    let pace = Pace::of(inputs);
    let dirtying = &inputs.dirtying;
    let first_bytes = inputs.pages_total * costs.bytes_per_page;
    let first_s = pace
        .seconds(inputs.pages_total * costs.content_share, first_bytes)
        .max(inputs.pages_total / PASS_PAGES_PER_S);
    let stops = Stops {
        inputs,
        pace: &pace,
    };
    let sight = |writing: f64| Sight {
        stop_s: stops.asked_s(writing),
        fits: stops.fits(writing),
    };
    let mut course = Course {
        waiting: behind_the_walk(dirtying, first_s),
        unseen: 0.0,
        elapsed_s: SETUP_S + SETUP_RTTS * inputs.rtt_s + first_s,
        bytes: first_bytes + dirtying.hot_in(first_s) * costs.hot_bytes_per_page,
        rounds: 1,
    };
    course.cut_at_limit(&inputs.policy);
    course.run(&stops, 1.0);
    let mut ends = foresee(&course.stall(&stops), &sight);
    course.go_on(inputs, ends.more_s, ends.writing);
    if ends.ending == Ending::Throttled {
        // What waited when it was slowed.
        course.run(&stops, ends.writing);
        if course.limit_reached(&inputs.policy) {
            ends.ending = foresee(&course.stall(&stops), &sight).ending;
        }
    }
    let last = LAST_LOOK_S * ends.writing;
    let last_bytes = dirtying.hot_in(last) * costs.hot_bytes_per_page
        + dirtying.broad_in(last) * costs.again_bytes_per_page;
    let waiting_bytes = (course.waiting + course.unseen) * costs.again_bytes_per_page;
    let (stop_s, least_s) = (stops.stop_s(ends.writing), stops.least_s());
    let downtime_s = inputs.policy.downtime.as_secs_f64();
    let (final_s, behind_s, more_bytes) = match ends.ending {
        Ending::Arrives | Ending::Throttled => (
            stop_s.min((NEAR_ASKED * downtime_s).max(least_s)),
            LAST_LOOK_S,
            last_bytes
                + if stops.drains(ends.writing) {
                    0.0
                } else {
                    waiting_bytes
                },
        ),
        Ending::Forced => (stop_s, LAST_LOOK_S, waiting_bytes + last_bytes),
        Ending::PostCopy => (
            least_s + stops.hot_s(last).min(STOP_EARLY_S),
            stops.broad_s(course.waiting + course.unseen) + stops.hot_s(last),
            waiting_bytes + last_bytes,
        ),
        Ending::Stays | Ending::Open => (0.0, 0.0, 0.0),
    };
    Walk {
        total_s: course.elapsed_s + behind_s + final_s,
        downtime_s: final_s,
        needed_s: stops.stop_s(1.0).max(stops.asked_s(1.0)),
        lane_bytes: course.bytes + more_bytes,
        rounds: course.rounds,
        converges: converges(&stops),
        ends,
    }
}

fn converges(stops: &Stops<'_>) -> Converges {
    let downtime_s = stops.inputs.policy.downtime.as_secs_f64().max(1e-3);
    let drains = match stops.drains(1.0) {
        true => 0.0,
        false => stops.writes_by_takes(1.0),
    };
    match (
        stops.asked_s(1.0).min(10.0 * downtime_s) / downtime_s,
        drains,
    ) {
        (near, by) if near > 1.25 && (by == 0.0 || by > 1.25) => Converges::No,
        (near, _) if near > 0.9 => Converges::Unsure,
        _ => Converges::Yes,
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
    /// Until what waits is drained and the stop fits, or it does not get on, or a limit is reached.
    fn run(&mut self, stops: &Stops<'_>, writing: f64) {
        let costs = &stops.inputs.costs;
        let dirtying = slowed(&stops.inputs.dirtying, writing);
        let (fits, drained_s) = (stops.fits(writing), stops.drained_s());
        let page_s = stops.broad_s(1.0);
        let set = dirtying.working_set.max(1e-9);
        let (mut since_look, mut stuck, mut least) = (0.0, 0, f64::INFINITY);
        let (mut left_least, mut since_shrank) = (f64::INFINITY, 0.0);
        for _ in 0..STEPS_MAX {
            if self.limit_reached(&stops.inputs.policy) {
                break;
            }
            let drain = self.waiting * page_s;
            let is_drained = drain <= drained_s;
            if is_drained && fits {
                break;
            }
            if self.waiting < 0.9 * left_least {
                (left_least, since_shrank) = (self.waiting, 0.0);
            }
            if since_shrank > STALL_MIN_S.max(STALL_SHARE * drain) {
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
                self.elapsed_s += stops.hot_s(since_look);
                since_look = 0.0;
            }
            let sent = (STEP_S / page_s).min(self.waiting);
            let clean = (1.0 - (self.waiting + self.unseen) / set).max(0.0);
            self.waiting -= sent;
            self.unseen += LEAN * dirtying.pages_per_s * clean * STEP_S;
            self.bytes += sent * costs.again_bytes_per_page;
            self.elapsed_s += STEP_S;
            since_look += STEP_S;
            since_shrank += STEP_S;
        }
    }

    fn limit_reached(&self, policy: &Policy) -> bool {
        let time_max = policy.time_max.map(|most| most.as_secs_f64());
        time_max.is_some_and(|most| self.elapsed_s >= most)
            || policy.rounds_max.is_some_and(|most| self.rounds >= most)
    }

    /// A limit of time in the first walk ends it there.
    fn cut_at_limit(&mut self, policy: &Policy) {
        if let Some(most) = policy.time_max.map(|most| most.as_secs_f64())
            && self.elapsed_s > most
        {
            self.bytes *= most / self.elapsed_s;
            self.elapsed_s = most;
        }
    }

    fn stall(&self, stops: &Stops<'_>) -> Stall {
        Stall {
            policy: stops.inputs.policy,
            elapsed_s: self.elapsed_s,
            rounds: self.rounds,
            floor_s: stops.floor_s(),
        }
    }

    /// What goes on the link in a stall: what the guest writes, as far as the link takes it.
    fn go_on(&mut self, inputs: &Inputs, seconds: f64, writing: f64) {
        let (costs, dirtying) = (&inputs.costs, &inputs.dirtying);
        let a_second = dirtying.hot_in(1.0) * costs.hot_bytes_per_page
            + dirtying.broad_in(writing) * costs.again_bytes_per_page;
        self.bytes += seconds * a_second.min(inputs.rate_bytes_per_s);
        self.elapsed_s += seconds;
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
mod tests;
