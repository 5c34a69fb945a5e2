//! One migration in one lab, from the saved state to the guest's check of itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use super::beside::{self, Flowing};
use super::cpu::CpuWatch;
use super::figures;
use super::watch::{Seen, Watch};
use crate::arm::{Arm, Asked, Flight, Sides, TRACE};
use crate::clock;
use crate::guest::{Files, GUEST_MAC, Guest, Image, Network, Place, State};
use crate::lab::Lab;
use crate::netns::PRIVATE;
use crate::overlay::{Overlay, TAP};
use crate::progress::Progress;
use crate::report::{Beside, MigrationRun, Outcome, Trace};
use crate::scenario::Scenario;
use crate::sparse;
use crate::stores::Stores;
use crate::wan::WanCounters;

/// The guest is observed for so long before the start.
const BEFORE: Duration = Duration::from_secs(4);
/// And so long after it runs at the target.
/// A ping counts as lost after two seconds, so this is more.
const AFTER: Duration = Duration::from_secs(4);
/// Between two looks at a migration on its way. RESUME is stamped by QEMU, not by this.
const LOOK: Duration = Duration::from_millis(250);
/// How long a guest that stays is watched.
const STAY: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(180);
/// For a link that needs two minutes for the guest's first pass alone.
const LIMIT_SLOW_LINK: Duration = Duration::from_secs(600);
const SLOW_LINK: &str = "dsl-20m";
/// From the target's RESUME to the end of the source's part, where no pages are left to move.
const FINISH_MIN: Duration = Duration::from_secs(20);

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

/// How a flight ended.
struct Ended {
    outcome: Outcome,
    reason: Option<String>,
    started_us: u64,
    stopped_us: Option<u64>,
    resumed_us: Option<u64>,
    /// After post-copy: when the last page was there.
    completed_us: Option<u64>,
    report: Option<Value>,
}

impl Ended {
    /// Nothing has arrived yet.
    fn open(started_us: u64) -> Self {
        Self {
            outcome: Outcome::NotArrived,
            reason: None,
            started_us,
            stopped_us: None,
            resumed_us: None,
            completed_us: None,
            report: None,
        }
    }

