//! Random walks: whatever comes in whatever order, no machine takes a step that its rule forbids.

use std::time::Duration;

use testbed_link::Random;
use transport::session::{Hold, Outcome, VmMigration, source, target};
use transport::wire::{Frame, Verdict};

use crate::inputs::{self, Named, source_inputs, target_inputs};
use crate::places::{Place, SOURCE_STATES, TARGET_STATES, named, way};

const WALKS: u64 = 20_000;
const STEPS: u64 = 30;

/// What a source has heard and done so far.
#[derive(Debug, Default)]
struct SourceSoFar {
    shut: bool,
    completed: bool,
    resumed_since_stop: bool,
    intent_asked: bool,
    intent_durable: bool,
    commits: u32,
    never_runs_there: bool,
    runs_there: bool,
    ends: u32,
}

/// S1, S2: Commit leaves once, only after the intent is durable, which is asked for only after
/// SHUT(0), `completed` and no RESUME since STOP; source QEMU is retired only when the target runs;
/// after Commit the guest goes on here only on the target's durable word.
#[test]
fn s1_s2_hold_for_any_inputs() {
    for seed in 0..WALKS {
        let mut random = Random::new(seed);
        let hold = if random.chance(0.5) {
            Hold::SwitchoverAck
        } else {
            Hold::Starvation
        };
        let mut now = inputs::begin();
        let mut machine = inputs::source(now, hold);
        let mut so_far = SourceSoFar::default();
        for name in walk(&mut random, &SOURCE_STATES, &source_inputs()) {
            now += step(&mut random, name);
            let input = named(source_inputs(), name);
            so_far.hear(&input);
            machine.handle(now, input);
            while let Some(action) = machine.poll_action() {
                so_far.check(&action, seed);
            }
        }
    }
}

impl SourceSoFar {
    fn hear(&mut self, input: &source::Input) {
        use source::Input;
        if let Input::VmStopped = input {
            self.resumed_since_stop = false;
        } else if let Input::VmResumed = input {
            self.resumed_since_stop = true;
        } else if let Input::VmMigration(VmMigration::Completed) = input {
            self.completed = true;
        } else if let Input::Journaled(Ok(())) = input {
            self.intent_durable |= self.intent_asked;
        } else if let Input::Frame(Frame::Running) = input {
            self.runs_there |= self.commits > 0;
        } else if let Input::Frame(Frame::Answer { verdict, .. }) = input {
            self.runs_there |= self.commits > 0 && *verdict == Verdict::Running;
            self.never_runs_there |= matches!(verdict, Verdict::Refused | Verdict::NeverRan);
        }
    }

    fn check(&mut self, action: &source::Action, seed: u64) {
        use source::{Action, Mark};
        assert_eq!(self.ends, 0, "seed {seed}: {action:?} after the end");
        if let Action::Shut = action {
            self.shut = true;
        } else if let Action::Journal(Mark::Intent { .. }) = action {
            let allowed = self.shut && self.completed && !self.resumed_since_stop;
            assert!(allowed, "seed {seed}: intent too early, {self:?}");
            self.intent_asked = true;
        } else if let Action::Send(Frame::Commit { .. }) = action {
            let allowed = self.intent_durable && !self.resumed_since_stop;
            assert!(allowed, "seed {seed}: Commit too early, {self:?}");
            self.commits += 1;
            assert_eq!(self.commits, 1, "seed {seed}: Commit twice");
        } else if let Action::Retire = action {
            assert!(self.runs_there, "seed {seed}: retired, {self:?}");
        } else if let Action::Continue = action {
            let is_ours = self.commits == 0 || self.never_runs_there;
            assert!(self.shut && is_ours, "seed {seed}: continues, {self:?}");
        } else if let Action::CloseCapture = action {
            assert!(!self.shut, "seed {seed}: closes what SHUT(0) has ended");
        } else if let Action::Done(outcome) = action {
            self.ends += 1;
            let said = match outcome {
                Outcome::Arrived => self.runs_there,
                Outcome::Stayed { .. } => self.commits == 0 || self.never_runs_there,
                Outcome::Doubt { .. } => self.commits == 1,
            };
            assert!(said, "seed {seed}: {outcome:?}, {self:?}");
        }
    }
}

/// What a target has heard and done so far.
#[derive(Debug, Default)]
struct TargetSoFar {
    /// Nothing is known of pages: memory cannot be proved.
    relay: bool,
    loaded: bool,
    proved: bool,
    rechecked: bool,
    commit_heard: bool,
    accepted: bool,
    durable: bool,
    conts: u32,
    refused: bool,
    never_ran: bool,
    quits: u32,
    ends: u32,
}

