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
use super::to_u64;

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
const SETUP_S: f64 = 0.5;
/// Round trips of it.
const SETUP_RTTS: f64 = 5.0;
/// How fast QEMU's first pass goes through memory, zero pages or not.
const PASS_PAGES_PER_S: f64 = 250_000.0;
/// Part of all cores that encoding may take.
const CORES_SHARE: f64 = 0.75;
/// From asking QEMU for its dirty pages to having them.
const SYNC_S: f64 = 0.15;
/// From the last look to the guest's stop: QEMU's window, and what the look itself takes.
const LAST_LOOK_S: f64 = 0.25;
/// Part of a stop that does not depend on pages: device state, its load, journals, `cont`.
const STOP_FIXED_S: f64 = 0.11;
const STOP_RTTS: f64 = 1.5;
/// What the rule of the session takes for that part.
const POLICY_FIXED_S: f64 = 0.1;
/// Rounds in a row that do not shrink by a tenth.
const STUCK_ROUNDS: u32 = 3;
const ROUNDS_MAX: u32 = 200;
/// Bytes beside pages: hellos, block list, device state, progress.
const EXTRA_BYTES: f64 = 150_000.0;
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

fn walk(inputs: &Inputs) -> Walk {
    let costs = &inputs.costs;
    let rate = inputs.rate_bytes_per_s.max(1.0);
    let encoder = inputs.cores * CORES_SHARE * costs.core_bytes_per_s.max(1e6) / 4096.0;
    let content = inputs.pages_total * costs.content_share;
    let first_bytes = inputs.pages_total * costs.bytes_per_page;
    let first_s = (first_bytes / rate)
        .max(content / encoder)
        .max(inputs.pages_total / PASS_PAGES_PER_S);
    let again_s = (costs.again_bytes_per_page / rate).max(1.0 / encoder);
    let dirtying = &inputs.dirtying;
    let stop_s =
        |fixed: f64| dirtying.distinct(LAST_LOOK_S) * again_s + STOP_RTTS * inputs.rtt_s + fixed;

    let mut elapsed_s = SETUP_S + SETUP_RTTS * inputs.rtt_s + first_s;
    let mut bytes = first_bytes;
    let mut dirty = behind_the_walk(dirtying, first_s);
    let (mut rounds, mut stuck, mut least) = (1, 0, f64::INFINITY);
    let drained_s = 0.1 + inputs.rtt_s;
    let fits = stop_s(POLICY_FIXED_S) <= inputs.downtime_s;
    while rounds < ROUNDS_MAX {
        let round_s = dirty * again_s;
        rounds += 1;
        elapsed_s += SYNC_S + round_s;
        bytes += dirty * costs.again_bytes_per_page;
        if round_s <= drained_s && fits {
            break;
        }
        stuck = if dirty < 0.9 * least { 0 } else { stuck + 1 };
        least = least.min(dirty);
        if stuck >= STUCK_ROUNDS {
            break;
        }
        dirty = next_round(dirtying, dirty, round_s + SYNC_S);
    }
    let left_s = if fits {
        stop_s(STOP_FIXED_S)
    } else {
        stop_s(STOP_FIXED_S).max(dirty * again_s)
    };
    let final_pages = if fits {
        dirtying.distinct(LAST_LOOK_S)
    } else {
        dirty
    };
    let near = stop_s(POLICY_FIXED_S) / inputs.downtime_s.max(1e-3);
    Walk {
        total_s: elapsed_s + LAST_LOOK_S + left_s,
        downtime_s: left_s,
        needed_s: left_s,
        lane_bytes: bytes + final_pages * costs.again_bytes_per_page,
        rounds,
        converges: match near {
            near if near > 1.3 => Converges::No,
            near if near > 0.75 => Converges::Unsure,
            _ => Converges::Yes,
        },
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

/// Pages that wait at the end of a round of `seconds` in which `sent` were sent.
fn next_round(dirtying: &Dirtying, sent: f64, seconds: f64) -> f64 {
    let set = dirtying.working_set;
    if set <= 0.0 {
        return 0.0;
    }
    let part = Dirtying {
        pages_per_s: dirtying.pages_per_s * (sent / set).min(1.0),
        working_set: sent.min(set),
    };
    let rest = Dirtying {
        pages_per_s: dirtying.pages_per_s - part.pages_per_s,
        working_set: (set - sent).max(0.0),
    };
    behind_the_walk(&part, seconds) + rest.distinct(seconds)
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
                core_bytes_per_s: 300e6,
                ..Costs::default()
            },
            dirtying: Dirtying {
                pages_per_s: 1_000.0,
                working_set: 65_536.0,
            },
            rate_bytes_per_s: 11.5e6,
            rtt_s: 0.05,
            wire_per_byte: 1.08,
            cores: 2.0,
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
                assert!(less.total_ms <= more.total_ms * 1.001, "{less:?} {more:?}");
            };
            check(&|inputs, by| inputs.rate_bytes_per_s /= by);
            check(&|inputs, by| inputs.costs.bytes_per_page *= by);
            check(&|inputs, by| inputs.rtt_s *= by);
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
        quiet.dirtying = Dirtying {
            pages_per_s: 0.0,
            working_set: 0.0,
        };
        let seen = predict(&quiet);
        let bytes = 262_144.0 * 800.0;
        assert_eq!(seen.converges, Converges::Yes);
        assert!((seen.middle.wire_bytes / (bytes * 1.08) - 1.0).abs() < 0.01);
        assert!(
            (seen.middle.total_ms / (bytes / 11.5e6 * 1e3) - 1.0).abs() < 0.1,
            "{seen:?}"
        );
        assert!(
            (180.0..200.0).contains(&seen.middle.downtime_ms),
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
        assert!(seen.downtime_ms.low > 300, "{seen:?}");
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
