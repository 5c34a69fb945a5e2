//! The parts of the page: the overview, and one part for each scenario.

use serde_json::Value;

use super::chart::{self, Bar, Stack};
use super::timeline;
use super::{Results, escape, number};
use crate::link_run::LinkRun;
use crate::report::{
    Beside, Document, Encoded, FigureOf, MigrationRun, NONE, OURS, REFERENCE, Spread, Summary,
    judged, summaries,
};

/// What is shown of every arm, in this order.
struct Figure {
    name: &'static str,
    /// The value is divided by this to be shown.
    unit: f64,
    digits: usize,
    of: FigureOf,
}

const FIGURES: [Figure; 4] = [
    Figure {
        name: "total time, s",
        unit: 1e3,
        digits: 1,
        of: |summary| summary.total_ms,
    },
    Figure {
        name: "on the wire, MB",
        unit: 1e6,
        digits: 1,
        of: |summary| summary.wire_bytes,
    },
    Figure {
        name: "downtime, ms",
        unit: 1.0,
        digits: 0,
        of: |summary| summary.downtime_ms,
    },
    Figure {
        name: "outage, ms",
        unit: 1.0,
        digits: 0,
        of: |summary| summary.outage_ms,
    },
];

/// The product beside the arm that it is compared with, a line for each scenario that has both.
pub(super) fn overview(results: &[Results]) -> String {
    let mut rows = String::new();
    for results in results {
        let Results::Migration(document) = results else {
            continue;
        };
        let all = summaries(&document.runs);
        let named = |name: &str| all.iter().find(|summary| summary.arm == name);
        let (Some(ours), Some(reference)) = (named(OURS), named(REFERENCE)) else {
            continue;
        };
        let anchor = anchor(&document.scenario);
        rows.push_str(&format!(
            "<tr><td><a href='#{anchor}'>{}</a></td>",
            escape(&document.scenario)
        ));
        for figure in &FIGURES {
            let value = (figure.of)(ours).map(|value| shown(value.median, figure));
            let value = value.unwrap_or("-".to_owned());
            let ratio = ratio(ours.ratio(reference, figure.of));
            rows.push_str(&format!("<td>{value}</td><td>{ratio}</td>"));
        }
        rows.push_str("</tr>\n");
    }
    if rows.is_empty() {
        return String::new();
    }
    let names: String = FIGURES
        .iter()
        .map(|figure| format!("<th>{}</th><th>ratio</th>", figure.name))
        .collect();
    format!(
        "<section><h2>Overview</h2><p>{OURS}, and each figure over that of {REFERENCE} on the same \
         guest and link.</p><div class='scroll'><table><tr><th>scenario</th>{names}</tr>\n{rows}\
         </table></div></section>\n"
    )
}

/// One scenario: table, bars, and what crossed by encoding.
pub(super) fn migration(document: &Document<MigrationRun>) -> String {
    let all = summaries(&document.runs);
    // A guest that stayed has no figures of a move.
    let moved: Vec<Summary> = all
        .iter()
        .filter(|summary| summary.arm != NONE)
        .cloned()
        .collect();
    let mut charts: String = FIGURES
        .iter()
        .map(|figure| {
            let bars: Vec<Bar> = moved.iter().map(|summary| bar(summary, figure)).collect();
            chart::bars(figure.name, figure.digits, &bars)
        })
        .collect();
    let stacks = |of: fn(&Encoded) -> f64, left_out: &str| -> Vec<Stack> {
        all.iter()
            .filter_map(|summary| stack(summary, of, left_out))
            .collect()
    };
    let bytes = stacks(|part| part.bytes / 1e6, "");
    if !bytes.is_empty() {
        charts.push_str(&chart::stacked("sent by encoding, MB", 1, &bytes));
        // Most of a guest is zero, beside which nothing else would be seen.
        let pages = stacks(|part| part.pages / 1e3, "zero");
        charts.push_str(&chart::stacked(
            "pages by encoding, thousands, without zero",
            1,
            &pages,
        ));
    }
    charts.push_str(&beside(&all, &document.runs));
    format!(
        "<section id='{}'><h2>{}</h2><p>{}</p><div class='scroll'><table>{}</table></div>{}\
         <div class='charts'>{charts}</div>{}</section>\n",
        anchor(&document.scenario),
        escape(&document.scenario),
        escape(&setting(document)),
        rows(&moved),
        notes(&all, &document.runs) + &judgement(document),
        timelines(document),
    )
}

type FlowFigure = fn(&Beside) -> Option<f64>;

