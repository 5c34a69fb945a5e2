//! How hard to compress: as hard as the processor can while the link stays busy.
//!
//! Up to the point where encoding takes as long as sending, a higher level only saves time; beyond
//! it costs time. What a level costs is known by ratio from a table and scaled by what was measured
//! at the present level, so that slow hosts and odd guests are met as they are.

/// Levels in use, with the speed of one core (bytes of pages per microsecond) and how much pages
/// shrink. From 103 MB of pages of an idle Debian guest in frames of 64 pages; only the ratios
/// between rows count.
const LEVELS: [Level; 7] = [
    Level::new(-5, 1292.0, 2.00, SHARE_MAX),
    Level::new(-1, 1034.0, 2.30, SHARE_MAX),
    Level::new(1, 861.0, 2.51, SHARE_MAX),
    Level::new(3, 574.0, 2.59, SHARE_MAX),
    Level::new(6, 188.0, 2.62, SHARE_MAX),
    Level::new(9, 110.0, 2.66, SHARE_MAX),
    // For half a per cent: only where it costs next to nothing.
    Level::new(12, 31.0, 2.67, 0.25),
];

/// Pages that shrink less than this are not worth any effort.
const RATIO_MIN: f64 = 1.1;
/// Part of all cores that encoding may take; the rest is for the guest and the network: half a core
/// of two.
const SHARE_MAX: f64 = 0.75;
/// A level above the present one must be faster than the link by this factor, so that the choice
/// does not swing between two levels.
const MARGIN_UP: f64 = 1.25;

/// One row of the table.
#[derive(Debug, Clone, Copy)]
struct Level {
    level: i32,
    speed: f64,
    ratio: f64,
    /// Part of all cores that it is worth.
    share: f64,
}

impl Level {
    const fn new(level: i32, speed: f64, ratio: f64, share: f64) -> Self {
        Self {
            level,
            speed,
            ratio,
            share,
        }
    }
}

/// What is known when the level is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LevelObservation {
    /// Level of the last batches.
    pub level: i32,
    /// What the link takes, in bytes per second.
    pub link_bytes_per_s: f64,
    /// Bytes of pages that one core encodes per second at this level; 0 when not measured.
    pub core_bytes_per_s: f64,
    /// Bytes of pages by bytes on the wire at this level; 0 when not measured.
    pub ratio: f64,
    /// Cores of the host.
    pub cores: f64,
    /// Cores that the guest and others use.
    pub busy_cores: f64,
}

/// The highest level at which encoding keeps up with the link on the cores that are to spare; the
/// lowest one when none does, or when pages do not shrink.
pub fn choose_level(seen: &LevelObservation) -> i32 {
    let [lowest, ..] = LEVELS;
    if seen.ratio > 0.0 && seen.ratio < RATIO_MIN {
        return lowest.level;
    }
    let present = row(seen.level);
    let speed_scale = scale(seen.core_bytes_per_s / 1e6, present.speed);
    let ratio_scale = scale(seen.ratio, present.ratio);
    let keeps_up = |row: &&Level| {
        let margin = if row.level > present.level {
            MARGIN_UP
        } else {
            1.0
        };
        let cores = seen.cores * row.share - seen.busy_cores;
        let pages_per_s = row.speed * 1e6 * speed_scale * cores;
        pages_per_s >= seen.link_bytes_per_s * row.ratio * ratio_scale * margin
    };
    let found = LEVELS.iter().rev().find(keeps_up);
    found.map_or(lowest.level, |row| row.level)
}

/// The next level on the way from the present one to the chosen one: down at once, up row by row,
/// since a link whose rate is still being found looks slower than it is.
pub fn approach_level(present: i32, chosen: i32) -> i32 {
    let next = LEVELS.iter().find(|row| row.level > present);
    next.map_or(chosen, |row| chosen.min(row.level))
}

/// The row of a level, or of the next one below.
fn row(level: i32) -> Level {
    let [lowest, ..] = LEVELS;
    let found = LEVELS.iter().rev().find(|row| row.level <= level);
    *found.unwrap_or(&lowest)
}

/// How a measured value compares with the table; 1 when there is none.
fn scale(measured: f64, table: f64) -> f64 {
    if measured > 0.0 {
        measured / table
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MBIT: f64 = 1e6 / 8.0;

    /// Two idle cores, nothing measured, on a link.
    fn on(mbit_per_s: f64) -> LevelObservation {
        LevelObservation {
            level: 3,
            link_bytes_per_s: mbit_per_s * MBIT,
            core_bytes_per_s: 0.0,
            ratio: 0.0,
            cores: 2.0,
            busy_cores: 0.0,
        }
    }

    /// The choice, as a table.
    #[test]
    fn level_follows_the_bottleneck() {
        let check = |name: &str, seen: LevelObservation, expected: i32| {
            assert_eq!(choose_level(&seen), expected, "{name}: {seen:?}");
        };
        check("20 Mbit/s", on(20.0), 12);
        check("100 Mbit/s", on(100.0), 9);
        check("200 Mbit/s", on(200.0), 9);
        check("500 Mbit/s", on(500.0), 6);
        check("1 Gbit/s", on(1000.0), 3);
        check("3 Gbit/s", on(3000.0), 1);
        check("5 Gbit/s", on(5000.0), -1);
        check("40 Gbit/s", on(40_000.0), -5);

        let busy = |busy_cores, mbit| LevelObservation {
            busy_cores,
            ..on(mbit)
        };
        check("a busy guest comes first", busy(1.0, 100.0), 9);
        check("a guest that takes all", busy(2.0, 100.0), -5);

        let measured = |level, core_mb: f64, ratio, mbit| LevelObservation {
            level,
            core_bytes_per_s: core_mb * 1e6,
            ratio,
            ..on(mbit)
        };
        check("a slow host", measured(3, 100.0, 2.5, 100.0), 6);
        check("a slower one", measured(3, 40.0, 2.5, 100.0), 3);
        check(
            "the same, once it works harder",
            measured(6, 33.0, 2.5, 100.0),
            6,
        );
        check("pages that shrink a lot", measured(3, 900.0, 8.0, 100.0), 9);
        check("noise", measured(3, 900.0, 1.05, 100.0), -5);
        check("an unknown level", measured(22, 31.0, 2.67, 20.0), 12);
    }

    /// Down at once, up row by row, and never beyond what was chosen.
    #[test]
    fn levels_are_approached() {
        for (present, chosen, expected) in
            [(3, 12, 6), (6, 9, 9), (9, -5, -5), (3, 3, 3), (19, 12, 12)]
        {
            assert_eq!(
                approach_level(present, chosen),
                expected,
                "{present} to {chosen}"
            );
        }
    }

    /// At the border between two levels the choice stays where it is.
    #[test]
    fn choice_does_not_swing() {
        for mbit in (20..3000).step_by(10) {
            let seen = on(f64::from(mbit));
            let level = choose_level(&seen);
            for step in 0..3 {
                let again = choose_level(&LevelObservation { level, ..seen });
                assert_eq!(again, level, "{mbit} Mbit/s, step {step}");
            }
        }
    }

    /// A slower link or more cores never mean less compression.
    #[test]
    fn choice_is_monotonic() {
        for mbit in (20..5000).step_by(20) {
            let mbit = f64::from(mbit);
            assert!(choose_level(&on(mbit)) >= choose_level(&on(mbit + 20.0)));
            let more = LevelObservation {
                cores: 4.0,
                ..on(mbit)
            };
            assert!(choose_level(&more) >= choose_level(&on(mbit)));
        }
    }
}
