//! Guests against links: the rule drives a model of a dirty log, an encoder and a link in virtual
//! time. Pages are drawn from a seeded generator, or are those that a real guest wrote (`recorded`);
//! what the rule sees is what the session sees.

use std::time::Duration;

use super::recorded::{self, Recorded};
use super::{
    Decision, Observation, Policy, Steering, Stuck, WhenStuck, decide, drain_time, predicted_stop,
    stop_floor,
};

/// How a guest writes.
#[derive(Debug, Clone, Copy)]
struct Guest {
    /// Pages with content at the start.
    pages: u32,
    /// The first so many of them are written to.
    working_set: u32,
    /// Writes per second, each to a page drawn at random.
    writes_per_s: f64,
    /// This share of the writes goes to a tenth of the working set.
    hot_share: f64,
    /// Every second half of so long it writes nothing; zero: it always writes.
    burst: Duration,
    /// What a real guest wrote, in place of all this.
    recording: Option<&'static str>,
}

impl Guest {
    fn recorded(recording: &'static str) -> Guest {
        Guest {
            pages: Recorded::parse(recording).pages,
            writes_per_s: 0.0,
            recording: Some(recording),
            ..IDLE
        }
    }
}

/// How a move ended.
#[derive(Debug, Clone, Copy)]
struct End {
    at: Duration,
    decision: Decision,
    downtime: Duration,
    sent_pages: u64,
    throttle: u8,
}

const STEP: Duration = Duration::from_millis(10);
const COST_BYTES: f64 = 2050.0;
/// A move that has not ended by then never will.
const LIMIT: Duration = Duration::from_secs(400);

struct World {
    now: Duration,
    guest: Guest,
    recorded: Option<Recorded>,
    /// Slower than the world's where it is throttled.
    guest_time: Duration,
    link_bytes_per_s: f64,
    rtt: Duration,
    random: u64,
    /// Written since the last sync; announced and not sent.
    unseen: Vec<bool>,
    backlog: Vec<bool>,
    backlog_pages: u64,
    next: usize,
    link_credit: f64,
    write_credit: f64,
    sent_pages: u64,
    throttle: u8,
    synced_at: Duration,
    armed_at: Option<Duration>,
    armed_best: (Duration, Duration),
    disarmed_at: Option<Duration>,
    /// A sync, or arming, takes effect at the end of QEMU's window.
    pending: Option<(Duration, Decision)>,
    found: Vec<(Duration, u64)>,
    stop_least: Duration,
    left_least: u64,
    shrank_at: Duration,
    rounds_least: u64,
    not_shrinking: u32,
    round_pages: u64,
    throttled_at: Option<Duration>,
}

impl World {
    fn new(guest: Guest, mbps: f64, rtt: Duration) -> World {
        let pages = guest.pages as usize;
        World {
            now: Duration::ZERO,
            guest,
            recorded: guest.recording.map(Recorded::parse),
            guest_time: Duration::ZERO,
            link_bytes_per_s: mbps * 1e6 / 8.0 * 0.95,
            rtt,
            random: 0x9e37_79b9_7f4a_7c15,
            unseen: vec![false; pages],
            backlog: vec![true; pages],
            backlog_pages: u64::from(guest.pages),
            next: 0,
            link_credit: 0.0,
            write_credit: 0.0,
            sent_pages: 0,
            throttle: 0,
            synced_at: Duration::ZERO,
            armed_at: None,
            armed_best: (Duration::MAX, Duration::ZERO),
            disarmed_at: None,
            pending: None,
            found: Vec::new(),
            stop_least: Duration::MAX,
            left_least: u64::MAX,
            shrank_at: Duration::ZERO,
            rounds_least: u64::MAX,
            not_shrinking: 0,
            round_pages: 0,
            throttled_at: None,
        }
    }