/// What other people's flows felt of each arm; empty where there were none.
fn beside(all: &[Summary], runs: &[MigrationRun]) -> String {
    let figures: [(&str, FlowFigure); 5] = [
        ("TCP stream beside it, Mbit/s", |beside| {
            beside.during.tcp_bps.map(|rate| rate / 1e6)
        }),
        ("TCP stream, share of its rate before", |beside| {
            beside.tcp_share_of_alone
        }),
        ("game beside it, one way, 95th percentile, ms", |beside| {
            beside.during.udp_p95_ms
        }),
        ("game, lost, %", |beside| {
            beside.during.udp_lost_share.map(|share| share * 100.0)
        }),
        ("ping beside it, 95th percentile, ms", |beside| {
            beside.during.ping_p95_ms
        }),
    ];
    let mut charts = String::new();
    for (title, of) in figures {
        let bars: Vec<Bar> = all
            .iter()
            .map(|summary| {
                let of_arm = runs.iter().filter(|run| run.arm == summary.arm);
                Bar {
                    label: summary.arm.clone(),
                    class: class(&summary.arm),
                    value: Spread::of(of_arm.filter_map(|run| of(run.beside.as_ref()?))),
                }
            })
            .collect();
        if bars.iter().any(|bar| bar.value.is_some()) {
            charts.push_str(&chart::bars(title, 1, &bars));
        }
    }
    charts
}

/// Whether runs kept to what was asked for.
fn judgement(document: &Document<MigrationRun>) -> String {
    let said = judged(document);
    let lines = said.lines().map(|line| format!("<p>{}</p>", escape(line)));
    lines.collect()
}

/// Each run that has a trace, over time.
fn timelines(document: &Document<MigrationRun>) -> String {
    let asked_ms = document.asked["downtime_ms"].as_f64();
    let mut text = String::new();
    for run in &document.runs {
        let Some(trace) = &run.trace else { continue };
        let title = format!("{} {}", run.arm, run.repeat);
        text.push_str(&format!(
            "<h3>{}</h3>{}",
            escape(&title),
            timeline::chart(&title, trace, asked_ms)
        ));
    }
    if !text.is_empty() {
        text.push_str(
            "<p>Thin lines are the rounds' boundaries; the dashed line across is the downtime that \
             was asked for.</p>",
        );
    }
    text
}

fn rows(all: &[Summary]) -> String {
    let reference = all.iter().find(|summary| summary.arm == REFERENCE);
    let names: String = FIGURES
        .iter()
        .map(|figure| format!("<th>{}</th>", figure.name))
        .collect();
    let mut text = format!("<tr><th>arm</th><th>arrived</th>{names}");
    if reference.is_some() {
        text.push_str("<th>time ratio</th><th>wire ratio</th>");
    }
    text.push_str("</tr>\n");
    for summary in all {
        let class = if summary.arm == OURS {
            " class='ours'"
        } else {
            ""
        };
        let mark = if summary.slowed { " *" } else { "" };
        text.push_str(&format!(
            "<tr{class}><td>{}{mark}</td><td>{} of {}</td>",
            escape(&summary.arm),
            summary.arrived,
            summary.runs
        ));
        for figure in &FIGURES {
            text.push_str(&cell((figure.of)(summary), figure));
        }
        if let Some(reference) = reference {
            for figure in &FIGURES[..2] {
                let ratio = ratio(summary.ratio(reference, figure.of));
                text.push_str(&format!("<td>{ratio}</td>"));
            }
        }
        text.push_str("</tr>\n");
    }
    text
}

fn cell(value: Option<Spread>, figure: &Figure) -> String {
    let Some(value) = value else {
        return "<td>-</td>".to_owned();
    };
    let median = shown(value.median, figure);
    if value.max <= value.min {
        return format!("<td>{median}</td>");
    }
    let (min, max) = (shown(value.min, figure), shown(value.max, figure));
    format!("<td>{median} <small>{min}\u{2013}{max}</small></td>")
}

fn shown(value: f64, figure: &Figure) -> String {
    number(value / figure.unit, figure.digits)
}

fn ratio(ratio: Option<f64>) -> String {
    match ratio {
        Some(ratio) if ratio < 1.0 => format!("<span class='good'>{ratio:.2}</span>"),
        Some(ratio) => format!("<span>{ratio:.2}</span>"),
        None => "-".to_owned(),
    }
}

