//! Runs of `link/LINK`: what a transport makes of a link, and what it does to a ping beside it.
//!
//! Every arm sends from cloud to client for the same time over a fresh link of the same seed, while
//! a ping goes the same way 20 times a second. The first two seconds are left out for all. An arm
//! of two flows (`scaleaway+tcp-cubic`) says how they share the link once both are under way.

mod arm;
mod table;
mod transfer;

use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use testbed_link::{LinkParams, Loss};

pub use arm::{Flow, LINK_ARMS, LinkArm, PAIR_ARMS};
pub use table::table;

use crate::clock;
use crate::lab::{CLIENT_ADDRESS, Lab, LabOptions};
use crate::probe::{PingLog, PingProbe};
use crate::progress::Progress;
use crate::report::Document;
use crate::run::Options;
use crate::wan::LinkJson;

const PING_INTERVAL: Duration = Duration::from_millis(50);
/// The ping alone, before the transfer.
const IDLE: Duration = Duration::from_secs(3);
/// Left out of all figures.
const STARTUP: Duration = Duration::from_secs(2);
/// What is measured.
const STEADY: Duration = Duration::from_secs(18);
/// How much later the second of two flows starts, and what both are given to find their shares.
const LATER: Duration = Duration::from_secs(3);
const CONVERGENCE: Duration = Duration::from_secs(10);
/// What is measured of two flows.
const SHARED: Duration = Duration::from_secs(20);
/// Share of a full packet's IP bytes that a QUIC transfer can use.
const PAYLOAD_SHARE: f64 = 0.959;

/// One run.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct LinkRun {
    /// What filled the link.
    pub arm: String,
    /// From 1.
    pub repeat: u32,
    /// Bits per second that the application received, steady part.
    pub goodput_bps: Option<f64>,
    /// Of what could have been: rate x 0.959 x (1 - loss).
    pub ceiling_share: Option<f64>,
    /// The same of the whole run, start-up included.
    #[serde(default)]
    pub whole_ceiling_share: Option<f64>,
    /// What each of two flows got.
    #[serde(default)]
    pub flows: Vec<FlowShare>,
    /// Jain's index of two flows: 1 is an even share, 0.5 is all for one.
    #[serde(default)]
    pub jain: Option<f64>,
    /// Median of the ping during the steady part, less its median before.
    pub ping_added_p50_ms: Option<f64>,
    /// 95th percentile during, less the median before.
    pub ping_added_p95_ms: Option<f64>,
    /// Packets that found the link's buffers full, both directions, start-up included.
    pub queue_drops: Option<u64>,
    /// IP bytes offered to the link, both directions, start-up included.
    pub wire_bytes: Option<u64>,
    /// What the arm itself reported.
    pub report: Option<Value>,
    /// Why there is no goodput.
    #[serde(default)]
    pub reason: Option<String>,
}

/// One of two flows.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct FlowShare {
    /// What sends.
    pub arm: String,
    /// Bits per second that its application received while both were under way.
    pub goodput_bps: f64,
    /// Of what the link could have carried.
    pub ceiling_share: f64,
}

/// Runs `link/LINK` and writes its report.
///
/// # Errors
/// When the lab itself does not work. An arm that fails is a result, not an error.
pub fn run(
    link_name: &str,
    options: &Options,
    progress: &Progress,
) -> anyhow::Result<Document<LinkRun>> {
    let Some(link) = testbed_link::named(link_name) else {
        bail!("no link {link_name}: see `testbed list`");
    };
    let scenario = format!("link/{link_name}");
    let folder = options.folder.part(&scenario)?;
    let mut link_json = serde_json::to_value(LinkJson::from(&link))?;
    link_json["name"] = json!(link_name);
    let mut document = Document {
        schema: 1,
        kind: "link".to_owned(),
        scenario,
        link: link_json,
        guest: Value::Null,
        asked: Value::Null,
        runs: Vec::new(),
    };
    let arms = asked_arms(options)?;
    for repeat in 1..=options.repeat {
        for arm in &arms {
            let name = arm.to_string();
            if let Some(run) = folder.kept::<LinkRun>(&name, repeat) {
                progress.note(&format!("{name} {repeat}: taken over"));
                document.runs.push(run);
                continue;
            }
            progress.step(&format!("{name} ({repeat}): filling the link"));
            let run = one(*arm, repeat, &link, options.keep)
                .with_context(|| format!("{name}, run {repeat}"))?;
            folder.keep(&name, repeat, &run)?;
            document.runs.push(run);
            folder.finish(&document)?;
        }
    }
    folder.finish(&document)?;
    Ok(document)
}

fn asked_arms(options: &Options) -> anyhow::Result<Vec<LinkArm>> {
    if options.arms.is_empty() {
        return Ok(LINK_ARMS.to_vec());
    }
    options.arms.iter().map(|name| name.parse()).collect()
}

/// Whether every arm moved something.
#[must_use]
pub fn all_well(document: &Document<LinkRun>) -> bool {
    document.runs.iter().all(|run| run.goodput_bps.is_some())
}

