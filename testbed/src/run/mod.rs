//! Runs of a scenario: every arm and repeat from the same saved state, each in a lab of its own.

mod before;
mod beside;
mod cpu;
mod figures;
mod fly;
mod migration;
mod second;
mod watch;

use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde_json::json;

use crate::arm::{Arm, Asked};
use crate::guest::{Image, State};
use crate::lab::{Lab, LabOptions};
use crate::progress::Progress;
use crate::report::{Document, Folder, MigrationRun, Outcome, Pair};
use crate::scenario::Scenario;
use crate::stores::Stores;
use crate::wan::LinkJson;

/// What `testbed run` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Arms; the scenario's own when empty.
    pub arms: Vec<String>,
    /// Runs of each arm.
    pub repeat: u32,
    /// Leave each lab's files behind.
    pub keep: bool,
    /// Another length of the guest's stay at the client, in seconds.
    pub stay: Option<u32>,
    /// Another downtime than the scenario's, in milliseconds.
    pub downtime_ms: Option<u64>,
    /// Another QEMU than the scenario's.
    pub qemu: Option<PathBuf>,
    /// Words for the product's `send`, after those of scenario and arm.
    pub send_flags: Vec<String>,
    /// The product writes down what it sees and decides on the way.
    pub trace: bool,
    /// The product predicts the move before it starts.
    pub plan: bool,
    /// Where results go; runs that are finished there are taken over.
    pub folder: Folder,
}

/// Runs a scenario of kind `migration` and writes its report.
///
/// # Errors
/// When the lab itself does not work. An arm that fails is a result, not an error.
pub fn migration(
    scenario: &Scenario,
    options: &Options,
    progress: &Progress,
) -> anyhow::Result<Document<MigrationRun>> {
    let arms = asked_arms(scenario, options)?;
    let asked = asked(scenario, options);
    let folder = options.folder.part(&scenario.name)?;
    let image = Image::ready(progress)?;
    let (machine, past) = (&scenario.machine, &scenario.past);
    let state = State::after(&image, machine, past, progress)?;
    let of_product = arms.iter().any(|arm| matches!(arm, Arm::Scaleaway { .. }));
    let stores = match past.stay {
        Some(_) if of_product => {
            let left = State::after(&image, machine, &past.before_stay(), progress)?;
            Some(Stores::ready(&image, machine, &left, progress)?)
        }
        _ => None,
    };
    let mut document = Document {
        schema: 1,
        kind: "migration".to_owned(),
        scenario: scenario.name.clone(),
        link: link_json(scenario)?,
        guest: guest_json(scenario)?,
        asked: serde_json::to_value(&asked)?,
        // Arms that an earlier call ran and this one does not.
        runs: folder.others(&arms)?,
    };
    if let Ok(earlier) = folder.document::<MigrationRun>() {
        ensure!(
            (&earlier.guest, &earlier.link) == (&document.guest, &document.link),
            "{} holds runs of another guest or link",
            folder.path().display()
        );
        ensure!(
            earlier.asked.is_null() || earlier.asked == document.asked,
            "{} holds runs that were asked for {}",
            folder.path().display(),
            earlier.asked
        );
    }
    let all = arms.len() * usize::try_from(options.repeat)?;
    let mut place = 0;
    for repeat in 1..=options.repeat {
        for arm in &arms {
            let name = arm.to_string();
            place += 1;
            if let Some(run) = folder.kept::<MigrationRun>(&name, repeat) {
                progress.note(&format!("{name} {repeat}: taken over"));
                document.runs.push(run);
                continue;
            }
            let setting = migration::Setting {
                scenario,
                arm,
                asked: &asked,
                repeat,
                place: (place, all),
                image: &image,
                state: &state,
                stores: stores.as_ref(),
                logs: folder.logs(&name, repeat),
                keep: options.keep,
            };
            let run = migration::run(&setting, progress)
                .with_context(|| format!("{name}, run {repeat}"))?;
            folder.keep(&name, repeat, &run)?;
            progress.note(&said(&run));
            document.runs.push(run);
            folder.finish(&document)?;
        }
    }
    folder.finish(&document)?;
    Ok(document)
}

fn asked_arms(scenario: &Scenario, options: &Options) -> anyhow::Result<Vec<Arm>> {
    if options.arms.is_empty() {
        return Ok(scenario.arms.clone());
    }
    options.arms.iter().map(|name| name.parse()).collect()
}

fn asked(scenario: &Scenario, options: &Options) -> Asked {
    let send_flags = [&scenario.send_flags[..], &options.send_flags[..]].concat();
    Asked {
        downtime_ms: options.downtime_ms.unwrap_or(scenario.downtime_ms),
        send_flags,
        plan: options.plan,
        // How two share a link is read in their traces.
        trace: options.trace || scenario.pair,
    }
}

/// Whether every run ended with the guest at the target and nothing wrong in it.
pub fn all_well(document: &Document<MigrationRun>) -> bool {
    document.runs.iter().all(|run| {
        let well = match run.outcome {
            Outcome::Arrived | Outcome::Forced | Outcome::Stayed => true,
            Outcome::NotArrived | Outcome::Failed => false,
        };
        well && run.self_check_errors == Some(0)
            && run.counter_resets.unwrap_or(0) == 0
            && run.pair.as_ref().is_none_or(is_well)
    })
}

/// The same of a second guest.
fn is_well(pair: &Pair) -> bool {
    pair.outcome == Outcome::Arrived && pair.self_check_errors == Some(0)
}

/// A lab on the scenario's link.
fn lab(scenario: &Scenario, seed: u64) -> anyhow::Result<Lab> {
    let mut options = LabOptions::new(scenario.link)?;
    options.seed = seed;
    let product = crate::product::program();
    if let Some(folder) = product.as_ref().ok().and_then(|path| path.parent()) {
        options.visible.push(folder.to_owned());
    }
    options.visible.push(crate::guest::cache_folder());
    Lab::start(&options)
}

fn link_json(scenario: &Scenario) -> anyhow::Result<serde_json::Value> {
    let mut value = serde_json::to_value(LinkJson::from(&scenario.link))?;
    value["name"] = json!(scenario.link_name);
    Ok(value)
}

/// The machine, and what the guest and the target went through.
fn guest_json(scenario: &Scenario) -> anyhow::Result<serde_json::Value> {
    let mut value = serde_json::to_value(&scenario.machine)?;
    value["past"] = serde_json::to_value(&scenario.past)?;
    value["known"] = json!(scenario.known);
    Ok(value)
}

fn said(run: &MigrationRun) -> String {
    let seconds = run
        .total_ms
        .map_or("-".to_owned(), |total| format!("{:.1}", total / 1000.0));
    let down = run
        .downtime_ms
        .map_or("-".to_owned(), |down| format!("{down:.0}"));
    let reason = run
        .reason
        .as_deref()
        .map_or(String::new(), |reason| format!(" ({reason})"));
    format!(
        "{} {}: {:?}{reason}, {seconds} s, {down} ms of downtime",
        run.arm, run.repeat, run.outcome
    )
}
