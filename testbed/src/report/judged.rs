//! Whether runs kept to what was asked for, and to what `plan` had predicted.

use super::summary::exact;
use super::{Document, MigrationRun, Outcome, summaries};

/// A user may be without answers for so long beyond the downtime asked for, and one round trip.
const OUTAGE_BEYOND_MS: f64 = 150.0;

/// Lines for each arm; empty where nothing was asked for or predicted.
pub fn judged(document: &Document<MigrationRun>) -> String {
    let mut text = String::new();
    for summary in summaries(&document.runs) {
        let runs: Vec<&MigrationRun> = document
            .runs
            .iter()
            .filter(|run| run.arm == summary.arm && run.outcome != Outcome::Stayed)
            .collect();
        text.push_str(&budget(document, &summary.arm, &runs));
        text.push_str(&predictions(&summary.arm, &runs));
    }
    text
}

/// Of all runs: one that did not arrive kept to nothing.
fn budget(document: &Document<MigrationRun>, arm: &str, runs: &[&MigrationRun]) -> String {
    let Some(asked_ms) = document.asked["downtime_ms"].as_f64() else {
        return String::new();
    };
    if runs.is_empty() {
        return String::new();
    }
    let rtt_ms = document.link["delay_ms"].as_f64().unwrap_or(0.0) * 2.0;
    let outage_max_ms = asked_ms + OUTAGE_BEYOND_MS + rtt_ms;
    let within = |figure: fn(&MigrationRun) -> Option<f64>, most: f64| {
        let within = runs
            .iter()
            .filter(|run| figure(run).is_some_and(|value| value <= most));
        within.count()
    };
    format!(
        "{arm}: downtime within {asked_ms:.0} ms in {} of {}, the user's outage within \
         {outage_max_ms:.0} ms in {}\n",
        within(|run| run.downtime_ms, asked_ms),
        runs.len(),
        within(|run| run.outage_ms.or(run.ping_outage_ms), outage_max_ms),
    )
}

type Figure = fn(&MigrationRun) -> Option<f64>;

/// Of runs that arrived and had a prediction before.
fn predictions(arm: &str, runs: &[&MigrationRun]) -> String {
    let figures: [(&str, &str, Figure); 3] = [
        ("total time", "total_ms", |run| run.total_ms),
        ("downtime", "downtime_ms", |run| run.downtime_ms),
        ("wire bytes", "wire_bytes", |run| run.wire_bytes.map(exact)),
    ];
    let mut parts = Vec::new();
    for (name, key, figure) in figures {
        let predicted = runs.iter().filter_map(|run| {
            let range = &run.report.as_ref()?["predicted"][key];
            Some((
                figure(run)?,
                range["low"].as_f64()?,
                range["high"].as_f64()?,
            ))
        });
        let predicted: Vec<(f64, f64, f64)> = predicted.collect();
        let inside = predicted
            .iter()
            .filter(|(actual, low, high)| (low..=high).contains(&actual));
        let widest = predicted.iter().map(|(_, low, high)| high / low.max(1.0));
        if let Some(widest) = widest.reduce(f64::max) {
            parts.push(format!(
                "{name} {} of {} (widest {widest:.2} times)",
                inside.count(),
                predicted.len()
            ));
        }
    }
    match parts.is_empty() {
        true => String::new(),
        false => format!("{arm}: inside the predicted range: {}\n", parts.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use serde_json::json;

    fn document(runs: Vec<MigrationRun>) -> Document<MigrationRun> {
        Document {
            schema: 1,
            kind: "migration".to_owned(),
            scenario: "dirty8/wan-100m".to_owned(),
            link: json!({ "delay_ms": 25.0 }),
            guest: json!({}),
            asked: json!({ "downtime_ms": 300, "send_flags": [] }),
            runs,
        }
    }

    fn run(downtime_ms: f64, outage_ms: f64) -> MigrationRun {
        let predicted = json!({
            "total_ms": { "low": 70_000, "high": 105_000 },
            "downtime_ms": { "low": 100, "high": 200 },
        });
        MigrationRun {
            arm: "scaleaway".to_owned(),
            downtime_ms: Some(downtime_ms),
            outage_ms: Some(outage_ms),
            report: Some(json!({ "predicted": predicted })),
            ..example()
        }
    }

    /// Limits count as kept; a run that never arrived kept to none; an outage may last 150 ms and a
    /// round trip longer than the downtime.
    #[test]
    fn counts() {
        let lost = MigrationRun {
            outcome: Outcome::NotArrived,
            total_ms: None,
            downtime_ms: None,
            outage_ms: None,
            ping_outage_ms: None,
            report: None,
            ..run(0.0, 0.0)
        };
        let text = judged(&document(vec![run(300.0, 500.0), run(150.0, 501.0), lost]));
        assert_eq!(
            text,
            "scaleaway: downtime within 300 ms in 2 of 3, the user's outage within 500 ms in 1\n\
             scaleaway: inside the predicted range: total time 2 of 2 (widest 1.50 times), \
             downtime 1 of 2 (widest 2.00 times)\n"
        );
    }

    /// Reports from before there was a budget say nothing of one.
    #[test]
    fn nothing_asked() {
        let mut old = document(vec![example()]);
        old.asked = json!(null);
        assert_eq!(judged(&old), "");
    }
}
