//! What `plan` prints: one JSON document, or a page for people.

use std::fmt;

use serde::Serialize;

use super::ending::Ending;
use super::link::{LinkSeen, TargetSaid};
use super::model::{Converges, Inputs, Prediction, Range};
use crate::estimate::{to_f64, to_u64};
use crate::report::millis;

/// Programs for each core from which on a host is called busy.
const BUSY: f64 = 1.5;

/// What was found out beside the model's inputs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) was_running: bool,
    pub(crate) is_mapped: bool,
    pub(crate) pages_total: u64,
    pub(crate) link: LinkSeen,
    pub(crate) said: TargetSaid,
    pub(crate) max_bandwidth_bps: Option<u64>,
    pub(crate) qemu_dirty_bytes_per_s: Option<f64>,
    /// Why memory could not be looked at.
    pub(crate) unseen: Option<String>,
}

/// The document.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Document {
    schema: u32,
    vm: String,
    peer: String,
    total_ms: Range,
    downtime_ms: Range,
    wire_bytes: Range,
    converges: Converges,
    /// How `send` with these options would end.
    ends: Ending,
    /// How much the guest is slowed at the end.
    throttle_percent: u64,
    rounds: u32,
    settings: Settings,
    measured: Measured,
    learned_moves: usize,
    assumptions: Vec<String>,
}

/// What `send` would use.
#[derive(Debug, Clone, Serialize)]
struct Settings {
    downtime_ms: u64,
    /// The downtime that would do, where the asked one may not.
    downtime_needed_ms: Option<u64>,
    when_stuck: String,
    throttle_max: u8,
    timeout_s: Option<u64>,
    max_rounds: Option<u32>,
    max_bandwidth_bps: Option<u64>,
    level: i32,
    mapped: bool,
}

#[derive(Debug, Clone, Serialize)]
struct Measured {
    link: Link,
    guest: Guest,
    target: Target,
}

#[derive(Debug, Clone, Serialize)]
struct Link {
    /// Goodput of lanes.
    goodput_bps: u64,
    rtt_min_ms: f64,
    lost_share: f64,
}

