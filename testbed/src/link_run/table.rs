//! Runs on a link as a table for people.

use super::LinkRun;

const COLUMNS: [&str; 10] = [
    "arm",
    "run",
    "Mbit/s",
    "of ceiling",
    "whole run",
    "+ping p50",
    "+ping p95",
    "drops",
    "wire MB",
    "Jain",
];

/// The table, and under it why an arm has no figures.
#[must_use]
pub fn table(runs: &[LinkRun]) -> String {
    let mut text = String::new();
    let mut add = |cells: [String; COLUMNS.len()]| {
        let [arm, rest @ ..] = cells;
        let rest: Vec<_> = rest.iter().map(|cell| format!("{cell:>11}")).collect();
        text.push_str(&format!("{arm:<27}{}\n", rest.concat()));
    };
    add(COLUMNS.map(str::to_owned));
    runs.iter().for_each(|run| add(row(run)));
    for run in runs {
        for flow in &run.flows {
            let (mbps, share) = (flow.goodput_bps / 1e6, flow.ceiling_share * 100.0);
            let (arm, repeat) = (&run.arm, run.repeat);
            text.push_str(&format!(
                "{arm} {repeat}: {} {mbps:.1} Mbit/s, {share:.1} %\n",
                flow.arm
            ));
        }
        if let Some(reason) = &run.reason {
            text.push_str(&format!("{} {}: {reason}\n", run.arm, run.repeat));
        }
    }
    text
}

fn row(run: &LinkRun) -> [String; COLUMNS.len()] {
    let number = |value: Option<f64>, digits: usize| {
        value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let count = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
    [
        run.arm.clone(),
        run.repeat.to_string(),
        number(run.goodput_bps.map(|rate| rate / 1e6), 1),
        number(run.ceiling_share.map(|share| share * 100.0), 1) + " %",
        number(run.whole_ceiling_share.map(|share| share * 100.0), 1) + " %",
        number(run.ping_added_p50_ms, 1),
        number(run.ping_added_p95_ms, 1),
        count(run.queue_drops),
        count(run.wire_bytes.map(|bytes| bytes / 1_000_000)),
        number(run.jain, 3),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Columns line up; what was not measured is a dash, with its reason below.
    #[test]
    fn rows() {
        let good = LinkRun {
            arm: "tcp-bbr".to_owned(),
            repeat: 1,
            goodput_bps: Some(91.25e6),
            ceiling_share: Some(0.956),
            queue_drops: Some(7),
            ..LinkRun::default()
        };
        let failed = LinkRun {
            arm: "scaleaway".to_owned(),
            repeat: 1,
            reason: Some("not built".to_owned()),
            ..LinkRun::default()
        };
        let text = table(&[good, failed]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[..3].iter().all(|line| line.chars().count() == 126),
            "{text}"
        );
        assert!(
            lines[1].contains("91.2") && lines[1].contains("95.6 %"),
            "{text}"
        );
        assert_eq!(lines[3], "scaleaway 1: not built");
    }
}
