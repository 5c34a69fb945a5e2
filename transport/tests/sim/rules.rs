//! The handover's rules by name, each where it could break.

use std::time::Duration;

use transport::session::{Hold, Outcome};
use transport::wire::{AbortCode, Role};

use crate::checks::{at_every_action, check_order, check_stayed, position, running};
use crate::journal::Step;
use crate::plan::{Fault, Moment};
use crate::sessions::run;
use crate::target_qemu::Cont;
use crate::world::Life;

/// S1: each step of the handover follows the one that allows it.
#[test]
fn s1_order() {
    for hold in [Hold::SwitchoverAck, Hold::Starvation] {
        let mut plan = running(1);
        plan.hold = hold;
        let world = run(plan);
        check_order(
            &world,
            &[
                "source <- VmStopped",
                "source does Send(Final",
                "target does FeedTail",
                "target <- VmLoaded",
                "target <- Proved(Ok",
                "target does Send(Loaded",
                "source <- Frame(Loaded",
                "source does Shut",
                "source <- VmMigration(Completed",
                "source does Journal(Intent",
                "journal Source Intent { paused: false } Ok",
                "source <- Journaled(Ok",
                "source does Send(Commit",
                "target <- Frame(Commit",
                "target does Recheck",
                "target <- Rechecked(Ok",
                "target does Journal(Committed",
                "journal Target Committed { paused: false } Ok",
                "target does Continue",
                "target <- VmResumed",
                "target does Send(Running",
                "source <- Frame(Running",
                "source does Retire",
            ],
        );
    }
}

/// S1: somebody runs the source's guest while the intent is being written: Commit does not leave.
#[test]
fn s1_resume_before_commit_stops_it() {
    let mut plan = running(14);
    let written = Moment::After(Role::Source, "Journal Intent", Duration::ZERO);
    plan.faults = vec![(written, Fault::Continue)];
    let world = run(plan);
    assert_eq!(position(&world, "source does Send(Commit"), None);
    assert!(world.source_qemu.is_running && !world.target_qemu.is_alive);
}

/// S1: with the agent killed between any two steps, or either one, never do two guests run and
/// never is one lost. The oracle looks after every event.
#[test]
fn s1_kill_at_every_action() {
    at_every_action(&[Fault::Crash(Role::Source), Fault::Crash(Role::Target)]);
}

/// S1: the same with the link cut at any action.
#[test]
fn s1_cut_at_every_action() {
    at_every_action(&[Fault::Cut]);
}

/// S2: an intent that is not durable is never followed by Commit; the guest goes on at the source.
#[test]
fn s2_failed_intent_sends_no_commit() {
    let mut plan = running(2);
    plan.journal_fails = Some((Role::Source, 0));
    let world = run(plan);
    assert_eq!(position(&world, "source does Send(Commit"), None);
    assert!(world.source_qemu.is_running);
    check_stayed(&world.source.life, AbortCode::Resources);
}

/// S2: a target that refused an attempt never runs it, whatever arrives later.
#[test]
fn s2_refused_attempt_stays_refused() {
    for late_ms in 0..40 {
        let mut plan = running(3);
        let again = Moment::After(
            Role::Target,
            "Journal Refused",
            Duration::from_millis(late_ms),
        );
        plan.faults = vec![
            (Moment::Before(Role::Target, "Recheck"), Fault::RecheckFails),
            (again, Fault::CommitAgain),
        ];
        let world = run(plan);
        assert!(!world.target_qemu.has_run);
        assert_eq!(world.journals[1].steps, [Step::Started, Step::Refused]);
        assert!(world.source_qemu.is_running);
        check_stayed(&world.source.life, AbortCode::Qemu);
    }
}

/// S2: a refusal that the link swallows is heard when the two sides meet again.
#[test]
fn s2_refusal_is_heard_after_a_cut() {
    let mut plan = running(4);
    plan.faults = vec![
        (Moment::Before(Role::Target, "Recheck"), Fault::RecheckFails),
        (
            Moment::After(Role::Target, "Recheck", Duration::ZERO),
            Fault::Cut,
        ),
    ];
    let world = run(plan);
    check_order(
        &world,
        &[
            "fault Cut",
            "they meet again",
            "source <- Frame(Answer",
            "source does Continue",
            "source <- VmResumed",
        ],
    );
}

/// S2: NeverRan is said only after target QEMU's death, and brings the guest back by itself.
#[test]
fn s2_never_ran_gives_the_guest_back() {
    let mut plan = running(5);
    plan.cont = Cont::Refused;
    let world = run(plan);
    assert_eq!(world.journals[1].latest(), Step::NeverRan);
    assert!(world.source_qemu.is_running && !world.target_qemu.is_alive);
}

