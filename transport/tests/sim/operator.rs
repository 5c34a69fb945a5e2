//! What people do about an attempt that did not end by itself: mend the link, run `resolve` on
//! either host. The steps are those of the product's `settling`, the rules those of `settle`.

use std::time::Duration;

use transport::session::{Next, Outcome, Side, settle, target};
use transport::wire::{Frame, Role, Verdict};

use crate::journal::Step;
use crate::world::{ATTEMPT, Event, Life, World};

/// Visits after which a doubt counts as one that no message will end.
const VISITS_MAX: u32 = 25;

impl World {
    /// Looks after whatever has stopped.
    pub(crate) fn operator(&mut self) {
        self.operator_visits += 1;
        self.net.mend();
        match &self.source.life {
            Life::Crashed | Life::Ended(Outcome::Doubt { .. }) => self.resolve_source(),
            Life::Live | Life::Ended(_) | Life::Resolving | Life::Closed => {}
        }
        let asks = self.source.life == Life::Resolving
            || (self.source.life == Life::Live && self.source.machine.is_past_intent());
        match (&self.target.life, asks) {
            (Life::Crashed | Life::Ended(_), true) if !self.source.has_peer => {
                self.resolve_target();
            }
            (Life::Crashed, false) if self.source.life != Life::Live => self.resolve_target_alone(),
            (Life::Resolving, false) => self.target.life = Life::Closed,
            (Life::Live, false) if self.source.life != Life::Live => self.interrupt_target(),
            _ => {}
        }
        if self.operator_visits > VISITS_MAX {
            self.unsolvable = true;
        }
    }

    fn resolve_source(&mut self) {
        self.journals[0].repair();
        match self.journals[0].latest() {
            Step::Intent { .. } => {
                self.source.life = Life::Resolving;
                self.source.wants_peer = true;
            }
            Step::SettledThere => {
                self.source_qemu.quit();
                self.source.life = Life::Closed;
            }
            Step::Started | Step::SettledHere => {
                self.keep_source();
                self.source.life = Life::Closed;
            }
            Step::Committed { .. } | Step::Refused | Step::NeverRan | Step::Running => {
                unreachable!("a target's step")
            }
        }
    }

    fn resolve_target(&mut self) {
        self.journals[1].repair();
        match self.journals[1].latest() {
            Step::Started => {
                self.target_qemu.quit();
                self.append(Role::Target, Step::Refused);
            }
            Step::Committed { paused } => {
                if self.target_qemu.is_alive {
                    self.run_target(paused);
                    self.append(Role::Target, Step::Running);
                }
            }
            Step::Intent { .. } | Step::SettledThere => unreachable!("a source's step"),
            // The agent may have been killed between its word and QEMU's end.
            Step::Refused | Step::NeverRan => self.target_qemu.quit(),
            Step::Running | Step::SettledHere => {}
        }
        self.target.life = Life::Resolving;
        self.target.wants_peer = true;
    }

    fn resolve_target_alone(&mut self) {
        self.journals[1].repair();
        match self.journals[1].latest() {
            Step::Started | Step::Refused | Step::NeverRan => {
                self.target_qemu.quit();
                self.append(Role::Target, Step::Refused);
            }
            Step::Committed { paused } => {
                if self.target_qemu.is_alive {
                    self.run_target(paused);
                    self.append(Role::Target, Step::SettledHere);
                }
            }
            Step::Running | Step::SettledHere => self.append(Role::Target, Step::SettledHere),
            Step::Intent { .. } | Step::SettledThere => unreachable!("a source's step"),
        }
        self.target.life = Life::Closed;
    }

    /// The source has closed its journal: the waiting target may stop waiting.
    fn interrupt_target(&mut self) {
        self.target_input(target::Input::Abort("interrupted".into()));
        self.target_drain();
    }

    fn run_target(&mut self, paused: bool) {
        if !paused && self.target_qemu.cont().is_ok() {
            self.arrived_at.get_or_insert(self.now);
        }
    }

    fn keep_source(&mut self) {
        let paused = matches!(self.journals[0].latest(), Step::Intent { paused: true });
        if self.source_qemu.is_alive && !paused {
            // Also a guest that the operator had paused: the journal does not say so before intent.
            self.run_state_unknown |= !self.source_qemu.is_running;
            self.source_qemu.cont().ok();
        }
        self.append(Role::Source, Step::SettledHere);
    }

    fn append(&mut self, role: Role, step: Step) {
        self.note(format_args!("resolve {role:?} {step:?}"));
        let written = self.journal(role).append(step);
        assert_eq!(written, Ok(()), "the disk was repaired");
    }

    /// The source's `resolve` asks.
    pub(crate) fn ask(&mut self) {
        if self.source.life == Life::Resolving {
            let verdict = self.journals[0].verdict();
            self.source_send(&Frame::Ask {
                attempt: ATTEMPT,
                verdict,
                epoch: 0,
            });
        }
    }

    pub(crate) fn source_resolver(&mut self, frame: &Frame) {
        let Frame::Answer { verdict, epoch, .. } = frame else {
            return;
        };
        let mine = Side {
            role: Role::Source,
            verdict: self.journals[0].verdict(),
            epoch: 0,
        };
        self.note(format_args!("source's resolve hears {verdict:?}"));
        match settle(mine, *verdict, *epoch) {
            Next::KeepHere | Next::RunHere => self.keep_source(),
            Next::LeaveThere => {
                self.source_qemu.quit();
                self.append(Role::Source, Step::SettledThere);
            }
            Next::PauseHere => unreachable!("no epoch is raised here"),
            Next::AskAgain => return self.after(Duration::from_secs(1), Event::AskAgain),
        }
        self.source_send(&Frame::Settled { attempt: ATTEMPT });
        self.source.life = Life::Closed;
    }

    pub(crate) fn target_resolver(&mut self, frame: &Frame) {
        if let Frame::Ask { .. } = frame {
            let verdict = self.journals[1].verdict();
            self.target_send(&Frame::Answer {
                attempt: ATTEMPT,
                verdict,
                epoch: 0,
            });
        }
        if let Frame::Settled { .. } = frame {
            if self.journals[1].verdict() == Verdict::Running {
                self.append(Role::Target, Step::SettledHere);
            }
            self.target_send(&Frame::Settled { attempt: ATTEMPT });
            self.target.life = Life::Closed;
        }
    }
}
