//! How fast a guest dirties its memory, and how much of it: from looks at a sample.
//!
//! With `writes` random writes a second over a working set of `W` pages, `W (1 - exp(-t writes / W))`
//! different pages have changed after `t`. Two looks give both; where the guest writes so slowly that
//! they do not, the number of groups in which anything changed bounds the working set.

use super::sample::Look;
use super::to_f64;

/// A guest's writing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Dirtying {
    /// Pages dirtied a second, counted again when they are clean again.
    pub(crate) pages_per_s: f64,
    /// Pages that take part, all about equally.
    pub(crate) working_set: f64,
}

impl Dirtying {
    /// From a rate alone, over a quarter of all memory.
    pub(crate) fn of_rate(bytes_per_s: Option<f64>, memory_bytes: u64) -> Dirtying {
        Dirtying {
            pages_per_s: bytes_per_s.unwrap_or(0.0) / 4096.0,
            working_set: to_f64(memory_bytes) / 4096.0 / 4.0,
        }
    }

    /// Different pages that change in `seconds`.
    pub(crate) fn distinct(&self, seconds: f64) -> f64 {
        if self.working_set <= 0.0 {
            return 0.0;
        }
        self.working_set * -(-seconds * self.pages_per_s / self.working_set).exp_m1()
    }
}

/// What a sample of `sampled` pages in groups of `group_pages` says of `total` pages.
pub(crate) fn fit(looks: &[Look], sampled: f64, total: f64, group_pages: f64) -> Dirtying {
    let nothing = Dirtying {
        pages_per_s: 0.0,
        working_set: 0.0,
    };
    let (Some(first), Some(last)) = (looks.first(), looks.last()) else {
        return nothing;
    };
    if last.changed_pages == 0 || sampled <= 0.0 {
        return nothing;
    }
    let scale = (total / sampled).max(1.0);
    let (t1, t2) = (first.after.as_secs_f64(), last.after.as_secs_f64());
    let (d1, d2) = (
        to_f64(first.changed_pages) * scale,
        to_f64(last.changed_pages) * scale,
    );
    let by_place = extent(
        to_f64(last.changed_pages),
        to_f64(last.changed_groups),
        group_pages,
    ) * scale;
    let by_time = if d1 > 0.0 && t1 > 0.0 && t2 > t1 {
        saturation(t2 / t1, d2 / d1)
    } else {
        None
    };
    let bound = by_place.min(total).max(d2);
    if let Some(x) = by_time {
        let working_set = d1 / -(-x).exp_m1();
        if working_set <= bound.max(1.1 * d2) {
            return Dirtying {
                pages_per_s: x * working_set / t1,
                working_set,
            };
        }
    }
    // So many writes give the last look's count.
    let fill = (d2 / bound).min(0.98);
    Dirtying {
        pages_per_s: -(-fill).ln_1p() * bound / t2.max(1e-3),
        working_set: bound,
    }
}

/// `x = t1 writes / W` for which the second count is `q` times the first, at `k` times the time; `None`
/// when the counts say nothing of it: they grow as time does, within their own noise.
fn saturation(k: f64, q: f64) -> Option<f64> {
    if q >= 0.9 * k {
        return None;
    }
    let grown = |x: f64| (-k * x).exp_m1() / (-x).exp_m1();
    let (mut low, mut high) = (1e-3, 20.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if grown(middle) > q {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(low)
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

    /// What looks at a sixteenth of 262144 pages find of a guest that writes `per_s` over `set` pages.
    fn looks(per_s: f64, set: f64) -> Vec<Look> {
        let truth = Dirtying {
            pages_per_s: per_s,
            working_set: set,
        };
        let active = set / 16.0 / 32.0;
        let look = |ms: u32| {
            let changed = truth.distinct(f64::from(ms) / 1e3) / 16.0;
            let round = |value: f64| format!("{value:.0}").parse().unwrap();
            Look {
                after: Duration::from_millis(u64::from(ms)),
                changed_pages: round(changed),
                changed_groups: round(active * -(-changed / active).exp_m1()),
            }
        };
        vec![look(500), look(2000)]
    }

    /// The rate is found within a tenth; a working set within a third, when it is seen at all.
    #[test]
    fn known_guests() {
        let check = |per_s: f64, set: f64, off_max: f64| {
            let found = fit(&looks(per_s, set), 16_384.0, 262_144.0, 32.0);
            let off = (found.pages_per_s / per_s - 1.0).abs();
            assert!(off < off_max, "{per_s} {set}: {found:?}");
            let off = (found.working_set / set - 1.0).abs();
            assert!(off < 0.34, "{per_s} {set}: {found:?}");
        };
        check(2_000.0, 65_536.0, 0.1);
        check(5_000.0, 65_536.0, 0.1);
        check(20_000.0, 65_536.0, 0.1);
        check(5_000.0, 4_096.0, 0.1);
        // All of it has changed by the last look: the rate matters little then.
        check(50_000.0, 8_192.0, 0.3);
        check(8_000.0, 32_768.0, 0.1);
    }

    /// A guest that rests dirties nothing.
    #[test]
    fn a_guest_at_rest() {
        assert_eq!(
            fit(&looks(0.0, 100.0), 16_384.0, 262_144.0, 32.0).pages_per_s,
            0.0
        );
        assert_eq!(fit(&[], 1.0, 1.0, 32.0).distinct(5.0), 0.0);
    }
}
