//! All results of a folder as one HTML page that needs nothing else: tables and charts.

mod chart;
mod draw;
mod section;
mod timeline;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use super::{Document, Folder, MigrationRun};
use crate::link_run::LinkRun;

const STYLE: &str = include_str!("style.css");

/// The results of one scenario.
#[derive(Clone, Debug)]
pub enum Results {
    /// Of a guest's move.
    Migration(Document<MigrationRun>),
    /// Of transports alone.
    Link(Document<LinkRun>),
}

impl Results {
    /// Those of a scenario's folder.
    ///
    /// # Errors
    /// When they are not there or broken.
    pub fn of(folder: &Folder) -> anyhow::Result<Self> {
        let any: Document<Value> = folder.document()?;
        Ok(match any.kind.as_str() {
            "link" => Self::Link(folder.document()?),
            _ => Self::Migration(folder.document()?),
        })
    }
}

/// Writes the page of a call's folder into it; its path.
///
/// # Errors
/// When it cannot be written.
pub fn write(folder: &Path, results: &[Results]) -> anyhow::Result<PathBuf> {
    let path = folder.join("report.html");
    fs::write(&path, page(results)).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The page.
pub fn page(results: &[Results]) -> String {
    let sections: Vec<String> = results
        .iter()
        .map(|results| match results {
            Results::Migration(document) => section::migration(document),
            Results::Link(document) => section::link(document),
        })
        .collect();
    format!(
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width, initial-scale=1'>\
         <title>Scaleaway lab</title><style>\n{STYLE}</style></head>\n<body><main>\
         <h1>Scaleaway lab</h1><p>Medians of each arm's runs; the thin line on a bar goes from the \
         least to the greatest. Times are by the events of both QEMUs, bytes are IP bytes offered to \
         the emulated link in both directions.</p>\n{}{}</main></body></html>\n",
        section::overview(results),
        sections.concat()
    )
}

/// A figure to be read. Small amounts get a digit more: they would all be 0.0 or 0.1.
fn number(value: f64, digits: usize) -> String {
    match value < 10.0 && digits > 0 {
        true => format!("{value:.2}"),
        false => format!("{value:.digits$}"),
    }
}

/// Text that is safe between tags and in attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '\'' => safe.push_str("&#39;"),
            '"' => safe.push_str("&quot;"),
            _ => safe.push(letter),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::super::{Beside, Point, Trace, example};
    use super::*;

    /// A page with a move, flows beside it, its trace and a link: every tag that is opened is closed, nothing is fetched, a
    /// slowed guest is marked.
    #[test]
    fn whole_page() {
        let trace = Trace {
            points: vec![Point {
                t_ms: 5.0,
                rate_bps: Some(9e7),
                ..Point::default()
            }],
            events: Vec::new(),
        };
        let document = Document {
            schema: 1,
            kind: "migration".to_owned(),
            scenario: "dirty8/wan-100m".to_owned(),
            link: serde_json::json!({ "name": "wan-100m", "rate_bps": 100_000_000 }),
            guest: serde_json::json!({ "memory_mib": 1024 }),
            asked: serde_json::json!({ "downtime_ms": 300, "send_flags": [] }),
            runs: vec![
                example(),
                MigrationRun {
                    arm: "scaleaway".to_owned(),
                    beside: Some(Beside {
                        tcp_share_of_alone: Some(0.75),
                        ..Beside::default()
                    }),
                    trace: Some(trace),
                    ..example()
                },
            ],
        };
        let link = Document {
            kind: "link".to_owned(),
            runs: vec![LinkRun {
                arm: "tcp-bbr".to_owned(),
                goodput_bps: Some(9e7),
                ..LinkRun::default()
            }],
            ..Document {
                schema: 1,
                kind: String::new(),
                scenario: "link/wan-100m".to_owned(),
                link: document.link.clone(),
                guest: Value::Null,
                asked: Value::Null,
                runs: Vec::new(),
            }
        };
        let page = page(&[Results::Migration(document), Results::Link(link)]);
        for tag in ["section", "table", "tr", "td", "th", "svg", "div", "small"] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        for fetched in ["src=", "http", "url(", "@import"] {
            assert!(!page.contains(fetched), "{fetched}");
        }
        for said in [
            "slowed",
            "tcp-bbr",
            "share of its rate before",
            "delivered, and applied",
        ] {
            assert!(page.contains(said), "{said}");
        }
    }
}
