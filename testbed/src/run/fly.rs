//! The guest's way, from the start command to its RESUME at the target.

use std::time::Duration;

use super::cpu::CpuWatch;
use super::migration::Setting;
use super::second::Second;
use crate::arm::{Arm, Flight, Reports, Sides};
use crate::clock;
use crate::report::Outcome;

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

/// How a flight ended.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    pub(super) reason: Option<String>,
    pub(super) started_us: u64,
    pub(super) stopped_us: Option<u64>,
    pub(super) resumed_us: Option<u64>,
    /// After post-copy: when the last page was there.
    pub(super) completed_us: Option<u64>,
    pub(super) reports: Reports,
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
            reports: Reports::default(),
        }
    }

    pub(super) fn failed(started_us: u64, error: &anyhow::Error) -> Self {
        let reason = Some(format!("{error:#}"));
        Self {
            outcome: Outcome::Failed,
            reason,
            ..Self::open(started_us)
        }
    }
}

/// Moves the guest, and a second one at the same time if there is one.
pub(super) fn beside_second(
    second: Option<&Second<'_>>,
    fly: impl FnOnce() -> Ended,
) -> anyhow::Result<(Ended, Option<Ended>)> {
    let Some(second) = second else {
        return Ok((fly(), None));
    };
    let mut flight = second.prepare()?;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| second.fly(&mut flight));
        let ended = fly();
        let other = other.join();
        let other = other.map_err(|_| anyhow::anyhow!("moving the second guest failed"))?;
        Ok((ended, Some(other)))
    })
}

/// From the start command to RESUME, failure or the limit.
pub(super) fn fly(
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
        Ok(reports) => {
            let is_post_copy = setting.arm.is_qemu_postcopy() || reports.has_post_copy();
            ended.completed_us = is_post_copy.then(clock::epoch_us);
            ended.reports = reports;
        }
        Err(error) => ended.reason = Some(format!("it arrived, but: {error:#}")),
    }
    ended
}