fn one(arm: LinkArm, repeat: u32, link: &LinkParams, keep: bool) -> anyhow::Result<LinkRun> {
    let mut options = LabOptions::new(*link)?;
    options.seed = u64::from(repeat);
    if let Ok(product) = crate::product::program() {
        options
            .visible
            .extend(product.parent().map(ToOwned::to_owned));
    }
    let mut lab = Lab::start(&options)?;
    let ping = PingProbe::start(&lab.cloud, CLIENT_ADDRESS, PING_INTERVAL)?;
    let idle_from_us = clock::epoch_us();
    clock::pause(IDLE);
    let before = lab.wan.counters()?;
    let idle = (idle_from_us, clock::epoch_us());
    let moved = match arm {
        LinkArm::Alone(flow) => transfer::alone(flow, &lab),
        LinkArm::Beside(first, second) => transfer::beside(first, second, &lab),
    };
    let to_us = clock::epoch_us();
    let after = lab.wan.counters()?;
    let log = ping.stop()?;
    if keep {
        lab.keep_files()?;
    }
    lab.check()?;

    let mut run = LinkRun {
        arm: arm.to_string(),
        repeat,
        ..LinkRun::default()
    };
    match moved {
        Err(error) => run.reason = Some(format!("{error:#}")),
        Ok(moved) => {
            let from_us = moved.started_us + micros(moved.measured.from);
            let to_us = to_us.min(moved.started_us + micros(moved.measured.to));
            let (p50, p95) = added(&log, idle, (from_us, to_us));
            let ceiling = ceiling_bps(link);
            let goodput_bps = moved.flows.iter().map(|flow| flow.1).sum::<f64>();
            run.goodput_bps = Some(goodput_bps);
            run.ceiling_share = Some(goodput_bps / ceiling);
            run.whole_ceiling_share = moved.whole_bps.map(|bps| bps / ceiling);
            run.ping_added_p50_ms = p50;
            run.ping_added_p95_ms = p95;
            if moved.flows.len() > 1 {
                run.jain = Some(jain(&moved.flows));
                run.flows = shares(&moved.flows, ceiling);
            }
            run.queue_drops = Some(after.queue_drops() - before.queue_drops());
            run.wire_bytes = Some(after.wire_bytes() - before.wire_bytes());
            run.report = Some(moved.report);
        }
    }
    Ok(run)
}

/// What the ping's median and 95th percentile of a span are above its median of an idle one.
fn added(log: &PingLog, idle: (u64, u64), busy: (u64, u64)) -> (Option<f64>, Option<f64>) {
    let base = log.span(idle.0, idle.1).rtt_p50_ms;
    let during = log.span(busy.0, busy.1);
    let above = |value: Option<f64>| value.zip(base).map(|(value, base)| value - base);
    (above(during.rtt_p50_ms), above(during.rtt_p95_ms))
}

fn shares(flows: &[(Flow, f64)], ceiling: f64) -> Vec<FlowShare> {
    let share = |(flow, goodput_bps): &(Flow, f64)| FlowShare {
        arm: flow.to_string(),
        goodput_bps: *goodput_bps,
        ceiling_share: goodput_bps / ceiling,
    };
    flows.iter().map(share).collect()
}

fn jain(flows: &[(Flow, f64)]) -> f64 {
    let sum: f64 = flows.iter().map(|flow| flow.1).sum();
    let squares: f64 = flows.iter().map(|flow| flow.1 * flow.1).sum();
    // Few flows.
    sum * sum / (squares * flows.len() as f64)
}

fn ceiling_bps(link: &LinkParams) -> f64 {
    let lost = match link.loss {
        Loss::None => 0.0,
        Loss::Random { share } | Loss::Bursts { share, .. } => share,
    };
    // Exact: rates are below 2^53.
    link.rate_bps as f64 * PAYLOAD_SHARE * (1.0 - lost)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names are read as they are written, and unknown ones are refused.
    #[test]
    fn names() {
        for arm in LINK_ARMS.into_iter().chain(PAIR_ARMS) {
            assert_eq!(arm.to_string().parse::<LinkArm>().unwrap(), arm);
        }
        let error = "tcp-vegas".parse::<LinkArm>().unwrap_err().to_string();
        assert_eq!(error, "no arm tcp-vegas for a link: see `testbed list`");
    }

    /// Even shares are 1, a hog is 0.5.
    #[test]
    fn fairness() {
        let flows = |first, second| [(Flow::Scaleaway, first), (Flow::Tcp("bbr"), second)];
        assert_eq!(jain(&flows(4.0, 4.0)), 1.0);
        assert_eq!(jain(&flows(9.0, 0.0)), 0.5);
        assert!((jain(&flows(2.0, 1.0)) - 0.9).abs() < 1e-9);
    }

    /// The ceiling of the interface's page.
    #[test]
    fn ceiling() {
        let link = testbed_link::named("wan-100m-lossy").unwrap();
        assert!(
            (ceiling_bps(&link) - 94.941e6).abs() < 1.0,
            "{}",
            ceiling_bps(&link)
        );
    }
}