#[derive(Debug, Clone, Serialize)]
struct Guest {
    pages_total: u64,
    zero_share: Option<f64>,
    held_share: Option<f64>,
    referred_share: Option<f64>,
    content_share: Option<f64>,
    /// Lane bytes per page that is sent.
    bytes_per_content_page: Option<f64>,
    hot_pages: Option<u64>,
    dirty_pages_per_s: Option<f64>,
    working_set_pages: Option<u64>,
    qemu_dirty_bytes_per_s: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
struct Target {
    /// `null`: it only answers probes.
    qemu: Option<String>,
    known_pages: u32,
}

impl Document {
    pub(crate) fn new(facts: &Facts, inputs: &Inputs, prediction: &Prediction) -> Document {
        let costs = &inputs.costs;
        let seen = |value: f64| facts.unseen.is_none().then_some(value);
        let dirtying = &inputs.dirtying;
        Document {
            schema: 1,
            vm: facts.vm.clone(),
            peer: facts.peer.clone(),
            total_ms: prediction.total_ms,
            downtime_ms: prediction.downtime_ms,
            wire_bytes: prediction.wire_bytes,
            converges: prediction.converges,
            ends: prediction.ends,
            throttle_percent: prediction.throttle_percent,
            rounds: prediction.rounds,
            settings: Settings {
                downtime_ms: millis(inputs.policy.downtime),
                downtime_needed_ms: prediction
                    .downtime_needed_ms
                    .filter(|_| prediction.converges != Converges::Yes),
                when_stuck: inputs.policy.when_stuck.to_string(),
                throttle_max: inputs.policy.throttle_max,
                timeout_s: inputs.policy.time_max.map(|most| most.as_secs()),
                max_rounds: inputs.policy.rounds_max,
                max_bandwidth_bps: facts.max_bandwidth_bps,
                level: costs.level,
                mapped: facts.is_mapped,
            },
            measured: Measured {
                link: Link {
                    goodput_bps: to_u64(facts.link.rate.mean * 8.0),
                    rtt_min_ms: facts.link.rtt_min.as_secs_f64() * 1e3,
                    lost_share: facts.link.lost_share,
                },
                guest: Guest {
                    pages_total: facts.pages_total,
                    zero_share: seen(costs.zero_share),
                    held_share: seen(costs.same_share),
                    referred_share: seen(costs.referred_share),
                    content_share: seen(costs.content_share),
                    bytes_per_content_page: seen(per_content_page(inputs)),
                    hot_pages: seen(dirtying.hot).map(to_u64),
                    dirty_pages_per_s: seen(dirtying.pages_per_s),
                    working_set_pages: seen(dirtying.working_set).map(to_u64),
                    qemu_dirty_bytes_per_s: facts.qemu_dirty_bytes_per_s,
                },
                target: Target {
                    qemu: (!facts.said.qemu.is_empty()).then(|| facts.said.qemu.clone()),
                    known_pages: facts.said.known_pages,
                },
            },
            learned_moves: inputs.learned.moves,
            assumptions: assumptions(facts, inputs, prediction),
        }
    }
}

fn per_content_page(inputs: &Inputs) -> f64 {
    if inputs.costs.content_share <= 0.0 {
        return 0.0;
    }
    inputs.costs.bytes_per_page / inputs.costs.content_share
}

fn assumptions(facts: &Facts, inputs: &Inputs, prediction: &Prediction) -> Vec<String> {
    let mut said = vec!["link and guest go on as in the seconds of this look".to_owned()];
    if let Some(reason) = &facts.unseen {
        said.push(format!(
            "guest memory could not be looked at ({reason}): taken to be half in use, packing to a half"
        ));
    } else {
        said.push("the part of memory that was looked at stands for all of it".to_owned());
    }
    if !facts.was_running {
        said.push("the guest is paused, and stays paused".to_owned());
    }
    if facts.said.qemu.is_empty() {
        said.push(
            "the target will have the source's machine: it only answers probes now".to_owned(),
        );
    }
    if inputs.load > BUSY {
        said.push(format!(
            "this host stays as busy as it is: {:.1} programs want each of its cores",
            inputs.load
        ));
    }
    match inputs.learned.moves {
        0 => said.push(
            "no earlier move to learn from (three with a plan before them are needed)".into(),
        ),
        moves => said.push(format!("corrected by {moves} earlier moves")),
    }
    let needed = prediction.downtime_needed_ms;
    match (prediction.converges, needed) {
        (Converges::Yes, _) => {}
        (Converges::Unsure, Some(needed)) => said.push(format!(
            "the guest dirties memory nearly as fast as fits into the downtime: --downtime {needed} would be sure"
        )),
        (Converges::No, Some(needed)) => said.push(format!(
            "the guest dirties memory faster than fits into the downtime: --downtime {needed} would do"
        )),
        (Converges::Unsure | Converges::No, None) => said.push(
            "the guest dirties memory as fast as the link takes it, or faster: no --downtime alone would do".into(),
        ),
    }
    said
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = &self.measured.guest;
        let gib = to_f64(guest.pages_total) * 4096.0 / f64::from(1 << 30);
        writeln!(f, "Moving {} ({gib:.1} GiB) to {}", self.vm, self.peer)?;
        writeln!(f)?;
        let at_least = match self.ends {
            Ending::Open => "more than ",
            Ending::Arrives
            | Ending::Throttled
            | Ending::Forced
            | Ending::PostCopy
            | Ending::Stays => "",
        };
        writeln!(f, "  time         {at_least}{}", seconds(self.total_ms))?;
        writeln!(
            f,
            "  downtime     {} to {} ms (asked: at most {})",
            self.downtime_ms.low, self.downtime_ms.high, self.settings.downtime_ms
        )?;
        writeln!(f, "  on the link  {}", megabytes(self.wire_bytes))?;
        let converges = match self.converges {
            Converges::Yes => "yes",
            Converges::No => "no",
            Converges::Unsure => "not sure",
        };
        writeln!(
            f,
            "  converges    {converges}, about {} rounds",
            self.rounds
        )?;
        self.show_end(f)?;
        writeln!(f)?;
        let link = &self.measured.link;
        writeln!(
            f,
            "  link         {:.1} Mbit/s of pages, round trip {:.1} ms, {:.2} % lost",
            to_f64(link.goodput_bps) / 1e6,
            link.rtt_min_ms,
            link.lost_share * 100.0
        )?;
        self.show_guest(f)?;
        let qemu = self.measured.target.qemu.as_deref();
        match qemu {
            Some(version) => write!(f, "  target       QEMU {version}")?,
            None => write!(f, "  target       answers probes alone")?,
        }
        match self.measured.target.known_pages {
            0 => writeln!(f)?,
            pages => writeln!(f, ", knows {pages} pages of disk images")?,
        }
        let mapped = if self.settings.mapped {
            "RAM read where QEMU shares it"
        } else {
            "RAM through QEMU's stream"
        };
        writeln!(
            f,
            "  settings     zstd level {}, {mapped}",
            self.settings.level
        )?;
        writeln!(f)?;
        writeln!(f, "Assumed:")?;
        for (nth, said) in self.assumptions.iter().enumerate() {
            let end = if nth + 1 < self.assumptions.len() {
                "\n"
            } else {
                ""
            };
            write!(f, "  - {said}{end}")?;
        }
        Ok(())
    }
}

