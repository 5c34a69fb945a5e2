//! One migration in one lab, from the saved state to the guest's check of itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::before::{Before, Wire};
use super::cpu::CpuWatch;
use super::figures;
use super::fly::{Ended, beside_second, fly};
use super::second::Second;
use super::watch::{Seen, Watch};
use crate::arm::{Arm, Asked, Flight, Sides, TRACE};
use crate::clock;
use crate::guest::{Files, GUEST_MAC, Guest, Image, Network, Place, State};
use crate::lab::Lab;
use crate::netns::PRIVATE;
use crate::overlay::{Overlay, TAP};
use crate::progress::Progress;
use crate::report::{MigrationRun, Outcome, Trace};
use crate::scenario::Scenario;
use crate::sparse;
use crate::stores::Stores;

/// The guest is observed for so long after it runs at the target.
/// A ping counts as lost after two seconds, so this is more.
const AFTER: Duration = Duration::from_secs(4);

/// What a run is made of.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) arm: &'a Arm,
    pub(super) asked: &'a Asked,
    pub(super) repeat: u32,
    /// Which run of how many.
    pub(super) place: (usize, usize),
    pub(super) image: &'a Image,
    pub(super) state: &'a State,
    /// What both ends of the product have kept of the guest.
    pub(super) stores: Option<&'a Stores>,
    /// Where the run's logs are kept.
    pub(super) logs: PathBuf,
    pub(super) keep: bool,
}

/// Runs it. An arm that fails is a result; a lab that fails is an error.
pub(super) fn run(setting: &Setting<'_>, progress: &Progress) -> anyhow::Result<MigrationRun> {
    let (number, all) = setting.place;
    let name = format!("[{number}/{all}] {} {}", setting.arm, setting.repeat);
    progress.step(&format!("{name}: starting the lab"));
    let mut lab = super::lab(setting.scenario, u64::from(setting.repeat))?;
    let result = in_lab(setting, &lab, &name, progress);
    if setting.keep || result.is_err() {
        keep_logs(&lab, &setting.logs)?;
    }
    if setting.keep {
        progress.note(&format!("kept: {}", lab.keep_files()?.display()));
    }
    lab.check()?;
    result
}

fn in_lab(
    setting: &Setting<'_>,
    lab: &Lab,
    name: &str,
    progress: &Progress,
) -> anyhow::Result<MigrationRun> {
    let program = std::env::current_exe().context("where is this program?")?;
    let overlay = Overlay::join(lab, GUEST_MAC, &program)?;
    progress.step(&format!("{name}: loading the guest's saved state"));
    let (source, target) = guests(setting, lab)?;
    let second = match setting.scenario.pair {
        true => Some(Second::ready(setting, lab, &files(setting))?),
        false => None,
    };
    let control = source.control()?;
    let watch = Watch::start(lab, &program)?;
    let disk = disk();
    let sides = Sides {
        lab,
        way: setting.scenario.way(),
        slot: 0,
        asked: setting.asked,
        stores: setting.stores,
        known: setting.scenario.known.then_some(disk.as_path()),
        source: &source,
        target: &target,
        hook: Some(overlay.hook()),
    };
    let mut flight = Flight::prepare(setting.arm, &sides);
    progress.step(&format!("{name}: watching the guest before the start"));
    let mut cpu = CpuWatch::new(source.pid());
    let mut before = Before::observe(setting.scenario, lab, &program)?;
    progress.step(&format!("{name}: moving"));
    let (mut ended, other) = beside_second(second.as_ref(), || match &mut flight {
        Ok(flight) => fly(setting, flight, &sides, &mut cpu, &|said| {
            progress.detail(&format!("{name}: {said}"))
        }),
        // An arm that cannot even begin is a result too.
        Err(error) => Ended::failed(clock::epoch_us(), error),
    })?;
    let wire = before.wire(lab)?;
    let samples = control.samples();
    drop(control);
    progress.step(&format!("{name}: the guest checks all its memory"));
    let self_check_errors = match (ended.outcome, ended.resumed_us) {
        (Outcome::Stayed, _) => self_check(&source, &mut ended),
        (_, Some(_)) => self_check(&target, &mut ended),
        (_, None) => None,
    };
    let until_us = clock::epoch_us();
    let watched = watch.stop()?;
    let beside = before.felt(&ended, wire.to_us)?;
    drop(flight);
    let trace = trace(setting, &sides, &mut ended);
    let second = second.as_ref().zip(other);
    let pair = second.map(|(second, ended)| second.figures(ended, &sides));
    keep_logs(lab, &setting.logs)?;

    let stopped_us = ended.stopped_us.unwrap_or(until_us);
    let seen = watched.seen(before.from_us, ended.started_us, stopped_us, until_us);
    let share = figures::writes_share(&samples, before.from_us, ended.started_us, stopped_us);
    let after = ended.resumed_us.zip(ended.completed_us);
    let guest_writes_share_after = after.and_then(|(resumed_us, completed_us)| {
        let before = (before.from_us, ended.started_us);
        watched.writes_share_after(before, resumed_us, completed_us)
    });
    Ok(MigrationRun {
        guest_writes_share: share,
        guest_writes_share_after,
        self_check_errors,
        beside,
        pair,
        source_cpu: Some(cpu.figures(rustix::param::clock_ticks_per_second())),
        trace,
        ..figures_of(setting, ended, seen, &wire)
    })
}

