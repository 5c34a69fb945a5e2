//! A second guest that moved at the same time.

use serde::{Deserialize, Serialize};

use super::{MigrationRun, Outcome};

/// Its figures, and how both shared the link.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Pair {
    /// How the second's move ended.
    pub outcome: Outcome,
    /// Why, where it did not arrive.
    pub reason: Option<String>,
    /// As of the first.
    pub total_ms: Option<f64>,
    /// As of the first.
    pub downtime_ms: Option<f64>,
    /// As of the first.
    pub self_check_errors: Option<u64>,
    /// What each had delivered when the first of the two ended, by the product's own traces.
    pub moved_together_bytes: Option<[f64; 2]>,
    /// Jain's index of these: 1 where both had the same.
    pub jain: Option<f64>,
}

/// A line for each run that had a second; empty if there are none.
pub(super) fn lines(runs: &[MigrationRun]) -> String {
    let number = |value: Option<f64>, unit: f64, digits: usize| {
        value.map_or("-".to_owned(), |value| format!("{:.digits$}", value / unit))
    };
    let mut text = String::new();
    for run in runs {
        let Some(pair) = &run.pair else { continue };
        let [first, second] = [0, 1].map(|place: usize| {
            let bytes = pair.moved_together_bytes.map(|bytes| bytes[place]);
            number(bytes, 1e6, 1)
        });
        text.push_str(&format!(
            "{} {}: the second guest: {:?}, {} s, {} ms down; until one had arrived they moved {first} \
             and {second} MB, Jain {}\n",
            run.arm,
            run.repeat,
            pair.outcome,
            number(pair.total_ms, 1e3, 1),
            number(pair.downtime_ms, 1.0, 0),
            number(pair.jain, 1.0, 3),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn line() {
        let run = MigrationRun {
            pair: Some(Pair {
                outcome: Outcome::Arrived,
                reason: None,
                total_ms: Some(41_250.0),
                downtime_ms: Some(222.0),
                self_check_errors: Some(0),
                moved_together_bytes: Some([100e6, 110e6]),
                jain: Some(0.9977),
            }),
            ..example()
        };
        assert_eq!(
            lines(&[example(), run]),
            "qemu-plain 1: the second guest: Arrived, 41.2 s, 222 ms down; until one had arrived they \
             moved 100.0 and 110.0 MB, Jain 0.998\n"
        );
    }
}