impl Document {
    /// What the rule of the move makes of it.
    fn show_end(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self.ends {
            Ending::Arrives => "as asked".to_owned(),
            Ending::Throttled => format!(
                "as asked, with the guest's processors slowed by {} % before the stop",
                self.throttle_percent
            ),
            Ending::Forced => "after a longer stop than asked".to_owned(),
            Ending::PostCopy => "at the target before all pages are there".to_owned(),
            Ending::Stays => "here: the move is given up".to_owned(),
            Ending::Open => {
                "not while the guest writes like this: give --timeout, or another --when-stuck"
                    .to_owned()
            }
        };
        writeln!(f, "  ends         {end}")
    }

    fn show_guest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = &self.measured.guest;
        let percent = |share: Option<f64>| share.unwrap_or(0.0) * 100.0;
        if guest.zero_share.is_none() {
            return writeln!(f, "  guest        memory not looked at");
        }
        writeln!(
            f,
            "  guest        {:.0} % empty, {:.0} % at the target, {:.0} % to send at {:.0} bytes a page",
            percent(guest.zero_share),
            percent(guest.held_share),
            percent(guest.content_share),
            guest.bytes_per_content_page.unwrap_or(0.0)
        )?;
        let per_s = guest.dirty_pages_per_s.unwrap_or(0.0);
        let set_mib = to_f64(guest.working_set_pages.unwrap_or(0)) / 256.0;
        writeln!(
            f,
            "               dirties {per_s:.0} pages/s ({:.1} MiB/s) in about {set_mib:.0} MiB, {} all the time",
            per_s / 256.0,
            guest.hot_pages.unwrap_or(0)
        )
    }
}

fn seconds(range: Range) -> String {
    let s = |ms: u64| to_f64(ms) / 1e3;
    if range.high < 10_000 {
        format!("{:.1} to {:.1} s", s(range.low), s(range.high))
    } else {
        format!("{:.0} to {:.0} s", s(range.low), s(range.high))
    }
}

fn megabytes(range: Range) -> String {
    let mb = |bytes: u64| to_f64(bytes) / 1e6;
    if range.high < 10_000_000 {
        format!("{:.1} to {:.1} MB", mb(range.low), mb(range.high))
    } else {
        format!("{:.0} to {:.0} MB", mb(range.low), mb(range.high))
    }
}