/// What the product wrote down, if it was asked to. The whole of it is kept with the run's logs.
fn trace(setting: &Setting<'_>, sides: &Sides<'_>, ended: &mut Ended) -> Option<Trace> {
    if !setting.asked.trace || !matches!(setting.arm, Arm::Scaleaway { .. }) {
        return None;
    }
    match Trace::read(&sides.trace_file()) {
        Ok(trace) => Some(trace.thinned()),
        Err(error) => {
            ended.reason.get_or_insert(format!("no trace: {error:#}"));
            None
        }
    }
}

/// Wrong pages that the guest finds in its whole memory, a while after it arrived.
pub(super) fn self_check(guest: &Guest, ended: &mut Ended) -> Option<u64> {
    clock::pause(AFTER);
    match guest.control().and_then(|control| control.verify()) {
        Ok(verified) => Some(verified.errors),
        Err(error) => {
            ended.outcome = Outcome::Failed;
            ended.reason = Some(format!("the guest is silent afterwards: {error:#}"));
            None
        }
    }
}

/// What follows from the events, what the user saw and what crossed the link.
fn figures_of(setting: &Setting<'_>, ended: Ended, seen: Seen, wire: &Wire) -> MigrationRun {
    let after = |from_us, at: Option<u64>| at.and_then(|at| figures::between_ms(from_us, at));
    let resumed_ms = after(ended.started_us, ended.resumed_us);
    let completed_ms = after(ended.started_us, ended.completed_us);
    let downtime_ms = ended
        .stopped_us
        .and_then(|from_us| after(from_us, ended.resumed_us));
    let late =
        downtime_ms > Some(Duration::from_millis(setting.asked.downtime_ms).as_secs_f64() * 1e3);
    let forced = ended.outcome == Outcome::Arrived && late && setting.asked.may_force(setting.arm);
    let outcome = if forced {
        Outcome::Forced
    } else {
        ended.outcome
    };
    MigrationRun {
        arm: setting.arm.to_string(),
        repeat: setting.repeat,
        outcome,
        reason: ended.reason,
        total_ms: completed_ms.or(resumed_ms),
        downtime_ms,
        resumed_ms: completed_ms.and(resumed_ms),
        wire_bytes: Some(wire.bytes),
        wire_bytes_background: wire.background_bytes,
        wire_bytes_delivered: Some(wire.delivered_bytes),
        queue_drops: Some(wire.queue_drops),
        ping_outage_ms: seen.longest_gap_ms,
        outage_ms: seen.outage_ms,
        ping_late: seen.late,
        ping_lost: seen.lost,
        ping_added_p95_ms: seen.added_p95_ms,
        guest_writes_share: None,
        guest_writes_share_after: None,
        counter_resets: seen.resets,
        self_check_errors: None,
        beside: None,
        pair: None,
        source_cpu: None,
        trace: None,
        report: ended.reports.source,
        target_report: ended.reports.target,
    }
}

/// The guest's disk as its host sees it.
fn disk() -> PathBuf {
    Path::new(PRIVATE).join("disk.img")
}

/// Kernel, initrd and the disk of the host's own.
fn files(setting: &Setting<'_>) -> Files {
    Files {
        disk: disk(),
        ..setting.image.into()
    }
}

/// The warmed-up guest at its source and a QEMU that waits for it at the target.
fn guests(setting: &Setting<'_>, lab: &Lab) -> anyhow::Result<(Guest, Guest)> {
    let machine = &setting.scenario.machine;
    let folder = Path::new(PRIVATE).join("guest");
    let [(source, _), (target, _)] = setting.scenario.way().ends(lab);
    for host in [source, target] {
        if machine.debian {
            sparse::copy(&setting.image.disk(), &host.outside(&disk()))?;
        }
    }
    let files = files(setting);
    let network = Network::Tap(TAP.to_owned());
    let target = Guest::incoming(Place::Host(target), &files, machine, &network, &folder)?;
    let source = State::restore(
        setting.state.file(),
        Place::Host(source),
        &files,
        machine,
        &network,
        &folder,
    )?;
    Ok((source, target))
}

/// Copies the small files of both hosts: logs, consoles, reports.
fn keep_logs(lab: &Lab, to: &Path) -> anyhow::Result<()> {
    for host in [&lab.cloud, &lab.client, &lab.user] {
        let role = host.name().rsplit('-').next().unwrap_or("host");
        for folder in ["", "guest", "second", "ssh"] {
            let from = host.outside(&Path::new(PRIVATE).join(folder));
            let Ok(entries) = fs::read_dir(&from) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".log")
                    || name == "log"
                    || name.ends_with(".json")
                    || name.ends_with(TRACE)
                {
                    fs::create_dir_all(to)?;
                    let part = if folder.is_empty() { "" } else { "-" };
                    fs::copy(
                        entry.path(),
                        to.join(format!("{role}-{folder}{part}{name}")),
                    )?;
                }
            }
        }
    }
    Ok(())
}
