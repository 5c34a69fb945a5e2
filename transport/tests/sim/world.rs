//! Virtual time: one queue of events, both ends, both QEMUs, both journals.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use testbed_link::Random;
use transport::session::{Outcome, source, target};
use transport::wire::{AttemptId, Role};

use crate::content;
use crate::journal::{Journal, Step};
use crate::net::Net;
use crate::plan::{Fault, Moment, Plan};
use crate::source_end::SourceEnd;
use crate::source_qemu::{Said, SourceQemu};
use crate::target_end::TargetEnd;
use crate::target_qemu::TargetQemu;

pub(crate) const ATTEMPT: AttemptId = AttemptId([0xa7; 16]);
pub(crate) const SOURCE_INCARNATION: u64 = 0x51;
pub(crate) const TARGET_INCARNATION: u64 = 0x52;

/// The guest writes in steps of this length.
pub(crate) const GUEST_STEP: Duration = Duration::from_millis(5);
pub(crate) const SOURCE_TICK: Duration = Duration::from_millis(50);
pub(crate) const TARGET_TICK: Duration = Duration::from_millis(20);
/// How often a person looks after what has not ended by itself.
pub(crate) const OPERATOR_INTERVAL: Duration = Duration::from_secs(20);
/// What happens at a moment.
#[derive(Debug)]
pub(crate) enum Event {
    GuestStep,
    QemuStep,
    SourceTick,
    TargetTick,
    Operator,
    Source(source::Input),
    Target(target::Input),
    /// Source QEMU's monitor or stream.
    Said(Said),
    /// A pass is over, as the capture of this era saw it.
    PassDrained {
        pages: u64,
        era: u32,
    },
    /// The monitor is free for the next command.
    Command,
    Shut,
    CaptureClosed,
    TargetLoaded,
    TargetCont,
    Journaled(Role, Step),
    PeerLost {
        role: Role,
        connection: u32,
    },
    Meet,
    RunAgain,
    AskAgain,
    Fault(Fault),
}

/// Where an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Life {
    Live,
    Crashed,
    Ended(Outcome),
    /// `resolve` is at work in its place.
    Resolving,
    /// Settled by `resolve`.
    Closed,
}

impl Life {
    /// Whether nobody has anything left to do here.
    pub(crate) fn is_over(&self) -> bool {
        match self {
            Life::Closed | Life::Ended(Outcome::Arrived | Outcome::Stayed { .. }) => true,
            Life::Live | Life::Crashed | Life::Resolving | Life::Ended(Outcome::Doubt { .. }) => {
                false
            }
        }
    }
}

/// Everything.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) now: Duration,
    pub(crate) base: Instant,
    pub(crate) random: Random,
    pub(crate) events: BTreeMap<(Duration, u64), Event>,
    nth_event: u64,
    pub(crate) net: Net,
    pub(crate) source: SourceEnd,
    pub(crate) target: TargetEnd,
    pub(crate) source_qemu: SourceQemu,
    pub(crate) target_qemu: TargetQemu,
    pub(crate) journals: [Journal; 2],
    pub(crate) meeting: bool,
    pub(crate) operator_visits: u32,
    /// Only a dead QEMU could say where the guest is (or was).
    pub(crate) unsolvable: bool,
    guest_debt: u32,
    next_version: u32,
    /// What was done, for a failing seed.
    pub(crate) trace: Vec<String>,
    pub(crate) stopped_at: Option<Duration>,
    pub(crate) arrived_at: Option<Duration>,
    pub(crate) recheck_fails: bool,
    /// What journal writes take longer, at the source, at the target.
    pub(crate) slow: [Duration; 2],
    pub(crate) paused_by_operator: bool,
    /// QEMU was killed at the source, at the target.
    pub(crate) qemu_killed: [bool; 2],
    /// A guest that the operator paused may have been run: its pause is not known to who runs it.
    pub(crate) run_state_unknown: bool,
}

