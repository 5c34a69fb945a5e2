//! What a seed stands for: guest, link, options and faults.

use std::time::Duration;

use testbed_link::{LinkParams, Random};
use transport::session::Hold;
use transport::wire::{Role, Verify};

use crate::target_qemu::Cont;

/// When a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// So long after the session's begin.
    Time(Duration),
    /// Just before this side does this action for the first time.
    Before(Role, &'static str),
    /// So long after it.
    After(Role, &'static str, Duration),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The link is gone until the operator comes.
    Cut,
    /// The agent is killed.
    Crash(Role),
    /// Source: the operator stops the guest, and may let it run again.
    Pause { run_after: Option<Duration> },
    /// Source: somebody says `cont` to QEMU.
    Continue,
    /// The operator ends the attempt.
    Abort(Role),
    /// QEMU is killed.
    QemuDies(Role),
    /// Somebody runs target QEMU's guest.
    RunByOther,
    /// `paused` and `completed` are not found again before Commit is accepted.
    RecheckFails,
    /// A bit of target memory is wrong.
    FlipBit,
    /// Journal writes of this side take so long.
    Slow(Role, Duration),
    /// The last Commit arrives again.
    CommitAgain,
}

/// One session.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) hold: Hold,
    pub(crate) verify: Verify,
    /// QEMU's stream has something unknown before its first page.
    pub(crate) relay: bool,
    pub(crate) ram_pages: u32,
    pub(crate) link: LinkParams,
    /// Pages that the guest writes per second, of these many first ones.
    pub(crate) writes_per_s: u32,
    pub(crate) working_set: u32,
    pub(crate) was_running: bool,
    pub(crate) stay_paused: bool,
    pub(crate) downtime: Duration,
    pub(crate) load_fails: bool,
    pub(crate) cont: Cont,
    /// Journal writes of a side that fail, from this one on.
    pub(crate) journal_fails: Option<(Role, usize)>,
    pub(crate) faults: Vec<(Moment, Fault)>,
}

/// Actions by name at which faults of seeds strike, in the order of a session.
pub(crate) const SOURCE_ACTIONS: [&str; 18] = [
    "StartCapture",
    "Send Layout",
    "OpenLanes",
    "HoldPass",
    "TriggerPass",
    "Release",
    "Send Tail",
    "FlushLanes",
    "Send Final",
    "Shut",
    "Journal Intent",
    "Send Commit",
    "Journal Settled",
    "Send Settled",
    "Retire",
    "CloseCapture",
    "Continue",
    "Reconnect",
];
pub(crate) const TARGET_ACTIONS: [&str; 13] = [
    "PrepareVm",
    "Send LayoutTaken",
    "FeedTail",
    "Prove",
    "Send Loaded",
    "Recheck",
    "Journal Committed",
    "Continue",
    "Send Running",
    "Journal Running",
    "Send Settled",
    "Journal Refused",
    "Quit",
];

impl Plan {
    /// A session without faults that this seed stands for.
    pub(crate) fn sound(seed: u64) -> Plan {
        let mut random = Random::new(seed ^ 0x5ca1_eaaa);
        let rate_bps = 5_000_000 + random.up_to(95_000_000);
        let delay = Duration::from_micros(500 + random.up_to(40_000));
        let mut link = LinkParams::clean(rate_bps, delay);
        if random.chance(0.5) {
            link.jitter = Duration::from_micros(random.up_to(8_000));
        }
        let ram_pages = u32_up_to(&mut random, 1700) + 300;
        // A quarter of what the link takes of random pages at most: rounds then shrink.
        let link_pages_per_s = u32::try_from(rate_bps / 8 / 4096).expect("below 2^32");
        Plan {
            seed,
            hold: if random.chance(0.7) {
                Hold::SwitchoverAck
            } else {
                Hold::Starvation
            },
            verify: Verify::Full,
            relay: false,
            ram_pages,
            link,
            writes_per_s: u32_up_to(&mut random, link_pages_per_s / 4) + 1,
            working_set: u32_up_to(&mut random, ram_pages / 3) + 20,
            was_running: random.chance(0.92),
            stay_paused: random.chance(0.08),
            downtime: Duration::from_millis(300 + random.up_to(300)),
            load_fails: false,
            cont: Cont::Runs,
            journal_fails: None,
            faults: Vec::new(),
        }
    }