/// S2: Commit that arrives twice runs the guest once.
#[test]
fn s2_second_commit_changes_nothing() {
    for late_ms in (0..60).step_by(3) {
        let mut plan = running(6);
        let again = Moment::After(Role::Source, "Send Commit", Duration::from_millis(late_ms));
        plan.faults = vec![(again, Fault::CommitAgain)];
        let world = run(plan);
        let conts = world
            .trace
            .iter()
            .filter(|line| line.contains("target does Continue"));
        assert_eq!(conts.count(), 1);
        assert_eq!(world.target.life, Life::Ended(Outcome::Arrived));
    }
}

/// S2: a target that has accepted Commit but cannot make it durable has not got the guest, whatever
/// the source heard of it meanwhile.
#[test]
fn s2_accepted_is_not_running() {
    let mut plan = running(11);
    let slow = Fault::Slow(Role::Target, Duration::from_secs(40));
    plan.faults = vec![(Moment::Before(Role::Target, "Recheck"), slow)];
    let world = run(plan.clone());
    assert_eq!(world.target.life, Life::Ended(Outcome::Arrived));
    assert!(position(&world, "verdict: Committed").is_some());
    plan.journal_fails = Some((Role::Target, 0));
    let world = run(plan);
    assert!(world.source_qemu.is_running && !world.target_qemu.has_run);
}

/// S3: an abort at any moment before Commit is accepted ends target QEMU, and the guest runs on at
/// the source. The oracle checks both at the end.
#[test]
fn s3_abort_quits_target() {
    at_every_action(&[Fault::Abort(Role::Source), Fault::Abort(Role::Target)]);
}

/// S3: a guest that was paused is not run by the move, nor by an attempt that failed.
#[test]
fn s3_paused_guest_stays_paused() {
    for faults in [
        vec![],
        vec![(
            Moment::Before(Role::Target, "FeedTail"),
            Fault::Abort(Role::Source),
        )],
        vec![(Moment::Before(Role::Target, "Recheck"), Fault::RecheckFails)],
    ] {
        let mut plan = running(7);
        plan.was_running = false;
        let arrives = faults.is_empty();
        plan.faults = faults;
        let world = run(plan);
        assert!(!world.target_qemu.has_run && !world.source_qemu.is_running);
        assert_eq!(world.target_qemu.is_alive, arrives);
        assert_eq!(world.source_qemu.is_alive, !arrives);
    }
}

/// S10: one wrong bit in target memory, and the guest stays.
#[test]
fn s10_wrong_memory_stays() {
    let mut plan = running(12);
    plan.faults = vec![(Moment::Before(Role::Target, "Prove"), Fault::FlipBit)];
    let world = run(plan);
    check_stayed(&world.target.life, AbortCode::Memory);
    assert!(world.source_qemu.is_running && !world.target_qemu.is_alive);
}

/// S5: a guest that stops by itself at any moment of pre-copy arrives, paused, with every page.
#[test]
fn s5_stop_unasked_arrives() {
    for stop_ms in (0..1500).step_by(50) {
        let mut plan = running(8);
        // A slow link: much is left when the guest stops.
        plan.link.rate_bps = 8_000_000;
        plan.faults = vec![(
            Moment::Time(Duration::from_millis(stop_ms)),
            Fault::Pause { run_after: None },
        )];
        let world = run(plan);
        assert_eq!(world.source.life, Life::Ended(Outcome::Arrived));
        assert!(world.target_qemu.is_alive && !world.target_qemu.has_run);
    }
}

/// S4: a relayed guest arrives, running, with every page, although nobody knows its pages.
#[test]
fn s4_relayed_guest_arrives() {
    for hold in [Hold::SwitchoverAck, Hold::Starvation] {
        let mut plan = running(13);
        plan.hold = hold;
        plan.relays();
        plan.link.rate_bps = 20_000_000;
        let world = run(plan);
        assert!(world.target_qemu.is_running);
    }
}

/// S10: who asked for a full proof of memory is not given a relay.
#[test]
fn s10_full_proof_takes_no_relay() {
    let mut plan = running(13);
    plan.relay = true;
    let world = run(plan);
    check_stayed(&world.target.life, AbortCode::Incompatible);
    assert!(world.source_qemu.is_running && !world.target_qemu.is_alive);
}

/// S5: one that is run again at once moves on, running.
#[test]
fn s5_short_stop_before_pre_copy_is_forgotten() {
    let mut plan = running(9);
    plan.faults = vec![(
        Moment::Before(Role::Source, "StartCapture"),
        Fault::Pause {
            run_after: Some(Duration::from_micros(300)),
        },
    )];
    let world = run(plan);
    assert_eq!(world.source.life, Life::Ended(Outcome::Arrived));
    assert!(world.target_qemu.is_running);
}
