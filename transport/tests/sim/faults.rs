//! What goes wrong, and what each side notices of it.

use std::time::Duration;

use transport::session::{Hold, source, target};
use transport::wire::Role;

use crate::journal::Step;
use crate::net::Way;
use crate::plan::{Fault, Moment};
use crate::source_qemu::Migration;
use crate::world::{Event, Life, World};

impl World {
    /// Strikes what waits for this action of this side.
    pub(crate) fn at_action(&mut self, role: Role, name: &str, before: bool) {
        let mut due = Vec::new();
        self.plan.faults.retain(|(moment, fault)| {
            let strikes = match moment {
                Moment::Before(of, action) => before && *of == role && *action == name,
                Moment::After(of, action, _) => !before && *of == role && *action == name,
                Moment::Time(_) => false,
            };
            if strikes {
                due.push((*moment, *fault));
            }
            !strikes
        });
        for (moment, fault) in due {
            match moment {
                Moment::After(_, _, delay) if !delay.is_zero() => {
                    self.after(delay, Event::Fault(fault));
                }
                Moment::After(..) | Moment::Before(..) | Moment::Time(_) => self.strike(fault),
            }
        }
    }

    pub(crate) fn strike(&mut self, fault: Fault) {
        self.note(format_args!("fault {fault:?}"));
        match fault {
            Fault::Cut => self.cut(),
            Fault::Crash(Role::Source) if self.source.life == Life::Live => {
                self.source.life = Life::Crashed;
                self.source.has_peer = false;
                self.net.silence(Way::ToTarget);
                self.source_gone();
                self.notice_loss(Role::Target);
            }
            Fault::Crash(Role::Target) if self.target.life == Life::Live => {
                self.target.life = Life::Crashed;
                self.target.has_peer = false;
                self.net.silence(Way::ToSource);
                self.target_gone();
                self.notice_loss(Role::Source);
            }
            Fault::Crash(_) => {}
            Fault::Pause { run_after } => self.pause(run_after),
            Fault::Continue => {
                if let Ok(Some(said)) = self.source_qemu.cont() {
                    self.source_said(said);
                }
            }
            // The agent refuses an abort by its operator when it comes too late.
            Fault::Abort(Role::Source) if !self.source.machine.is_past_intent() => {
                self.source_input(source::Input::Abort("the operator".into()));
            }
            // A signal is heard at any time.
            Fault::Abort(Role::Target) => {
                self.target_input(target::Input::Abort("the operator".into()));
            }
            Fault::Abort(Role::Source) => {}
            Fault::QemuDies(role) => self.kill_qemu(role),
            Fault::RunByOther => {
                let is_ours = self.target.machine.owns_guest();
                let is_loaded = self.target_qemu.is_alive && self.target_qemu.is_loaded;
                // A loaded guest would truly run: that is two guests by the operator's own hand.
                if !is_ours && !is_loaded {
                    self.target_input(target::Input::VmResumed);
                }
            }
            Fault::RecheckFails => self.recheck_fails = true,
            Fault::FlipBit => self.target_qemu.flip_bit(),
            Fault::Slow(role, delay) => self.slow[usize::from(role == Role::Target)] = delay,
            Fault::CommitAgain => {
                if let Some(commit) = self.target.last_commit.clone() {
                    self.target_input(target::Input::Frame(commit));
                }
            }
        }
    }

    fn cut(&mut self) {
        self.net.cut(self.now);
        self.notice_loss(Role::Source);
        self.notice_loss(Role::Target);
    }

    /// QUIC notices silence when its idle time-out has passed.
    fn notice_loss(&mut self, role: Role) {
        let connection = self.net.connection();
        let delay = self.idle_timeout();
        self.after(delay, Event::PeerLost { role, connection });
    }

    pub(crate) fn peer_lost(&mut self, role: Role, detail: &str) {
        let detail = detail.to_owned();
        match role {
            Role::Source => {
                if std::mem::take(&mut self.source.has_peer) {
                    self.source.wants_peer = self.source.life == Life::Resolving;
                    self.source_input(source::Input::PeerLost(detail));
                }
            }
            Role::Target => {
                if std::mem::take(&mut self.target.has_peer) {
                    self.target.wants_peer = self.target.life == Life::Resolving;
                    self.target_input(target::Input::PeerLost(detail));
                }
            }
        }
    }

    fn pause(&mut self, run_after: Option<Duration>) {
        if let Some(said) = self.source_qemu.stop() {
            self.paused_by_operator = true;
            // QEMU's own stop and the operator's look alike there.
            self.run_state_unknown |= self.plan.hold == Hold::Starvation || self.plan.relay;
            self.source_said(said);
            if let Some(delay) = run_after {
                self.after(delay, Event::RunAgain);
            }
        }
    }

    /// The operator's `cont` at the source: QEMU refuses it once the end of the stream is out.
    pub(crate) fn run_again(&mut self) {
        let may_run = match self.source_qemu.migration {
            Migration::NotMigrating | Migration::Iterating => self.source_qemu.is_alive,
            Migration::AwaitShut | Migration::Completing | Migration::Postmigrate => false,
        };
        if may_run && let Some(said) = self.source_qemu.run() {
            self.paused_by_operator = false;
            self.source_said(said);
        }
    }

    fn kill_qemu(&mut self, role: Role) {
        match role {
            Role::Source if self.source_qemu.is_alive => {
                self.source_qemu.quit();
                self.qemu_killed[0] = true;
                let gone = source::Input::VmGone("killed".into());
                self.after(Duration::from_millis(1), Event::Source(gone));
            }
            Role::Target if self.target_qemu.is_alive => {
                self.target_qemu.quit();
                self.qemu_killed[1] = true;
                let gone = target::Input::VmFailed("target QEMU is gone".into());
                self.after(Duration::from_millis(1), Event::Target(gone));
            }
            Role::Source | Role::Target => {}
        }
    }

    /// Brings both sides together when both want to and the link is there.
    pub(crate) fn arrange_meeting(&mut self) {
        let both = self.source.wants_peer && self.target.wants_peer;
        if both && !self.meeting && !self.net.is_cut() {
            self.meeting = true;
            let delay = 4 * self.plan.link.delay + Duration::from_millis(5);
            self.after(delay, Event::Meet);
        }
    }

    pub(crate) fn meet(&mut self) {
        self.meeting = false;
        if !(self.source.wants_peer && self.target.wants_peer) || self.net.is_cut() {
            return;
        }
        self.note(format_args!("they meet again"));
        self.net.connect();
        self.source.reader = transport::wire::FrameReader::new();
        self.target.reader = transport::wire::FrameReader::new();
        (self.source.wants_peer, self.target.wants_peer) = (false, false);
        (self.source.has_peer, self.target.has_peer) = (true, true);
        match self.source.life {
            Life::Live => self.source_input(source::Input::Reconnected),
            Life::Resolving => self.ask(),
            Life::Crashed | Life::Ended(_) | Life::Closed => {}
        }
    }

    /// The order of S1, seen from the target's door.
    pub(crate) fn check_commit(&self) {
        let intent = self.journals[0].has(|step| matches!(step, Step::Intent { .. }));
        assert!(intent, "Commit left before the intent was durable");
        assert!(!self.source_qemu.is_running, "Commit while the source runs");
        let may_resume = matches!(
            self.source_qemu.migration,
            Migration::Iterating | Migration::AwaitShut | Migration::Completing
        );
        assert!(
            !may_resume || self.qemu_killed[0],
            "Commit while source QEMU may resume by itself"
        );
    }
}

/// Name of a variant.
pub(crate) fn variant(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.split(|letter: char| !letter.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_owned()
}