    fn draw(&mut self, below: u32) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % u64::from(below.max(1))).expect("a page number")
    }

    /// Writes, syncs and sends for one step.
    fn step(&mut self) {
        let secs = STEP.as_secs_f64();
        let half = self.guest.burst / 2;
        let speed = 1.0 - f64::from(self.throttle) / 100.0;
        if let Some(recorded) = &self.recorded {
            let to = self.guest_time + STEP.mul_f64(speed);
            for page in recorded.between(self.guest_time, to) {
                self.unseen[usize::try_from(page).expect("a page number")] = true;
            }
            self.guest_time = to;
        }
        let rests = !half.is_zero() && (self.now.as_millis() / half.as_millis()) % 2 == 1;
        if !rests {
            self.write_credit += self.guest.writes_per_s * speed * secs;
        }
        while self.write_credit >= 1.0 {
            self.write_credit -= 1.0;
            let hot = f64::from(u32::try_from(self.draw(1000)).expect("small")) / 1000.0;
            let set = if hot < self.guest.hot_share {
                self.guest.working_set / 10
            } else {
                self.guest.working_set
            };
            let page = self.draw(set);
            self.unseen[page] = true;
        }
        self.link_credit += self.link_bytes_per_s * secs / COST_BYTES;
        while self.link_credit >= 1.0 {
            self.link_credit -= 1.0;
            if self.backlog_pages == 0 {
                self.link_credit = 0.0;
                break;
            }
            while !self.backlog[self.next] {
                self.next = (self.next + 1) % self.backlog.len();
            }
            self.backlog[self.next] = false;
            // Read when it is sent: what was written until now goes with it.
            self.backlog_pages -= 1;
            self.sent_pages += 1;
        }
        if self.armed_at.is_some() {
            self.sync();
        }
        self.now += STEP;
    }

    fn sync(&mut self) {
        let mut found = 0;
        for page in 0..self.unseen.len() {
            if std::mem::take(&mut self.unseen[page]) {
                found += 1;
                if !std::mem::replace(&mut self.backlog[page], true) {
                    self.backlog_pages += 1;
                    self.round_pages += 1;
                }
            }
        }
        if self.armed_at.is_none() {
            let span = self.now.saturating_sub(self.synced_at);
            self.found.push((span.max(STEP), found));
        }
        self.synced_at = self.now;
    }

    fn observation(&self) -> Observation {
        Observation {
            backlog_pages: self.backlog_pages,
            in_flight_bytes: 0,
            page_cost_bytes: COST_BYTES,
            rate_bytes_per_s: self.link_bytes_per_s,
            rtt: self.rtt,
            since_sync: self.now - self.synced_at,
            #[expect(clippy::cast_precision_loss, reason = "a model")]
            dirty_pages_per_s: self
                .found
                .last()
                .map(|(span, pages)| *pages as f64 / span.as_secs_f64()),
            steering: match self.armed_at {
                Some(at) => Steering::Armed {
                    since: self.now - at,
                    since_best: self.now - self.armed_best.1,
                },
                None => Steering::Held {
                    since_armed: self.disarmed_at.map(|at| self.now - at),
                },
            },
            stuck: None,
        }
    }

    /// What `session::source` notes between decisions.
    fn observe(&mut self, policy: &Policy) -> Observation {
        let seen = self.observation();
        let drain = drain_time(&seen);
        if seen.backlog_pages < self.left_least - self.left_least / 10 {
            (self.left_least, self.shrank_at) = (seen.backlog_pages, self.now);
        }
        if seen.dirty_pages_per_s.is_some() {
            let stop = predicted_stop(&seen, policy);
            self.stop_least = self.stop_least.min(stop);
            if stop < self.armed_best.0 {
                self.armed_best = (stop, self.now);
            }
        }
        let limit_reached = policy.time_max.is_some_and(|most| self.now >= most);
        let stalls = self.now - self.shrank_at > Duration::from_secs(10).max(drain.mul_f64(0.5));
        let is_stuck = limit_reached || stalls || self.not_shrinking >= 3;
        Observation {
            stuck: is_stuck.then(|| Stuck {
                stop_least: self.stop_least,
                limit_reached,
                throttle_percent: self.throttle,
                since_throttle: self.throttled_at.map(|at| self.now - at),
                stop_floor: stop_floor(self.rtt, policy),
                can_post_copy: false,
            }),
            ..seen
        }
    }

    fn end_round(&mut self) {
        let pages = std::mem::take(&mut self.round_pages);
        let shrank = pages < self.rounds_least - self.rounds_least / 10;
        self.not_shrinking = if shrank { 0 } else { self.not_shrinking + 1 };
        self.rounds_least = self.rounds_least.min(pages);
    }

    fn effect(&mut self, decision: Decision) {
        self.sync();
        if decision == Decision::Arm {
            self.armed_at = Some(self.now);
            self.armed_best = (Duration::MAX, self.now);
        }
    }

    fn stopped(&mut self, policy: &Policy, decision: Decision) -> End {
        // A stop that was not armed comes at the end of a window.
        self.sync();
        let seen = Observation {
            steering: Steering::Armed {
                since: Duration::ZERO,
                since_best: Duration::ZERO,
            },
            ..self.observation()
        };
        End {
            at: self.now,
            decision,
            downtime: predicted_stop(&seen, policy),
            sent_pages: self.sent_pages,
            throttle: self.throttle,
        }
    }
}