    fn failed(started_us: u64, error: &anyhow::Error) -> Self {
        let reason = Some(format!("{error:#}"));
        Self {
            outcome: Outcome::Failed,
            reason,
            ..Self::open(started_us)
        }
    }
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
    let control = source.control()?;
    let watch = Watch::start(lab, &program)?;
    let disk = disk();
    let sides = Sides {
        lab,
        way: setting.scenario.way(),
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
    let mut before = Before::observe(setting, lab, &program)?;

    let wan_before = lab.wan.counters()?;
    progress.step(&format!("{name}: moving"));
    let idle_us = clock::epoch_us() - before.from_us;
    let mut ended = match &mut flight {
        Ok(flight) => fly(setting, flight, &sides, &mut cpu, &|said| {
            progress.detail(&format!("{name}: {said}"))
        }),
        // An arm that cannot even begin is a result too.
        Err(error) => Ended::failed(clock::epoch_us(), error),
    };
    let wan_after = lab.wan.counters()?;
    let moved_us = clock::epoch_us() - ended.started_us;
    let idle_bytes = wan_before.wire_bytes() - before.wan.wire_bytes();
    let background = u128::from(idle_bytes) * u128::from(moved_us) / u128::from(idle_us.max(1));
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
    let beside = before.felt(&ended, moved_us)?;
    drop(flight);
    let trace = trace(setting, &sides, &mut ended);
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
        wire_bytes: Some(wan_after.wire_bytes() - wan_before.wire_bytes()),
        wire_bytes_background: u64::try_from(background).ok(),
        wire_bytes_delivered: Some(delivered(&wan_after) - delivered(&wan_before)),
        queue_drops: Some(wan_after.queue_drops() - wan_before.queue_drops()),
        guest_writes_share: share,
        guest_writes_share_after,
        self_check_errors,
        beside,
        source_cpu: Some(cpu.figures(rustix::param::clock_ticks_per_second())),
        trace,
        ..figures_of(setting, ended, seen)
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

/// The time before the start, when nothing moves yet.
struct Before {
    from_us: u64,
    wan: WanCounters,
    /// Other people's flows, and since when they had found their rate.
    flows: Option<(Flowing, u64)>,
}

impl Before {
    /// Begins whatever goes on beside the migration, and watches for a while.
    fn observe(setting: &Setting<'_>, lab: &Lab, program: &Path) -> anyhow::Result<Self> {
        let from_us = clock::epoch_us();
        let wan = lab.wan.counters()?;
        let flows = match &setting.scenario.beside {
            Some(asked) => {
                let flowing = Flowing::start(lab, asked, program)?;
                clock::pause(beside::SETTLE);
                let alone_from_us = clock::epoch_us();
                clock::pause(beside::ALONE);
                Some((flowing, alone_from_us))
            }
            None => {
                clock::pause(BEFORE);
                None
            }
        };
        Ok(Self {
            from_us,
            wan,
            flows,
        })
    }

    /// Ends the flows; what they felt of the migration.
    fn felt(&mut self, ended: &Ended, moved_us: u64) -> anyhow::Result<Option<Beside>> {
        let Some((flowing, alone_from_us)) = self.flows.take() else {
            return Ok(None);
        };
        let arrived_us = ended.completed_us.or(ended.resumed_us);
        let to_us = arrived_us.unwrap_or(ended.started_us + moved_us);
        let flown = flowing.stop()?;
        let (alone, during) = ((alone_from_us, ended.started_us), (ended.started_us, to_us));
        Ok(Some(flown.figures(alone, during)))
    }
}

/// Wrong pages that the guest finds in its whole memory, a while after it arrived.
fn self_check(guest: &Guest, ended: &mut Ended) -> Option<u64> {
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

/// What follows from the events and from what the user saw.
fn figures_of(setting: &Setting<'_>, ended: Ended, seen: Seen) -> MigrationRun {
    let after = |from_us, at: Option<u64>| at.and_then(|at| figures::between_ms(from_us, at));
    let resumed_ms = after(ended.started_us, ended.resumed_us);
    let completed_ms = after(ended.started_us, ended.completed_us);
    MigrationRun {
        arm: setting.arm.to_string(),
        repeat: setting.repeat,
        outcome: ended.outcome,
        reason: ended.reason,
        total_ms: completed_ms.or(resumed_ms),
        downtime_ms: ended
            .stopped_us
            .and_then(|from_us| after(from_us, ended.resumed_us)),
        resumed_ms: completed_ms.and(resumed_ms),
        wire_bytes: None,
        wire_bytes_background: None,
        wire_bytes_delivered: None,
        queue_drops: None,
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
        source_cpu: None,
        trace: None,
        report: ended.report,
    }
}

fn delivered(counters: &WanCounters) -> u64 {
    counters.wire_bytes_delivered()
}

/// The guest's disk as its host sees it.
fn disk() -> PathBuf {
    Path::new(PRIVATE).join("disk.img")
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
    let files = Files {
        disk: disk(),
        ..setting.image.into()
    };
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

/// From the start command to RESUME, failure or the limit.
fn fly(
    setting: &Setting<'_>,
    flight: &mut Flight,
    sides: &Sides<'_>,
    cpu: &mut CpuWatch,
    say: &dyn Fn(&str),
) -> Ended {
    let limit = if setting.scenario.link_name == SLOW_LINK {
        LIMIT_SLOW_LINK
    } else {
        LIMIT
    };
    let started_us = clock::epoch_us();
    let began = clock::now();
    let mut ended = Ended::open(started_us);
    cpu.start();
    if setting.arm == &Arm::None {
        clock::pause(STAY);
        ended.outcome = Outcome::Stayed;
        return ended;
    }
    if let Err(error) = flight.start(sides) {
        return Ended::failed(started_us, &error);
    }
    let resumed = loop {
        if let Some(event) = sides
            .target
            .monitor()
            .wait_event("RESUME", started_us, LOOK)
        {
            break Some(event);
        }
        cpu.look();
        match flight.check(sides) {
            Ok(state) => {
                let seconds = began.elapsed().as_secs();
                say(&format!("{seconds} s, {state}"));
            }
            Err(error) => {
                // It may have arrived between the two looks.
                let last = sides
                    .target
                    .monitor()
                    .wait_event("RESUME", started_us, LOOK);
                if last.is_none() {
                    ended.outcome = Outcome::Failed;
                    ended.reason = Some(format!("{error:#}"));
                }
                break last;
            }
        }
        if began.elapsed() > limit {
            ended.reason = Some(format!("{} s are over", limit.as_secs()));
            break None;
        }
    };
    let Some(resumed) = resumed else { return ended };
    ended.outcome = Outcome::Arrived;
    ended.resumed_us = Some(resumed.at_us);
    let stop = sides
        .source
        .monitor()
        .wait_event("STOP", started_us, Duration::ZERO);
    ended.stopped_us = stop.map(|event| event.at_us);
    // After post-copy the last pages are still to come.
    let left = limit.saturating_sub(began.elapsed()).max(FINISH_MIN);
    match flight.finish(sides, left) {
        Ok(report) => {
            let moved_after = report
                .as_ref()
                .is_some_and(|report| report["post_copy"].is_object());
            ended.report = report;
            ended.completed_us =
                (setting.arm.is_qemu_postcopy() || moved_after).then(clock::epoch_us);
        }
        Err(error) => ended.reason = Some(format!("it arrived, but: {error:#}")),
    }
    ended
}

/// Copies the small files of both hosts: logs, consoles, reports.
fn keep_logs(lab: &Lab, to: &Path) -> anyhow::Result<()> {
    for host in [&lab.cloud, &lab.client, &lab.user] {
        let role = host.name().rsplit('-').next().unwrap_or("host");
        for folder in ["", "guest", "ssh"] {
            let from = host.outside(&Path::new(PRIVATE).join(folder));
            let Ok(entries) = fs::read_dir(&from) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".log")
                    || name == "log"
                    || name.ends_with(".json")
                    || name == TRACE
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