    /// The seed's session with the faults that it stands for; every sixth seed has none.
    pub(crate) fn of_seed(seed: u64) -> Plan {
        let mut plan = Plan::sound(seed);
        let mut random = Random::new(seed ^ 0xfa17);
        if seed.is_multiple_of(6) {
            return plan;
        }
        if random.chance(0.1) {
            plan.relays();
        }
        // A relay has no rounds: like QEMU's own migration it ends only when the link is faster.
        if !plan.relay {
            plan.writes_per_s *= 1 + u32_up_to(&mut random, 8);
        }
        plan.break_something(&mut random);
        if random.chance(0.3) {
            plan.break_something(&mut random);
        }
        plan
    }

    /// QEMU's stream has something unknown: no proof of all memory can be had.
    pub(crate) fn relays(&mut self) {
        self.relay = true;
        self.verify = Verify::Sample;
    }

    fn break_something(&mut self, random: &mut Random) {
        let moment = self.moment(random);
        let role = role(random);
        let fault = match random.up_to(17) {
            0..=2 => Fault::Cut,
            3..=6 => Fault::Crash(role),
            7 => {
                let run_after = random
                    .chance(0.5)
                    .then(|| Duration::from_millis(random.up_to(400)));
                Fault::Pause { run_after }
            }
            8 => Fault::Abort(role),
            9 => Fault::QemuDies(role),
            10 => Fault::CommitAgain,
            11 => {
                self.journal_fails = Some((role, usize::from(random.chance(0.5))));
                return;
            }
            12 => {
                self.cont = if random.chance(0.7) {
                    Cont::Refused
                } else {
                    Cont::Dies
                };
                return;
            }
            13 => {
                self.load_fails = true;
                return;
            }
            14 => Fault::RunByOther,
            15 => Fault::Slow(role, Duration::from_millis(random.up_to(50_000))),
            16 => Fault::FlipBit,
            _ => Fault::RecheckFails,
        };
        let moment = match fault {
            Fault::RecheckFails => Moment::Before(Role::Target, "Recheck"),
            Fault::FlipBit => Moment::Before(Role::Target, "Prove"),
            Fault::CommitAgain => Moment::After(Role::Source, "Send Commit", short(random)),
            // What came of `cont` is QEMU's own business.
            Fault::RunByOther => Moment::After(
                Role::Target,
                ["PrepareVm", "FeedTail", "Send Loaded"][index_up_to(random, 2)],
                short(random),
            ),
            Fault::Cut
            | Fault::Crash(_)
            | Fault::Pause { .. }
            | Fault::Abort(_)
            | Fault::QemuDies(_)
            | Fault::Slow(..)
            | Fault::Continue => moment,
        };
        self.faults.push((moment, fault));
    }

    fn moment(&self, random: &mut Random) -> Moment {
        if random.chance(0.3) {
            let bytes = u64::from(self.ram_pages) * 4096;
            let typical_ms = 300 + bytes * 8000 / self.link.rate_bps;
            return Moment::Time(Duration::from_millis(random.up_to(typical_ms)));
        }
        let role = role(random);
        let action = match role {
            Role::Source => SOURCE_ACTIONS[index_up_to(random, SOURCE_ACTIONS.len() - 1)],
            Role::Target => TARGET_ACTIONS[index_up_to(random, TARGET_ACTIONS.len() - 1)],
        };
        match random.up_to(2) {
            0 => Moment::Before(role, action),
            1 => Moment::After(role, action, Duration::ZERO),
            _ => Moment::After(role, action, short(random)),
        }
    }

    /// Whether every step of this session is expected to succeed.
    pub(crate) fn is_sound(&self) -> bool {
        self.faults.is_empty()
            && !self.load_fails
            && self.cont == Cont::Runs
            && self.journal_fails.is_none()
            && !(self.relay && self.verify == Verify::Full)
    }
}

fn role(random: &mut Random) -> Role {
    if random.chance(0.5) {
        Role::Source
    } else {
        Role::Target
    }
}

fn short(random: &mut Random) -> Duration {
    Duration::from_micros(random.up_to(60_000))
}

fn u32_up_to(random: &mut Random, max: u32) -> u32 {
    u32::try_from(random.up_to(u64::from(max))).expect("at most max")
}

fn index_up_to(random: &mut Random, max: usize) -> usize {
    let max = u64::try_from(max).expect("a list is short");
    usize::try_from(random.up_to(max)).expect("at most max")
}
