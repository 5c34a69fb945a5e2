//! What other people's traffic felt of a migration.

use serde::{Deserialize, Serialize};

use super::MigrationRun;

/// Figures of the flows in a span.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Flows {
    /// Bits a second that the TCP stream's application received.
    pub tcp_bps: Option<f64>,
    /// One way of the game's datagrams: median.
    pub udp_p50_ms: Option<f64>,
    /// 95th percentile.
    pub udp_p95_ms: Option<f64>,
    /// Mean difference between one datagram's delay and the next one's.
    pub udp_jitter_ms: Option<f64>,
    /// Share of the game's datagrams that never arrived.
    pub udp_lost_share: Option<f64>,
    /// Round trip of pings: median.
    pub ping_p50_ms: Option<f64>,
    /// 95th percentile.
    pub ping_p95_ms: Option<f64>,
}

/// The flows during a migration, from its start to its end, and before it.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Beside {
    /// The TCP stream's rate during the migration over that before.
    pub tcp_share_of_alone: Option<f64>,
    /// During.
    #[serde(flatten)]
    pub during: Flows,
    /// The last seconds before the start.
    pub alone: Flows,
}

/// A table of runs that had such flows beside them; empty if there are none.
pub(super) fn table(runs: &[MigrationRun]) -> String {
    let mut text = String::new();
    for run in runs {
        let Some(beside) = &run.beside else { continue };
        if text.is_empty() {
            text.push_str(&line(
                "beside it",
                "run",
                &[
                    "tcp Mbit/s",
                    "of alone",
                    "game p50",
                    "game p95",
                    "jitter ms",
                    "lost %",
                    "ping p50",
                    "ping p95",
                    "alone p95",
                ]
                .map(str::to_owned),
            ));
        }
        text.push_str(&line(&run.arm, &run.repeat.to_string(), &cells(beside)));
    }
    text
}

fn cells(beside: &Beside) -> [String; 9] {
    let flows = &beside.during;
    let number = |value: Option<f64>, digits: usize| {
        value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
    };
    [
        number(flows.tcp_bps.map(|rate| rate / 1e6), 1),
        number(beside.tcp_share_of_alone, 3),
        number(flows.udp_p50_ms, 1),
        number(flows.udp_p95_ms, 1),
        number(flows.udp_jitter_ms, 2),
        number(flows.udp_lost_share.map(|share| share * 100.0), 1),
        number(flows.ping_p50_ms, 1),
        number(flows.ping_p95_ms, 1),
        number(beside.alone.ping_p95_ms, 1),
    ]
}

fn line(arm: &str, run: &str, cells: &[String; 9]) -> String {
    let cells: String = cells.iter().map(|cell| format!("{cell:>12}")).collect();
    format!("{arm:<22}{run:>4}{cells}\n")
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    /// Figures during the migration stand in JSON beside each other, those before it in `alone`; the
    /// table has a line for each run with flows.
    #[test]
    fn json_and_table() {
        let beside = Beside {
            tcp_share_of_alone: Some(0.9125),
            during: Flows {
                tcp_bps: Some(85e6),
                udp_p95_ms: Some(31.25),
                ..Flows::default()
            },
            alone: Flows {
                ping_p95_ms: Some(50.5),
                ..Flows::default()
            },
        };
        let json = serde_json::to_value(beside).unwrap();
        assert_eq!(json["udp_p95_ms"], 31.25);
        assert_eq!(json["alone"]["ping_p95_ms"], 50.5);
        assert!(json["udp_p50_ms"].is_null());
        assert_eq!(serde_json::from_value::<Beside>(json).unwrap(), beside);
        let run = MigrationRun {
            beside: Some(beside),
            ..example()
        };
        let text = table(&[example(), run]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].len(), lines[1].len());
        assert!(lines[1].contains("85.0       0.912"), "{text}");
        assert_eq!(table(&[example()]), "");
    }
}
