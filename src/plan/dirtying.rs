//! How fast a guest dirties its memory, and how much of it: from looks at a sample.
//!
//! Guests have some **hot** pages that change all the time, and a broad working set whose pages change now
//! and then. The number of changed pages grows at once to the hot ones, then with the broad rate; how many
//! groups of neighbours hold a change says how large the broad set is.

use super::sample::Look;
use crate::estimate::to_f64;

/// Hot pages have all changed after this.
const HOT_S: f64 = 0.2;

/// A guest's writing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Dirtying {
    /// Pages that change all the time.
    pub(crate) hot: f64,
    /// Other pages dirtied a second, counted again when they are clean again.
    pub(crate) pages_per_s: f64,
    /// Pages that take part in that, all about equally.
    pub(crate) working_set: f64,
}

impl Dirtying {
    /// From a rate alone, over a quarter of all memory.
    pub(crate) fn of_rate(bytes_per_s: Option<f64>, memory_bytes: u64) -> Dirtying {
        Dirtying {
            hot: 0.0,
            pages_per_s: bytes_per_s.unwrap_or(0.0) / 4096.0,
            working_set: to_f64(memory_bytes) / 4096.0 / 4.0,
        }
    }

    /// Hot pages that change in `seconds`.
    pub(crate) fn hot_in(&self, seconds: f64) -> f64 {
        self.hot * (seconds / HOT_S).min(1.0)
    }

    /// Different other pages that change in `seconds`.
    pub(crate) fn broad_in(&self, seconds: f64) -> f64 {
        if self.working_set <= 0.0 {
            return 0.0;
        }
        self.working_set * -(-seconds * self.pages_per_s / self.working_set).exp_m1()
    }
}

/// What looks at a sample of `sampled` pages in groups of `group_pages` say of `total` pages.
pub(crate) fn fit(looks: &[Look], sampled: f64, total: f64, group_pages: f64) -> Dirtying {
    let (Some(first), Some(last)) = (looks.first(), looks.last()) else {
        return Dirtying::default();
    };
    if last.changed_pages == 0 || sampled <= 0.0 {
        return Dirtying::default();
    }
    let scale = (total / sampled).max(1.0);
    let (t1, t2) = (first.after.as_secs_f64(), last.after.as_secs_f64());
    let (d1, d2) = (
        to_f64(first.changed_pages) * scale,
        to_f64(last.changed_pages) * scale,
    );
    let slope = if t2 > t1 {
        ((d2 - d1) / (t2 - t1)).max(0.0)
    } else {
        d2 / t2.max(1e-3)
    };
    let hot = (d1 - slope * t1).max(0.0);
    let broad = (d2 - hot).max(0.0);
    let by_place = extent(
        to_f64(last.changed_pages),
        to_f64(last.changed_groups),
        group_pages,
    );
    let working_set = (by_place * scale).min(total).max(broad);
    // So many writes give the last count.
    let fill = if working_set > 0.0 {
        (broad / working_set).min(0.98)
    } else {
        0.0
    };
    Dirtying {
        hot,
        pages_per_s: -(-fill).ln_1p() * working_set / t2.max(1e-3),
        working_set,
    }
}

/// Sampled pages of groups that take part, where `changed` pages fell into `groups` different ones.
fn extent(changed: f64, groups: f64, group_pages: f64) -> f64 {
    // Below some changes a group, most groups that take part have not been seen yet.
    if groups <= 0.0 || changed < 1.2 * groups {
        return f64::INFINITY;
    }
    let seen = |active: f64| active * -(-changed / active).exp_m1();
    let (mut low, mut high) = (groups, groups * 100.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if seen(middle) < groups {
            low = middle;
        } else {
            high = middle;
        }
    }
    low * group_pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// What looks at a sixteenth of 262144 pages find of a guest with hot pages that writes `per_s` over
    /// `set` pages.
    fn looks(hot: f64, per_s: f64, set: f64) -> Vec<Look> {
        let truth = Dirtying {
            hot,
            pages_per_s: per_s,
            working_set: set,
        };
        let active = set / 16.0 / 32.0;
        let look = |ms: u32| {
            let broad = truth.broad_in(f64::from(ms) / 1e3) / 16.0;
            let round = |value: f64| format!("{value:.0}").parse().unwrap();
            Look {
                after: Duration::from_millis(u64::from(ms)),
                changed_pages: round(broad + hot / 16.0),
                changed_groups: round(active * -(-broad / active.max(1.0)).exp_m1() + hot / 64.0),
            }
        };
        vec![look(400), look(2000)]
    }

    /// The rate is found within a seventh, the working set within a half, hot pages roughly.
    #[test]
    fn known_guests() {
        let check = |hot: f64, per_s: f64, set: f64| {
            let found = fit(&looks(hot, per_s, set), 16_384.0, 262_144.0, 32.0);
            let off = (found.pages_per_s / per_s - 1.0).abs();
            assert!(off < 0.15, "{per_s} {set}: {found:?}");
            let off = (found.working_set / set - 1.0).abs();
            assert!(off < 0.5, "{per_s} {set}: {found:?}");
            assert!(
                (found.hot - hot).abs() < 400.0 + hot / 3.0,
                "{hot}: {found:?}"
            );
        };
        check(0.0, 2_000.0, 65_536.0);
        check(500.0, 2_000.0, 65_536.0);
        check(800.0, 5_000.0, 65_536.0);
        check(300.0, 8_000.0, 65_536.0);
    }

    /// A small set that is written all the time is hot.
    #[test]
    fn a_small_set_is_hot() {
        let found = fit(&looks(0.0, 50_000.0, 4_096.0), 16_384.0, 262_144.0, 32.0);
        assert!((found.hot / 4_096.0 - 1.0).abs() < 0.1, "{found:?}");
        assert!(found.pages_per_s < 500.0, "{found:?}");
    }

    /// A guest that rests dirties nothing.
    #[test]
    fn a_guest_at_rest() {
        let found = fit(&looks(0.0, 0.0, 100.0), 16_384.0, 262_144.0, 32.0);
        assert_eq!(found, Dirtying::default());
        assert_eq!(fit(&[], 1.0, 1.0, 32.0).broad_in(5.0), 0.0);
    }
}
