//! A second guest that moves at the same time over the same link: its own QEMUs, ports and, for the
//! product, its own installation at both ends. It has no network; nobody uses it.

use std::path::Path;

use anyhow::ensure;

use super::cpu::CpuWatch;
use super::figures;
use super::fly::{Ended, fly};
use super::migration::{Setting, self_check};
use crate::arm::{Arm, Flight, Sides};
use crate::guest::{Files, Guest, Network, Place, State};
use crate::lab::Lab;
use crate::netns::PRIVATE;
use crate::report::{Outcome, Pair, Trace};

/// Both QEMUs of the second guest.
pub(super) struct Second<'a> {
    setting: &'a Setting<'a>,
    lab: &'a Lab,
    source: Guest,
    target: Guest,
}

impl<'a> Second<'a> {
    /// Starts them.
    pub(super) fn ready(
        setting: &'a Setting<'_>,
        lab: &'a Lab,
        files: &Files,
    ) -> anyhow::Result<Self> {
        let through_ssh = matches!(
            setting.arm,
            Arm::Qemu {
                through_ssh: true,
                ..
            }
        );
        ensure!(!through_ssh, "two tunnels at once: the lab has one");
        let machine = &setting.scenario.machine;
        let folder = Path::new(PRIVATE).join("second");
        let network = Network::Nothing;
        let [(source, _), (target, _)] = setting.scenario.way().ends(lab);
        let target = Guest::incoming(Place::Host(target), files, machine, &network, &folder)?;
        let source = State::restore(
            setting.state.file(),
            Place::Host(source),
            files,
            machine,
            &network,
            &folder,
        )?;
        Ok(Self {
            setting,
            lab,
            source,
            target,
        })
    }

    fn sides(&self) -> Sides<'_> {
        Sides {
            lab: self.lab,
            way: self.setting.scenario.way(),
            slot: 1,
            asked: self.setting.asked,
            source: &self.source,
            target: &self.target,
            stores: None,
            known: None,
            hook: None,
        }
    }

    /// Everything before the start command.
    pub(super) fn prepare(&self) -> anyhow::Result<Flight> {
        Flight::prepare(self.setting.arm, &self.sides())
    }

    /// Moves it.
    pub(super) fn fly(&self, flight: &mut Flight) -> Ended {
        let mut cpu = CpuWatch::new(self.source.pid());
        fly(self.setting, flight, &self.sides(), &mut cpu, &|_| {})
    }

    /// Its figures beside the first's.
    pub(super) fn figures(&self, mut ended: Ended, first: &Sides<'_>) -> Pair {
        let after = |from_us, at: Option<u64>| at.and_then(|at| figures::between_ms(from_us, at));
        let arrived = ended.outcome == Outcome::Arrived;
        let self_check_errors = arrived
            .then(|| self_check(&self.target, &mut ended))
            .flatten();
        let moved = |sides: &Sides<'_>| Trace::read(&sides.trace_file()).ok();
        let traces = moved(first).zip(moved(&self.sides()));
        let bytes = traces.and_then(|(one, other)| figures::moved_together(&one, &other));
        Pair {
            outcome: ended.outcome,
            reason: ended.reason,
            total_ms: after(ended.started_us, ended.resumed_us),
            downtime_ms: ended
                .stopped_us
                .and_then(|from_us| after(from_us, ended.resumed_us)),
            self_check_errors,
            moved_together_bytes: bytes,
            jain: bytes.and_then(figures::jain),
        }
    }
}
