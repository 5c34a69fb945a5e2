//! The loop of virtual time: the next thing that happens, then everything that takes no time.

use std::time::Duration;

use transport::session::{source, target};
use transport::wire::Role;

use crate::net::{Arrived, CONTROL, Way};
use crate::source_qemu::STEP;
use crate::world::{Event, GUEST_STEP, Life, OPERATOR_INTERVAL, SOURCE_TICK, TARGET_TICK, World};

/// No session takes longer, whatever happens to it.
const DEADLINE: Duration = Duration::from_secs(1200);
/// What was started before the end shows its effect within this.
const AFTERMATH: Duration = Duration::from_secs(3);

impl World {
    /// Runs the session and what the operators do about it to the end.
    pub(crate) fn run(&mut self) {
        let mut until = None;
        loop {
            self.drain();
            self.check_always();
            if until.is_none() && self.is_over() {
                until = Some(self.now + AFTERMATH);
            }
            let Some(next) = self.next_moment() else {
                panic!("nothing is left to happen");
            };
            if until.is_some_and(|until| next > until) {
                break;
            }
            assert!(
                next <= DEADLINE,
                "no end within {DEADLINE:?} of virtual time"
            );
            self.now = self.now.max(next);
            self.happen();
        }
        self.check_end();
    }

    fn is_over(&self) -> bool {
        self.unsolvable || (self.source.life.is_over() && self.target.life.is_over())
    }

    fn next_moment(&self) -> Option<Duration> {
        let timeouts = [
            (self.source.life == Life::Live).then(|| self.source.machine.poll_timeout()),
            (self.target.life == Life::Live).then(|| self.target.machine.poll_timeout()),
        ];
        let timeouts = timeouts
            .into_iter()
            .flatten()
            .flatten()
            .map(|at| at.duration_since(self.base));
        let event = self.events.keys().next().map(|(at, _)| *at);
        event
            .into_iter()
            .chain(self.net.next_delivery())
            .chain(timeouts)
            .min()
    }

    /// One thing of this moment.
    fn happen(&mut self) {
        if let Some((way, arrived)) = self.net.poll(self.now) {
            return self.arrive(way, arrived);
        }
        let is_due = self
            .events
            .keys()
            .next()
            .is_some_and(|(at, _)| *at <= self.now);
        if is_due {
            if let Some((_, event)) = self.events.pop_first() {
                self.event(event);
            }
            return;
        }
        let now = self.instant();
        if self.source.life == Life::Live && self.source.machine.poll_timeout() <= Some(now) {
            self.source_input(source::Input::Timer);
        }
        if self.target.life == Life::Live && self.target.machine.poll_timeout() <= Some(now) {
            self.target_input(target::Input::Timer);
        }
    }

    /// Does everything that has no duration.
    fn drain(&mut self) {
        loop {
            let mut moved = self.source_drain();
            moved |= self.target_drain();
            if !moved {
                break;
            }
        }
        self.pump_lanes();
        self.pump_relay();
        self.net.pump(self.now);
        self.pump_lanes();
        self.pump_relay();
        self.net.pump(self.now);
        self.arrange_meeting();
    }

    fn arrive(&mut self, way: Way, arrived: Arrived) {
        match (way, arrived) {
            (Way::ToTarget, Arrived::Bytes(CONTROL, bytes)) => self.target_control(&bytes),
            (Way::ToTarget, Arrived::Bytes(stream, bytes)) => {
                self.target_lane(stream - 1, &bytes);
            }
            (Way::ToSource, Arrived::Bytes(_, bytes)) => self.source_control(&bytes),
            (Way::ToTarget, Arrived::Closed) => self.peer_lost(Role::Target, "closed"),
            (Way::ToSource, Arrived::Closed) => self.peer_lost(Role::Source, "closed"),
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::GuestStep => {
                self.guest_step();
                self.after(GUEST_STEP, Event::GuestStep);
            }
            Event::QemuStep if self.relay_is_full() => self.after(STEP, Event::QemuStep),
            Event::QemuStep => {
                for (delay, said) in self.source_qemu.step(self.now) {
                    if delay.is_zero() {
                        self.source_said(said);
                    } else {
                        self.after(delay, Event::Said(said));
                    }
                }
                self.after(STEP, Event::QemuStep);
            }
            Event::SourceTick => {
                self.source_tick();
                self.after(SOURCE_TICK, Event::SourceTick);
            }
            Event::TargetTick => {
                self.target_tick();
                self.after(TARGET_TICK, Event::TargetTick);
            }
            Event::Operator => {
                self.operator();
                self.after(OPERATOR_INTERVAL, Event::Operator);
            }
            Event::Source(input) => self.source_input(input),
            Event::Target(input) => self.target_input(input),
            Event::Said(said) => self.source_said(said),
            Event::PassDrained { pages, era } => self.pass_drained(pages, era),
            Event::Command => self.run_command(),
            Event::Shut => self.shut_given(),
            Event::CaptureClosed => self.capture_closed(),
            Event::TargetLoaded => self.target_loaded(),
            Event::TargetCont => self.target_cont(),
            Event::Journaled(role, step) => self.journaled(role, step),
            Event::PeerLost { role, connection } => {
                if connection == self.net.connection() {
                    self.peer_lost(role, "idle for too long");
                }
            }
            Event::Meet => self.meet(),
            Event::RunAgain => self.run_again(),
            Event::AskAgain => self.ask(),
            Event::Fault(fault) => self.strike(fault),
        }
    }
}