/// S2, S3: `cont` is sent once, only after an accepted Commit is durable, which needs Loaded, proved
/// memory and the second look; never after a refusal was asked for; whoever stays behind quits QEMU.
#[test]
fn s2_s3_hold_for_any_inputs() {
    for seed in 0..WALKS {
        let mut random = Random::new(seed);
        let mut now = inputs::begin();
        let mut machine = inputs::target(now);
        let mut so_far = TargetSoFar::default();
        for name in walk(&mut random, &TARGET_STATES, &target_inputs()) {
            now += step(&mut random, name);
            let input = named(target_inputs(), name);
            so_far.hear(&input);
            machine.handle(now, input);
            while let Some(action) = machine.poll_action() {
                so_far.check(&action, seed);
            }
        }
    }
}

impl TargetSoFar {
    fn hear(&mut self, input: &target::Input) {
        use target::Input;
        if let Input::VmLoaded = input {
            self.loaded = true;
        } else if let Input::Frame(Frame::Relay) = input {
            self.relay = true;
        } else if let Input::Proved(result) = input {
            self.proved |= result.is_ok();
        } else if let Input::Rechecked(result) = input {
            self.rechecked |= result.is_ok();
        } else if let Input::Frame(Frame::Commit { .. }) = input {
            self.commit_heard = true;
        } else if let Input::Journaled(Ok(())) = input {
            self.durable |= self.accepted;
        } else if let Input::NeverRan(_) = input {
            self.never_ran |= self.conts > 0;
        }
    }

    fn check(&mut self, action: &target::Action, seed: u64) {
        use target::{Action, Mark};
        assert_eq!(self.ends, 0, "seed {seed}: {action:?} after the end");
        if let Action::Journal(Mark::Committed { .. }) = action {
            let allowed =
                self.loaded && (self.proved || self.relay) && self.rechecked && self.commit_heard;
            assert!(allowed && !self.refused, "seed {seed}: accepts, {self:?}");
            self.accepted = true;
        } else if let Action::Journal(Mark::Refused(_)) = action {
            assert!(!self.durable, "seed {seed}: refuses what it accepted");
            self.refused = true;
        } else if let Action::Journal(Mark::NeverRan(_)) = action {
            assert!(self.never_ran, "seed {seed}: never ran?");
        } else if let Action::Continue = action {
            assert!(self.durable && !self.refused, "seed {seed}: runs, {self:?}");
            self.conts += 1;
            assert_eq!(self.conts, 1, "seed {seed}: runs twice");
        } else if let Action::Send(Frame::Loaded { .. }) = action {
            assert!(
                self.loaded && (self.proved || self.relay),
                "seed {seed}: Loaded, {self:?}"
            );
        } else if let Action::Quit = action {
            self.quits += 1;
        } else if let Action::Done(Outcome::Arrived) = action {
            assert!(self.durable, "seed {seed}: arrived, {self:?}");
            self.ends += 1;
        } else if let Action::Done(Outcome::Doubt { .. }) = action {
            assert!(self.accepted, "seed {seed}: in doubt of what, {self:?}");
            self.ends += 1;
        } else if let Action::Done(_) = action {
            assert!(self.quits == 1, "seed {seed}: a copy survives, {self:?}");
            self.ends += 1;
        }
    }
}

/// S6, S10: roots that differ end the attempt before device state is fed.
#[test]
fn s10_roots_must_agree() {
    let mut now = inputs::begin();
    let mut machine = inputs::target(now);
    let start = way(&TARGET_STATES, "receiving, all applied");
    for name in start.into_iter().chain(["Frame Final, other root"]) {
        now += Duration::from_millis(1);
        machine.handle(now, named(target_inputs(), name));
        while let Some(action) = machine.poll_action() {
            assert!(!matches!(action, target::Action::FeedTail(_)), "fed");
        }
    }
    machine.handle(now, target::Input::Journaled(Ok(())));
    let ended = std::iter::from_fn(|| machine.poll_action())
        .any(|action| matches!(action, target::Action::Done(Outcome::Stayed { .. })));
    assert!(ended, "{machine:?}");
}

/// To a random state, and on from there with random inputs.
fn walk<T>(random: &mut Random, places: &[Place], inputs: &[Named<T>]) -> Vec<&'static str> {
    let (place, ..) = places[index(random, places.len())];
    let mut names = way(places, place);
    for _ in 0..random.up_to(STEPS) {
        names.push(inputs[index(random, inputs.len())].0);
    }
    names
}

fn index(random: &mut Random, length: usize) -> usize {
    let last = u64::try_from(length - 1).expect("a list is short");
    usize::try_from(random.up_to(last)).expect("below the length")
}

/// A timer is given when its time has come.
fn step(random: &mut Random, name: &str) -> Duration {
    if name == "Timer" {
        Duration::from_secs(200)
    } else {
        Duration::from_millis(random.up_to(300))
    }
}
