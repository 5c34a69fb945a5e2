//! Runs of the same arm together: medians, spread, and ratios between arms.

use std::collections::BTreeMap;

use super::{MigrationRun, Outcome, WRITES_SHARE_MIN};

/// The arm that others are compared with where a scenario has it.
pub const REFERENCE: &str = "qemu-multifd-zstd";
/// The arm in which the guest stays.
pub const NONE: &str = "none";
/// The arm that is compared.
pub const OURS: &str = "scaleaway";

/// Median of a figure over an arm's runs, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one; with two in the middle, their mean.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// That of values in any order; `None` of none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Some(Self { median, min, max })
    }
}

/// Pages and bytes of one encoding, by the product's own report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Encoded {
    /// Pages.
    pub pages: f64,
    /// Their bytes in batches.
    pub bytes: f64,
}

/// All runs of one arm.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Its name.
    pub arm: String,
    /// How many runs there are.
    pub runs: usize,
    /// In how many of them the guest arrived. All figures are those of these.
    pub arrived: usize,
    /// Milliseconds.
    pub total_ms: Option<Spread>,
    /// Milliseconds.
    pub downtime_ms: Option<Spread>,
    /// Bytes.
    pub wire_bytes: Option<Spread>,
    /// Milliseconds.
    pub outage_ms: Option<Spread>,
    /// The guest was slowed in at least one of them.
    pub slowed: bool,
    /// A run that found a wrong page in the guest, or whose counter fell.
    pub wrong: bool,
    /// Means, by encoding; empty for QEMU's arms.
    pub encoded: BTreeMap<String, Encoded>,
}

/// Takes one figure out of a summary.
pub type FigureOf = fn(&Summary) -> Option<Spread>;

impl Summary {
    /// A figure of this arm over that of another, by medians.
    pub fn ratio(&self, other: &Self, figure: FigureOf) -> Option<f64> {
        let (ours, theirs) = (figure(self)?.median, figure(other)?.median);
        (theirs > 0.0).then(|| ours / theirs)
    }
}

/// The product, then the product without a stage, then others, each in the order in which they ran.
pub fn summaries(runs: &[MigrationRun]) -> Vec<Summary> {
    let mut arms: Vec<&str> = Vec::new();
    for run in runs {
        if !arms.contains(&run.arm.as_str()) {
            arms.push(&run.arm);
        }
    }
    // Stable: it keeps the order of those that are alike.
    arms.sort_by_key(|arm| (!arm.starts_with(OURS), *arm != OURS));
    arms.into_iter().map(|arm| summary(arm, runs)).collect()
}

fn summary(arm: &str, runs: &[MigrationRun]) -> Summary {
    let all: Vec<&MigrationRun> = runs.iter().filter(|run| run.arm == arm).collect();
    let arrived: Vec<&MigrationRun> = all
        .iter()
        .copied()
        .filter(|run| matches!(run.outcome, Outcome::Arrived | Outcome::Forced))
        .collect();
    let spread = |figure: fn(&MigrationRun) -> Option<f64>| {
        Spread::of(arrived.iter().filter_map(|run| figure(run)))
    };
    Summary {
        arm: arm.to_owned(),
        runs: all.len(),
        arrived: arrived.len(),
        total_ms: spread(|run| run.total_ms),
        downtime_ms: spread(|run| run.downtime_ms),
        wire_bytes: spread(|run| run.wire_bytes.map(exact)),
        outage_ms: spread(|run| run.ping_outage_ms),
        slowed: arrived.iter().any(|run| is_slowed(run)),
        wrong: arrived.iter().any(|run| is_wrong(run)),
        encoded: encoded(&arrived),
    }
}

/// Whether the guest wrote so much less than before that the arm had it easier.
pub(super) fn is_slowed(run: &MigrationRun) -> bool {
    run.guest_writes_share
        .is_some_and(|share| share < WRITES_SHARE_MIN)
}

fn is_wrong(run: &MigrationRun) -> bool {
    run.self_check_errors.unwrap_or(0) > 0 || run.counter_resets.unwrap_or(0) > 0
}