impl World {
    pub(crate) fn new(plan: Plan) -> World {
        #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
        let base = Instant::now();
        let layout = content::layout(plan.ram_pages);
        let pages = u32::try_from(layout.pages_total()).expect("a small guest");
        let mut random = Random::new(plan.seed);
        let memory = (0..pages).map(|_| u32::from(random.chance(0.7))).collect();
        let mut journals = [Journal::new(Role::Source), Journal::new(Role::Target)];
        if let Some((role, from)) = plan.journal_fails {
            journals[usize::from(role == Role::Target)].fails_from = Some(from);
        }
        let mut world = World {
            now: Duration::ZERO,
            base,
            net: Net::new(plan.link, plan.seed),
            source: SourceEnd::new(base, &plan),
            target: TargetEnd::new(base, &plan),
            source_qemu: SourceQemu::new(memory, plan.was_running, plan.hold),
            target_qemu: TargetQemu::new(layout, plan.cont),
            random,
            events: BTreeMap::new(),
            nth_event: 0,
            journals,
            meeting: false,
            operator_visits: 0,
            unsolvable: false,
            guest_debt: 0,
            next_version: 2,
            trace: Vec::new(),
            stopped_at: None,
            arrived_at: None,
            recheck_fails: false,
            slow: [Duration::ZERO; 2],
            paused_by_operator: false,
            qemu_killed: [false; 2],
            run_state_unknown: false,
            plan,
        };
        world.after(GUEST_STEP, Event::GuestStep);
        world.after(SOURCE_TICK, Event::SourceTick);
        world.after(TARGET_TICK, Event::TargetTick);
        world.after(OPERATOR_INTERVAL, Event::Operator);
        for (moment, fault) in world.plan.faults.clone() {
            if let Moment::Time(at) = moment {
                world.after(at, Event::Fault(fault));
            }
        }
        world
    }

    pub(crate) fn guest_step(&mut self) {
        if !self.source_qemu.is_running || self.plan.working_set == 0 {
            return;
        }
        self.guest_debt += self.plan.writes_per_s;
        // GUEST_STEP is a 200th of a second.
        for _ in 0..self.guest_debt / 200 {
            let page = self.random.up_to(u64::from(self.plan.working_set - 1));
            let page = usize::try_from(page).expect("a small guest");
            self.source_qemu.write(page, self.next_version);
            self.next_version += 1;
        }
        self.guest_debt %= 200;
    }

    /// Lets something happen so much later.
    pub(crate) fn after(&mut self, delay: Duration, event: Event) {
        self.nth_event += 1;
        self.events
            .insert((self.now + delay, self.nth_event), event);
    }

    /// A random span for work that takes about so many milliseconds.
    pub(crate) fn about_ms(&mut self, ms: u64) -> Duration {
        Duration::from_micros(ms * 300 + self.random.up_to(ms * 1200))
    }

    pub(crate) fn instant(&self) -> Instant {
        self.base + self.now
    }

    pub(crate) fn journal(&mut self, role: Role) -> &mut Journal {
        &mut self.journals[usize::from(role == Role::Target)]
    }

    /// Keeps a line of what happened.
    pub(crate) fn note(&mut self, what: std::fmt::Arguments<'_>) {
        let mut text = format!("{:>10.3} ms  {what}", self.now.as_secs_f64() * 1e3);
        text.truncate(160);
        self.trace.push(text);
    }

    /// Writes a step; it is durable, or known not to be, a little later.
    pub(crate) fn write_journal(&mut self, role: Role, step: Step) {
        let delay = self.about_ms(4) + self.slow[usize::from(role == Role::Target)];
        self.after(delay, Event::Journaled(role, step));
    }

    pub(crate) fn journaled(&mut self, role: Role, step: Step) {
        let (is_live, is_crashed) = match role {
            Role::Source => (
                self.source.life == Life::Live,
                self.source.life == Life::Crashed,
            ),
            Role::Target => (
                self.target.life == Life::Live,
                self.target.life == Life::Crashed,
            ),
        };
        // A write of a process that was killed meanwhile may have reached the disk.
        if is_crashed && self.random.chance(0.5) {
            return;
        }
        let written = self.journal(role).append(step);
        self.note(format_args!("journal {role:?} {step:?} {written:?}"));
        if is_live {
            match role {
                Role::Source => self.source_input(source::Input::Journaled(written)),
                Role::Target => self.target_input(target::Input::Journaled(written)),
            }
        }
    }
}
