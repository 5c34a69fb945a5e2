//! Figures of a run out of what was observed; no clock and no I/O.

use crate::guest::Counters;
use crate::probe::CounterLog;
use crate::report::Trace;

/// Shortest span of counter lines that gives a rate.
const SPAN_MIN_US: u64 = 500_000;

/// Milliseconds between two stamps; `None` if the second is before the first.
pub(super) fn between_ms(from_us: u64, to_us: u64) -> Option<f64> {
    let passed = to_us.checked_sub(from_us)?;
    // Exact up to 285 years.
    Some(u32::try_from(passed / 1000).map_or(f64::INFINITY, f64::from) + part_ms(passed))
}

fn part_ms(passed_us: u64) -> f64 {
    f64::from(u32::try_from(passed_us % 1000).unwrap_or(0)) / 1000.0
}

/// Writes a second among the lines of a span; `None` if the guest was not asked to write or the
/// span is too short.
pub(super) fn write_rate(samples: &[Counters], from_us: u64, to_us: u64) -> Option<f64> {
    let mut inside = samples
        .iter()
        .filter(|sample| sample.at_us >= from_us && sample.at_us <= to_us);
    let first = inside.next()?;
    let last = inside.next_back()?;
    if last.at_us - first.at_us < SPAN_MIN_US {
        return None;
    }
    let writes = u32::try_from(last.writes.checked_sub(first.writes)?).ok()?;
    let rate = f64::from(writes) / (between_ms(first.at_us, last.at_us)? / 1000.0);
    (rate > 0.0).then_some(rate)
}

/// The guest's write rate during the move, up to STOP, over that before.
pub(super) fn writes_share(
    samples: &[Counters],
    observed_from_us: u64,
    started_us: u64,
    stopped_us: u64,
) -> Option<f64> {
    let before = write_rate(samples, observed_from_us, started_us)?;
    let during = write_rate(samples, started_us, stopped_us)?;
    Some(during / before)
}

/// The guest's write rate after its RESUME, while its last pages are on their way, over that before
/// the move; as its user read it. A guest that waits for pages says nothing, so time counts to the
/// span's end whether it spoke or not.
pub(super) fn writes_share_after(
    read: &CounterLog,
    before: (u64, u64),
    resumed_us: u64,
    completed_us: u64,
) -> Option<f64> {
    let samples: Vec<Counters> = read
        .samples
        .iter()
        .map(|sample| Counters {
            at_us: sample.at_us,
            writes: sample.writes,
            ..Counters::default()
        })
        .collect();
    let at = |time_us: u64| {
        let after = samples.partition_point(|sample| sample.at_us <= time_us);
        samples.get(after.checked_sub(1)?).map(|last| last.writes)
    };
    if completed_us < resumed_us + SPAN_MIN_US {
        return None;
    }
    let writes = u32::try_from(at(completed_us)?.checked_sub(at(resumed_us)?)?).ok()?;
    let seconds = between_ms(resumed_us, completed_us)? / 1000.0;
    let before = write_rate(&samples, before.0, before.1)?;
    Some(f64::from(writes) / seconds / before)
}

/// Bytes that each of two migrations, which began at the same time, had moved when one of them
/// ended: as applied at the target, where a trace has that; `None` where a trace says nothing of its rate.
pub(super) fn moved_together(one: &Trace, other: &Trace) -> Option<[f64; 2]> {
    let end_ms = |trace: &Trace| trace.points.last().map(|point| point.t_ms);
    let until_ms = end_ms(one)?.min(end_ms(other)?);
    let moved = |trace: &Trace| -> f64 {
        let spans = trace.points.windows(2);
        let bits = spans.filter_map(|pair| {
            let ms = pair[1].t_ms.min(until_ms) - pair[0].t_ms;
            let rate_bps = pair[1].goodput_bps.or(pair[1].rate_bps)?;
            Some(rate_bps * ms.max(0.0) / 1000.0)
        });
        bits.sum::<f64>() / 8.0
    };
    let bytes = [moved(one), moved(other)];
    (bytes[0] + bytes[1] > 0.0).then_some(bytes)
}

/// Jain's index: 1 where all have the same, one over their number where one has all.
pub(super) fn jain(parts: [f64; 2]) -> Option<f64> {
    let sum: f64 = parts.iter().sum();
    let squares: f64 = parts.iter().map(|part| part * part).sum();
    (squares > 0.0).then(|| sum * sum / (2.0 * squares))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Sample;
    use crate::report::Point;

    fn sample(at_ms: u64, writes: u64) -> Counters {
        Counters {
            at_us: at_ms * 1000,
            writes,
            ..Counters::default()
        }
    }

    /// 100 writes a second before; two seconds of silence after RESUME, then 100 a second again.
    #[test]
    fn share_after() {
        let at = |at_ms: u64, writes: u64| Sample {
            at_us: at_ms * 1000,
            writes,
            ..Sample::default()
        };
        let samples = vec![
            at(0, 0),
            at(1000, 100),
            at(2000, 200),
            at(5000, 201),
            at(7000, 401),
        ];
        let log = CounterLog { samples };
        let share = |to_us: u64| writes_share_after(&log, (0, 2_000_000), 3_000_000, to_us);
        assert_eq!(share(5_000_000), Some(0.005));
        assert_eq!(share(7_000_000), Some(0.5025));
        assert_eq!(share(3_100_000), None, "too short to say");
    }

    /// A steady 80 Mbit/s for two seconds beside 40 Mbit/s for four: what counts is the first two.
    #[test]
    fn two_at_once() {
        let trace = |rate_bps: f64, tenths: u32| Trace {
            points: (0..=tenths)
                .map(|tenth| Point {
                    t_ms: f64::from(tenth) * 100.0,
                    rate_bps: Some(rate_bps),
                    ..Point::default()
                })
                .collect(),
            events: Vec::new(),
        };
        let bytes = moved_together(&trace(80e6, 20), &trace(40e6, 40)).unwrap();
        assert!(
            (bytes[0] - 20e6).abs() < 1.0 && (bytes[1] - 10e6).abs() < 1.0,
            "{bytes:?}"
        );
        assert_eq!(jain(bytes).map(|index| (index * 100.0).round()), Some(90.0));
        assert_eq!(jain([7.0, 7.0]), Some(1.0));
        assert_eq!(moved_together(&Trace::default(), &trace(1.0, 2)), None);
    }

    #[test]
    fn milliseconds() {
        assert_eq!(between_ms(1_000_000, 2_500_250), Some(1500.25));
        assert_eq!(between_ms(2, 1), None);
    }

    /// 100 writes a second before, 90 during.
    #[test]
    fn share() {
        let samples = [
            sample(0, 0),
            sample(1000, 100),
            sample(2000, 190),
            sample(3000, 280),
        ];
        let share = writes_share(&samples, 0, 1_000_000, 3_000_000).expect("both spans are long");
        assert!((share - 0.9).abs() < 1e-9, "{share}");
        assert_eq!(
            writes_share(&samples, 0, 0, 3_000_000),
            None,
            "nothing was seen before"
        );
        let idle = [sample(0, 0), sample(1000, 0), sample(2000, 0)];
        assert_eq!(
            writes_share(&idle, 0, 1_000_000, 2_000_000),
            None,
            "an idle guest has no share"
        );
    }
}