/// Runs the rule until it ends the move; `None`: it never does.
fn run(guest: Guest, mbps: f64, rtt_ms: u64, policy: &Policy) -> Option<End> {
    let mut world = World::new(guest, mbps, Duration::from_millis(rtt_ms));
    while world.now < LIMIT {
        world.step();
        if let Some((at, decision)) = world.pending {
            if world.now >= at {
                world.pending = None;
                world.effect(decision);
            }
            continue;
        }
        let seen = world.observe(policy);
        let window = world.now + Duration::from_millis(50);
        match decide(&seen, policy) {
            Decision::Wait => {}
            Decision::Refresh => world.pending = Some((window, Decision::Refresh)),
            decision @ (Decision::Sync | Decision::Arm) => {
                world.end_round();
                world.pending = Some((window, decision));
            }
            Decision::Disarm => (world.armed_at, world.disarmed_at) = (None, Some(world.now)),
            Decision::Throttle(percent) => {
                (world.throttle, world.throttled_at) = (percent, Some(world.now));
                (world.not_shrinking, world.rounds_least) = (0, u64::MAX);
                (world.left_least, world.shrank_at) = (u64::MAX, world.now);
            }
            decision @ (Decision::Stop
            | Decision::StopForced
            | Decision::GiveUp
            | Decision::PostCopy) => return Some(world.stopped(policy, decision)),
        }
    }
    None
}

const IDLE: Guest = Guest {
    pages: 30_000,
    working_set: 400,
    writes_per_s: 100.0,
    hot_share: 0.0,
    burst: Duration::ZERO,
    recording: None,
};
/// 8 and 20 MB/s at random in 256 MiB.
const DIRTY8: Guest = Guest {
    pages: 95_000,
    working_set: 65_536,
    writes_per_s: 1953.0,
    hot_share: 0.0,
    burst: Duration::ZERO,
    recording: None,
};
const DIRTY20: Guest = Guest {
    writes_per_s: 5300.0,
    ..DIRTY8
};
/// More than the link takes.
const FLOOD: Guest = Guest {
    writes_per_s: 15_000.0,
    ..DIRTY8
};

fn policy(when_stuck: WhenStuck) -> Policy {
    Policy {
        when_stuck,
        ..Policy::new(Duration::from_millis(300))
    }
}

/// Guests that the link can follow arrive within what was asked for, unthrottled, and near the time
/// that the link needs at least.
#[test]
fn guests_that_fit_arrive_within_the_budget() {
    let hot = Guest {
        hot_share: 0.9,
        ..DIRTY8
    };
    let bursts = Guest {
        burst: Duration::from_secs(6),
        ..DIRTY20
    };
    for (name, guest, seconds_max) in [
        ("idle", IDLE, 6),
        ("dirty8", DIRTY8, 22),
        ("dirty20", DIRTY20, 45),
        ("hot", hot, 22),
        ("bursts", bursts, 45),
    ] {
        let end = run(guest, 100.0, 50, &policy(WhenStuck::Throttle));
        let end = end.unwrap_or_else(|| panic!("{name} never ends"));
        println!("{name}: {end:?}");
        assert_eq!(end.decision, Decision::Stop, "{name} {end:?}");
        assert!(end.downtime <= Duration::from_millis(300), "{name} {end:?}");
        assert!(end.at <= Duration::from_secs(seconds_max), "{name} {end:?}");
        assert_eq!(end.throttle, 0, "{name} {end:?}");
    }
}