fn encoded(runs: &[&MigrationRun]) -> BTreeMap<String, Encoded> {
    let mut sums = BTreeMap::<String, Encoded>::new();
    let mut reports = 0.0;
    for run in runs {
        let report = run.report.as_ref();
        let Some(encodings) = report.and_then(|report| report["bytes_by_encoding"].as_object())
        else {
            continue;
        };
        reports += 1.0;
        for (name, part) in encodings {
            let sum = sums.entry(name.clone()).or_default();
            sum.pages += part["pages"].as_f64().unwrap_or(0.0);
            sum.bytes += part["bytes"].as_f64().unwrap_or(0.0);
        }
    }
    for sum in sums.values_mut() {
        sum.pages /= reports;
        sum.bytes /= reports;
    }
    sums
}

/// Bytes as a number to calculate with; exact up to 2^53.
pub(super) fn exact(bytes: u64) -> f64 {
    bytes as f64
}

/// How the product compares with every other arm, a line each; empty where it did not arrive.
pub fn comparison(runs: &[MigrationRun]) -> String {
    let all = summaries(runs);
    let Some(ours) = all.iter().find(|summary| summary.arm == OURS) else {
        return String::new();
    };
    let mut text = String::new();
    for other in all.iter().filter(|summary| summary.arm != OURS) {
        let figures: [(&str, FigureOf); 3] = [
            ("wire bytes", |summary| summary.wire_bytes),
            ("total time", |summary| summary.total_ms),
            ("downtime", |summary| summary.downtime_ms),
        ];
        let parts: Vec<String> = figures
            .iter()
            .filter_map(|(name, figure)| Some(format!("{name} {:.3}", ours.ratio(other, *figure)?)))
            .collect();
        if !parts.is_empty() {
            let parts = parts.join(" \u{b7} ");
            text.push_str(&format!("{OURS} / {}: {parts}\n", other.arm));
        }
    }
    if !text.is_empty() {
        text.insert_str(0, "ratios of medians\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    fn run(arm: &str, total_ms: f64, wire_bytes: u64) -> MigrationRun {
        MigrationRun {
            arm: arm.to_owned(),
            total_ms: Some(total_ms),
            wire_bytes: Some(wire_bytes),
            ..example()
        }
    }

    /// Medians of odd and even counts; a run that did not arrive has no part in them.
    #[test]
    fn medians() {
        let mut runs = vec![run("a", 1.0, 0), run("a", 9.0, 0), run("a", 2.0, 0)];
        let spread = Spread {
            median: 2.0,
            min: 1.0,
            max: 9.0,
        };
        assert_eq!(summaries(&runs)[0].total_ms, Some(spread));
        runs[1].outcome = Outcome::NotArrived;
        let summary = &summaries(&runs)[0];
        assert_eq!((summary.runs, summary.arrived), (3, 2));
        assert_eq!(summary.total_ms.unwrap().median, 1.5);
        assert!(summary.slowed && !summary.wrong);
    }

    /// The product beside every other arm; nothing where it is not among them.
    #[test]
    fn ratios() {
        let runs = [run(REFERENCE, 400.0, 1000), run(OURS, 100.0, 850)];
        assert_eq!(
            comparison(&runs),
            "ratios of medians\nscaleaway / qemu-multifd-zstd: wire bytes 0.850 \u{b7} \
             total time 0.250 \u{b7} downtime 1.000\n"
        );
        assert_eq!(comparison(&runs[..1]), "");
    }

    /// Encodings are those of the product's report, as means.
    #[test]
    fn encodings() {
        let report = |bytes: u64| serde_json::json!({ "bytes_by_encoding": { "raw": { "pages": 1, "bytes": bytes } } });
        let mut runs = [run(OURS, 1.0, 1), run(OURS, 1.0, 1)];
        runs[0].report = Some(report(10));
        runs[1].report = Some(report(20));
        let raw = summaries(&runs)[0].encoded["raw"];
        assert_eq!((raw.pages, raw.bytes), (1.0, 15.0));
    }
}
