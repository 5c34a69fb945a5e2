//! What a run of the lab found, as JSON (schema 1), as a table, and as one
//! page with charts.
//!
//! A field that was not measured is `null`, never 0.

mod beside;
mod folder;
mod judged;
mod page;
mod pair;
mod summary;
mod table;
mod trace;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use beside::{Beside, Flows};
pub use folder::Folder;
pub(crate) use folder::write;
pub use judged::judged;
pub use page::{Results, page, write as write_page};
pub use pair::Pair;
pub use summary::{
    Encoded, FigureOf, NONE, OURS, REFERENCE, Spread, Summary, comparison, summaries,
};
pub use table::table;
pub use trace::{Event, POINTS_MAX, Point, Range, Trace};

/// One scenario's runs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Document<R> {
    /// 1.
    pub schema: u32,
    /// `migration`, `link` or `fault`.
    pub kind: String,
    /// The scenario's name.
    pub scenario: String,
    /// All parameters of the link.
    pub link: Value,
    /// All parameters of the guest.
    pub guest: Value,
    /// What every arm was asked for: `downtime_ms`, and `send_flags` for the product.
    #[serde(default)]
    pub asked: Value,
    /// In the order in which they ran.
    pub runs: Vec<R>,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs at the target.
    Arrived,
    /// It does, because it was stopped for longer than asked.
    Forced,
    /// Not within the arm's limit.
    NotArrived,
    /// The arm gave up.
    Failed,
    /// It was not moved at all: the arm `none`.
    Stayed,
}

/// Cores that the source's QEMU took, the guest's own among them.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct SourceCpu {
    /// Before the start.
    pub cores_before: Option<f64>,
    /// While it moved.
    pub cores_during: Option<f64>,
    /// The thread that sends pages, or holds at the end of a pass; a part of `cores_during`.
    pub migration_thread_cores: Option<f64>,
}

/// One migration.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct MigrationRun {
    /// What moved it.
    pub arm: String,
    /// From 1.
    pub repeat: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, where it did not arrive.
    #[serde(default)]
    pub reason: Option<String>,
    /// Start command to the target's RESUME.
    pub total_ms: Option<f64>,
    /// STOP to RESUME, by the events of both QEMUs.
    pub downtime_ms: Option<f64>,
    /// After post-copy: RESUME, while `total_ms` goes to the last page.
    #[serde(default)]
    pub resumed_ms: Option<f64>,
    /// IP bytes offered to the link, both directions.
    pub wire_bytes: Option<u64>,
    /// How much of `wire_bytes` was not the arm's: the user's pings and readings and the overlay's
    /// own, by what they offered each second before the start. More on a way back than on a way out.
    #[serde(default)]
    pub wire_bytes_background: Option<u64>,
    /// IP bytes that left it.
    pub wire_bytes_delivered: Option<u64>,
    /// Packets that found the link's buffer full.
    pub queue_drops: Option<u64>,
    /// Longest time without an answer to the user's pings, less one interval.
    pub ping_outage_ms: Option<f64>,
    /// The same, but an answer that took more than a second is none: after post-copy a guest may
    /// answer everything seconds late.
    #[serde(default)]
    pub outage_ms: Option<f64>,
    /// Pings that were answered after more than a second.
    #[serde(default)]
    pub ping_late: Option<u64>,
    /// The user's pings that were never answered.
    pub ping_lost: Option<u64>,
    /// 95th percentile of the ping's time during the move, less its median before.
    pub ping_added_p95_ms: Option<f64>,
    /// The guest's write rate during the move over that before.
    pub guest_writes_share: Option<f64>,
    /// After post-copy's RESUME and until its last page: the guest's write rate over that before the
    /// move, as its user read it.
    #[serde(default)]
    pub guest_writes_share_after: Option<f64>,
    /// How often the user saw the service's counter fall or its connection break.
    pub counter_resets: Option<u64>,
    /// Pages that the guest found wrong in itself, after a sweep over all.
    pub self_check_errors: Option<u64>,
    /// What other people's flows on the overlay felt, in scenarios that have them. They are in
    /// `wire_bytes` too.
    #[serde(default)]
    pub beside: Option<Beside>,
    /// A second guest that moved at the same time, in scenarios that have one.
    #[serde(default)]
    pub pair: Option<Pair>,
    /// Cores that the source's QEMU took.
    #[serde(default)]
    pub source_cpu: Option<SourceCpu>,
    /// What the product saw and decided on the way, where it was asked for that.
    #[serde(default)]
    pub trace: Option<Trace>,
    /// The product's own report, by `send`.
    pub report: Option<Value>,
    /// The same by `receive`.
    #[serde(default)]
    pub target_report: Option<Value>,
}

/// Below this share of its own writes before, a guest was slowed so much that the arm's figures
/// flatter it.
pub const WRITES_SHARE_MIN: f64 = 0.9;

#[cfg(test)]
pub(crate) fn example() -> MigrationRun {
    MigrationRun {
        arm: "qemu-plain".to_owned(),
        repeat: 1,
        outcome: Outcome::Arrived,
        reason: None,
        total_ms: Some(75_309.0),
        downtime_ms: Some(743.0),
        resumed_ms: None,
        wire_bytes: Some(925_000_000),
        wire_bytes_background: Some(1200),
        wire_bytes_delivered: Some(924_000_000),
        queue_drops: Some(887),
        ping_outage_ms: Some(851.0),
        outage_ms: Some(851.0),
        ping_late: Some(0),
        ping_lost: Some(32),
        ping_added_p95_ms: Some(14.25),
        guest_writes_share: Some(0.85),
        guest_writes_share_after: None,
        counter_resets: Some(0),
        self_check_errors: Some(0),
        beside: None,
        pair: None,
        source_cpu: None,
        trace: None,
        target_report: None,
        report: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is not known is null, and the words of outcomes are those others script against.
    #[test]
    fn json() {
        let run = MigrationRun {
            outcome: Outcome::NotArrived,
            total_ms: None,
            ..example()
        };
        let json = serde_json::to_value(&run).unwrap();
        assert_eq!(json["outcome"], "not_arrived");
        assert!(json["total_ms"].is_null() && json["report"].is_null());
        assert_eq!(serde_json::from_value::<MigrationRun>(json).unwrap(), run);
    }
}
