//! What the product saw and decided on the way (`send --trace`), as a series over time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

/// Points that a report keeps of a run; the whole file lies beside it.
pub const POINTS_MAX: usize = 600;
/// Rounds, stops and the like are few.
const EVENTS_MAX: usize = 2000;
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Points and events of a run, each in order of time.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Trace {
    /// What was known at a time.
    pub points: Vec<Point>,
    /// What happened.
    pub events: Vec<Event>,
}

/// What the product knew at a time. What it did not know is `null`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Point {
    /// Since `send` began.
    pub t_ms: f64,
    /// Phase of the migration.
    pub phase: Option<String>,
    /// Bits a second that are delivered.
    pub rate_bps: Option<f64>,
    /// Bits a second that are applied at the target.
    pub goodput_bps: Option<f64>,
    /// What waits in the link's queue.
    pub queueing_ms: Option<f64>,
    /// Pages that are still to be sent.
    pub backlog_pages: Option<f64>,
    /// What they are expected to cost on the wire.
    pub backlog_bytes: Option<f64>,
    /// Sent and not yet acknowledged.
    pub in_flight_bytes: Option<f64>,
    /// The round, from 1.
    pub round: Option<f64>,
    /// How fast the guest makes pages dirty.
    pub dirty_pages_per_s: Option<f64>,
    /// The downtime if the guest were stopped at that time.
    pub predicted_downtime_ms: Option<Range>,
    /// How much the guest is slowed.
    pub throttle_percent: Option<f64>,
}

/// A prediction. One without a spread may be a bare number.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(from = "Predicted")]
pub struct Range {
    /// At least.
    pub low: f64,
    /// At most.
    pub high: f64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Predicted {
    Exact(f64),
    Range { low: f64, high: f64 },
}

impl From<Predicted> for Range {
    fn from(predicted: Predicted) -> Self {
        let (low, high) = match predicted {
            Predicted::Exact(value) => (value, value),
            Predicted::Range { low, high } => (low, high),
        };
        Self { low, high }
    }
}

/// Something that happened.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Event {
    /// Since `send` began.
    pub t_ms: f64,
    /// What.
    pub event: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Event(Event),
    Point(Box<Point>),
}

impl Trace {
    /// Reads the product's file.
    ///
    /// # Errors
    /// When it cannot be read, is far too large, or a line is not what the product writes. The last
    /// line of a killed process may be torn; it is left out.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(
            file.metadata()?.len() <= FILE_BYTES_MAX,
            "{} is too large for a trace",
            path.display()
        );
        Self::of(BufReader::new(file.take(FILE_BYTES_MAX)))
            .with_context(|| format!("{} is no trace", path.display()))
    }

    fn of(lines: impl BufRead) -> anyhow::Result<Self> {
        let mut trace = Self::default();
        let mut lines = (1_u32..).zip(lines.lines()).peekable();
        while let Some((number, line)) = lines.next() {
            match serde_json::from_str(&line?) {
                Ok(Line::Event(event)) if trace.events.len() < EVENTS_MAX => {
                    trace.events.push(event)
                }
                Ok(Line::Event(_)) => {}
                Ok(Line::Point(point)) => trace.points.push(*point),
                Err(_) if lines.peek().is_none() => {}
                Err(error) => return Err(error).context(format!("line {number}")),
            }
        }
        Ok(trace)
    }

    /// The same with no more than [`POINTS_MAX`] points at even steps, the first and the last among
    /// them.
    #[must_use]
    pub fn thinned(mut self) -> Self {
        let count = self.points.len();
        if count > POINTS_MAX {
            let kept = (0..POINTS_MAX).map(|step| step * (count - 1) / (POINTS_MAX - 1));
            self.points = kept.map(|place| self.points[place].clone()).collect();
        }
        self
    }

    /// When each round after the first began.
    pub fn rounds_ms(&self) -> Vec<f64> {
        let rounds = self.points.iter().filter(|point| point.round.is_some());
        let rounds: Vec<&Point> = rounds.collect();
        rounds
            .windows(2)
            .filter(|pair| pair[0].round != pair[1].round)
            .map(|pair| pair[1].t_ms)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"t_ms":0,"phase":"pre-copy","rate_bps":null,"round":1,"predicted_downtime_ms":7,"more":[1]}
{"t_ms":10.5,"event":"round"}
{"t_ms":20,"phase":"pre-copy","rate_bps":9e7,"round":2,"predicted_downtime_ms":{"low":100,"high":250.5}}
{"t_ms":30,"phase":"pre-c"#;

    /// Points and events are told apart, words from a later product are passed over, a torn end too;
    /// a torn line within is refused by its number.
    #[test]
    fn reading() {
        let trace = Trace::of(TEXT.as_bytes()).unwrap();
        assert_eq!((trace.points.len(), trace.events.len()), (2, 1));
        assert_eq!(trace.events[0].event, "round");
        assert_eq!(trace.points[0].rate_bps, None);
        let exact = Range {
            low: 7.0,
            high: 7.0,
        };
        assert_eq!(trace.points[0].predicted_downtime_ms, Some(exact));
        let range = Range {
            low: 100.0,
            high: 250.5,
        };
        assert_eq!(trace.points[1].predicted_downtime_ms, Some(range));
        assert_eq!(trace.rounds_ms(), [20.0]);
        let torn = format!("{TEXT}\n{{\"t_ms\":40}}\n");
        let error = Trace::of(torn.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "line 4");
    }

    /// Thinning keeps both ends and the order, and what is short stays as it is.
    #[test]
    fn thinning() {
        let of = |count: u32| Trace {
            points: (0..count)
                .map(|number| Point {
                    t_ms: f64::from(number),
                    ..Point::default()
                })
                .collect(),
            events: Vec::new(),
        };
        let thin = of(10_000).thinned();
        assert_eq!(thin.points.len(), POINTS_MAX);
        assert_eq!(
            (thin.points[0].t_ms, thin.points[POINTS_MAX - 1].t_ms),
            (0.0, 9999.0)
        );
        assert!(
            thin.points
                .windows(2)
                .all(|pair| pair[0].t_ms < pair[1].t_ms)
        );
        assert_eq!(of(7).thinned(), of(7));
    }
}
