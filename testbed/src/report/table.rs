//! Runs as a table for people.

use super::summary::{Spread, comparison, is_slowed, summaries};
use super::{MigrationRun, Outcome};

const COLUMNS: [&str; 12] = [
    "arm",
    "run",
    "outcome",
    "total s",
    "down ms",
    "wire MB",
    "outage ms",
    "lost",
    "+ping ms",
    "writes",
    "resets",
    "errors",
];

/// The table, and under it what its marks mean and how the product compares.
pub fn table(runs: &[MigrationRun]) -> String {
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    rows.extend(runs.iter().map(row));
    let mut widths = [0; COLUMNS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(column, (cell, width))| match column {
                0 | 2 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    if runs.iter().any(is_slowed) {
        text.push_str("* the guest was slowed: it wrote at less than 0.9 of its rate before,\n");
        text.push_str("  which makes it easier to move\n");
    }
    for run in runs {
        if let (Some(late), Some(outage)) = (run.ping_late.filter(|late| *late > 0), run.outage_ms)
        {
            text.push_str(&format!(
                "{} {}: {late} pings were answered after more than a second; without them the \
                 outage is {outage:.0} ms\n",
                run.arm, run.repeat
            ));
        }
        if let Some(share) = run.guest_writes_share_after {
            text.push_str(&format!(
                "{} {}: from RESUME to the last page the guest wrote at {share:.2} of its rate\n",
                run.arm, run.repeat
            ));
        }
        let post_copy = run
            .target_report
            .as_ref()
            .map(|report| &report["post_copy"]);
        if let Some(post_copy) = post_copy.filter(|post_copy| post_copy.is_object()) {
            text.push_str(&format!(
                "{} {}: post-copy {post_copy}\n",
                run.arm, run.repeat
            ));
        }
        if let Some(reason) = &run.reason {
            text.push_str(&format!("{} {}: {reason}\n", run.arm, run.repeat));
        }
    }
    text.push_str(&super::beside::table(runs));
    text.push_str(&super::pair::lines(runs));
    text.push_str(&source_cpu(runs));
    text.push_str(&comparison(runs));
    text
}

/// What the move cost the source's CPU, by arm; empty where it was not measured.
fn source_cpu(runs: &[MigrationRun]) -> String {
    let mut text = String::new();
    for summary in summaries(runs) {
        let of_arm = || {
            let of_arm = runs.iter().filter(|run| run.arm == summary.arm);
            of_arm.filter_map(|run| run.source_cpu)
        };
        let median = |values: Vec<f64>| Spread::of(values.into_iter()).map(|spread| spread.median);
        let before = median(of_arm().filter_map(|cpu| cpu.cores_before).collect());
        let during = median(of_arm().filter_map(|cpu| cpu.cores_during).collect());
        let (Some(before), Some(during)) = (before, during) else {
            continue;
        };
        let threads = of_arm().filter_map(|cpu| cpu.migration_thread_cores);
        let thread = median(threads.collect()).map_or(String::new(), |cores| {
            format!(", of it {cores:.3} of its migration's thread")
        });
        text.push_str(&format!(
            "{}: source QEMU took {before:.2} cores before, {during:.2} during{thread}\n",
            summary.arm
        ));
    }
    text
}

fn row(run: &MigrationRun) -> [String; COLUMNS.len()] {
    let number = |value: Option<f64>, digits: usize| match value {
        Some(value) => format!("{value:.digits$}"),
        None => "-".to_owned(),
    };
    let count = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
    let outcome = match run.outcome {
        Outcome::Arrived => "arrived",
        Outcome::Forced => "forced",
        Outcome::NotArrived => "not arrived",
        Outcome::Failed => "failed",
        Outcome::Stayed => "stayed",
    };
    let megabytes = run
        .wire_bytes
        .map(|bytes| format!("{}.{}", bytes / 1_000_000, bytes / 100_000 % 10));
    let writes = number(run.guest_writes_share, 2) + if is_slowed(run) { "*" } else { "" };
    [
        run.arm.clone(),
        run.repeat.to_string(),
        outcome.to_owned(),
        number(run.total_ms.map(|total| total / 1000.0), 1),
        number(run.downtime_ms, 0),
        megabytes.unwrap_or("-".to_owned()),
        number(run.ping_outage_ms, 0),
        count(run.ping_lost),
        number(run.ping_added_p95_ms, 1),
        writes,
        count(run.counter_resets),
        count(run.self_check_errors),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::{SourceCpu, example};
    use super::*;

    /// Columns line up, what was not measured is a dash, a slowed guest is marked and explained.
    #[test]
    fn rows() {
        let cpu = SourceCpu {
            cores_before: Some(0.25),
            cores_during: Some(0.5),
            migration_thread_cores: Some(0.125),
        };
        let failed = MigrationRun {
            arm: "scaleaway".to_owned(),
            outcome: Outcome::NotArrived,
            total_ms: None,
            guest_writes_share: Some(1.0),
            outage_ms: Some(5100.0),
            source_cpu: Some(cpu),
            ping_late: Some(170),
            reason: Some("180 s are over".to_owned()),
            ..example()
        };
        let text = table(&[example(), failed]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1],
            "qemu-plain    1  arrived         75.3      743    925.0        851    32      14.2   \
            0.85*       0       0"
        );
        assert!(lines[2].contains("not arrived        -"));
        assert!(lines[3].starts_with("* the guest was slowed"));
        assert_eq!(
            lines[5],
            "scaleaway 1: 170 pings were answered after more than a second; without them the outage \
             is 5100 ms"
        );
        assert_eq!(lines[6], "scaleaway 1: 180 s are over");
        assert_eq!(
            lines[7],
            "scaleaway: source QEMU took 0.25 cores before, 0.50 during, of it 0.125 of its \
             migration's thread"
        );
    }
}