/// Real guests, whose writes come in bursts and go to some pages again and again, arrive within the
/// budget on every link that can follow, and the idle one even on a slow one.
#[test]
fn recorded_guests_arrive_within_the_budget() {
    for (name, recording, mbps, rtt_ms, seconds_max) in [
        ("idle", recorded::IDLE, 100.0, 50, 7),
        ("idle", recorded::IDLE, 20.0, 100, 32),
        ("use", recorded::USE, 100.0, 50, 17),
        ("use", recorded::USE, 50.0, 30, 33),
        ("use", recorded::USE, 20.0, 100, 90),
    ] {
        let guest = Guest::recorded(recording);
        let end = run(guest, mbps, rtt_ms, &policy(WhenStuck::Throttle));
        let end = end.unwrap_or_else(|| panic!("{name} never ends"));
        println!("{name}, {mbps} Mbit/s: {end:?}");
        assert_eq!(end.decision, Decision::Stop, "{name} {end:?}");
        assert!(end.downtime <= Duration::from_millis(300), "{name} {end:?}");
        assert!(end.at <= Duration::from_secs(seconds_max), "{name} {end:?}");
        assert_eq!(end.throttle, 0, "{name} {end:?}");
    }
}

/// The same guest on slower and on longer links: never earlier, never past the budget.
#[test]
fn slower_links_take_longer() {
    let mut before = Duration::ZERO;
    for mbps in [1000.0, 300.0, 100.0, 60.0] {
        let end = run(DIRTY8, mbps, 50, &policy(WhenStuck::Wait)).expect("the link can follow");
        println!("{mbps} Mbit/s: {end:?}");
        assert!(end.downtime <= Duration::from_millis(300), "{end:?}");
        assert!(end.at >= before, "{end:?}");
        before = end.at;
    }
}

/// A guest that floods the link: each policy does what it says.
#[test]
fn a_flood_meets_the_policy() {
    assert!(run(FLOOD, 100.0, 50, &policy(WhenStuck::Wait)).is_none());
    let limited = Policy {
        time_max: Some(Duration::from_secs(60)),
        ..policy(WhenStuck::Wait)
    };
    let end = run(FLOOD, 100.0, 50, &limited).expect("its time is over");
    assert_eq!(end.decision, Decision::GiveUp, "{end:?}");
    let end = run(FLOOD, 100.0, 50, &policy(WhenStuck::Abort)).expect("it gives up");
    assert_eq!(end.decision, Decision::GiveUp, "{end:?}");
    let end = run(FLOOD, 100.0, 50, &policy(WhenStuck::Force)).expect("it stops");
    println!("force: {end:?}");
    assert_eq!(end.decision, Decision::StopForced, "{end:?}");
    let strong = Policy {
        throttle_max: 80,
        ..policy(WhenStuck::Throttle)
    };
    let end = run(FLOOD, 100.0, 50, &strong).expect("it is slowed enough");
    println!("throttle: {end:?}");
    assert_eq!(end.decision, Decision::Stop, "{end:?}");
    assert!(end.throttle >= 60, "{end:?}");
}

/// A flood that never drains fits a budget that is long enough, unthrottled.
#[test]
fn a_long_budget_takes_a_flood() {
    for when_stuck in [WhenStuck::Wait, WhenStuck::Throttle] {
        let long = Policy {
            downtime: Duration::from_secs(20),
            ..policy(when_stuck)
        };
        let end = run(FLOOD, 100.0, 50, &long).expect("it fits");
        println!("{when_stuck}: {end:?}");
        assert_eq!(end.decision, Decision::Stop, "{end:?}");
        assert!(end.downtime <= long.downtime, "{end:?}");
        assert_eq!(end.throttle, 0, "{end:?}");
    }
}

/// A budget below what the round trips take: no throttle helps, so none is asked for.
#[test]
fn a_budget_below_the_floor_throttles_nobody() {
    let tiny = Policy {
        time_max: Some(Duration::from_secs(30)),
        ..Policy::new(Duration::from_millis(100))
    };
    let end = run(DIRTY8, 100.0, 50, &tiny).expect("its time is over");
    assert_eq!(end.decision, Decision::GiveUp, "{end:?}");
    assert_eq!(end.throttle, 0, "{end:?}");
}

/// Late binding: a page that is written again while it waits costs once. The flow must come near
/// the least number of pages, not near one page for each write.
#[test]
fn waiting_pages_cost_once() {
    let hot = Guest {
        hot_share: 1.0,
        working_set: 5_000,
        writes_per_s: 20_000.0,
        ..DIRTY8
    };
    let end = run(hot, 100.0, 50, &policy(WhenStuck::Wait)).expect("500 hot pages fit");
    println!("hot: {end:?}");
    // Twenty seconds of writes are 400 000.
    assert!(end.sent_pages < 250_000, "{end:?}");
}