fn bar(summary: &Summary, figure: &Figure) -> Bar {
    let value = (figure.of)(summary).map(|value| Spread {
        median: value.median / figure.unit,
        min: value.min / figure.unit,
        max: value.max / figure.unit,
    });
    let mark = if summary.slowed { " *" } else { "" };
    Bar {
        label: format!("{}{mark}", summary.arm),
        class: class(&summary.arm),
        value,
    }
}

fn class(arm: &str) -> &'static str {
    match arm {
        OURS => "ours",
        arm if arm.starts_with(OURS) => "less",
        _ => "other",
    }
}

fn stack(summary: &Summary, of: fn(&Encoded) -> f64, left_out: &str) -> Option<Stack> {
    let encoded = summary.encoded.iter();
    let parts: Vec<(String, f64)> = encoded
        .filter(|(name, _)| name.as_str() != left_out)
        .map(|(name, part)| (name.clone(), of(part)))
        .collect();
    (!parts.is_empty()).then(|| Stack {
        label: summary.arm.clone(),
        parts,
    })
}

fn notes(all: &[Summary], runs: &[MigrationRun]) -> String {
    let mut text = String::new();
    if all.iter().any(|summary| summary.slowed) {
        text.push_str(
            "<p>* the guest was slowed: it wrote at less than 0.9 of its rate before, which makes it \
             easier to move.</p>",
        );
    }
    for summary in all.iter().filter(|summary| summary.wrong) {
        text.push_str(&format!(
            "<p class='bad'>{}: the guest was not whole afterwards.</p>",
            escape(&summary.arm)
        ));
    }
    for run in runs {
        if let Some(reason) = &run.reason {
            let line = format!("{} {}: {reason}", run.arm, run.repeat);
            text.push_str(&format!("<p class='bad'>{}</p>", escape(&line)));
        }
    }
    text
}

/// Link and guest in a line.
fn setting<R>(document: &Document<R>) -> String {
    let (link, guest) = (&document.link, &document.guest);
    let mut parts = Vec::new();
    if let Some(rate) = link["rate_bps"].as_f64() {
        parts.push(format!("{:.0} Mbit/s", rate / 1e6));
    }
    if let Some(delay) = link["delay_ms"].as_f64() {
        parts.push(format!("{:.1} ms round trip", delay * 2.0));
    }
    if let Some(share) = link["loss_share"].as_f64().filter(|share| *share > 0.0) {
        parts.push(format!("{:.1} % loss", share * 100.0));
    }
    if let Some(memory) = guest["memory_mib"].as_u64() {
        parts.push(format!("guest of {memory} MiB"));
    }
    if let Some(rate) = guest["load"]["writes_per_s"]
        .as_u64()
        .filter(|rate| *rate > 0)
    {
        parts.push(format!("writes {rate} pages/s"));
    }
    if let [Value::Number(keys), Value::Number(bytes)] =
        guest["redis"].as_array().map_or(&[][..], Vec::as_slice)
    {
        parts.push(format!("redis, {keys} values of {bytes} bytes"));
    }
    if let Some(seconds) = guest["past"]["stay"]["seconds"].as_u64() {
        parts.push(format!("back after {seconds} s"));
    }
    parts.join(" \u{b7} ")
}

/// Transports alone on a link.
pub(super) fn link(document: &Document<LinkRun>) -> String {
    let mut arms: Vec<&str> = Vec::new();
    for run in &document.runs {
        if !arms.contains(&run.arm.as_str()) {
            arms.push(&run.arm);
        }
    }
    let bars = |of: fn(&LinkRun) -> Option<f64>| -> Vec<Bar> {
        let of_arm = |arm: &str| {
            let runs = document.runs.iter().filter(|run| run.arm == arm);
            Bar {
                label: arm.to_owned(),
                class: if arm == OURS { "ours" } else { "other" },
                value: Spread::of(runs.filter_map(of)),
            }
        };
        arms.iter().map(|arm| of_arm(arm)).collect()
    };
    format!(
        "<section id='{}'><h2>{}</h2><p>{}</p><div class='charts'>{}{}</div></section>\n",
        anchor(&document.scenario),
        escape(&document.scenario),
        escape(&setting(document)),
        chart::bars(
            "goodput, Mbit/s",
            1,
            &bars(|run| run.goodput_bps.map(|rate| rate / 1e6))
        ),
        chart::bars(
            "added to a ping, 95th percentile, ms",
            1,
            &bars(|run| run.ping_added_p95_ms)
        ),
    )
}

fn anchor(scenario: &str) -> String {
    escape(&scenario.replace('/', "-"))
}
