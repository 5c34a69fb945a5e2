//! Ways to every state, and one of each input.

use std::time::{Duration, Instant};

use bytes::Bytes;
use transport::block::{BlockSpec, Root};
use transport::session::{Hold, Policy, VmMigration, source, target};
use transport::wire::{AbortCode, AttemptId, Frame, RunState, Verdict, Verify};

pub(crate) const ATTEMPT: AttemptId = AttemptId([7; 16]);
pub(crate) const INCARNATION: u64 = 9;
const ROOT: Root = Root([3; 32]);
const OTHER: Root = Root([4; 32]);
const TAIL_BYTES: u32 = 5;

/// An input by its name in the table.
pub(crate) type Named<T> = (&'static str, T);

/// An origin for virtual time.
pub(crate) fn begin() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "an origin for virtual time")]
    Instant::now()
}

fn text() -> String {
    "why".into()
}

fn blocks() -> Vec<BlockSpec> {
    vec![BlockSpec {
        name: "ram".into(),
        pages: 1,
    }]
}

pub(crate) fn commit(root: Root, run_state: RunState) -> Frame {
    Frame::Commit {
        attempt: ATTEMPT,
        target_incarnation: INCARNATION,
        root,
        run_state,
    }
}

fn answer(verdict: Verdict) -> Frame {
    Frame::Answer {
        attempt: ATTEMPT,
        verdict,
        epoch: 0,
    }
}

fn ask() -> Frame {
    Frame::Ask {
        attempt: ATTEMPT,
        verdict: Verdict::Unknown,
        epoch: 0,
    }
}

fn tail() -> Frame {
    Frame::Tail {
        data: Bytes::from_static(b"state"),
        raw_len: TAIL_BYTES,
    }
}

fn abort() -> Frame {
    Frame::Abort {
        code: AbortCode::Qemu,
        detail: text(),
    }
}

fn last(root: Root) -> Frame {
    Frame::Final {
        root,
        barrier: 1,
        tail_bytes: u64::from(TAIL_BYTES),
    }
}

/// A source whose guest runs.
pub(crate) fn source(now: Instant, hold: Hold) -> source::Source {
    let config = source::Config {
        attempt: ATTEMPT,
        target_incarnation: INCARNATION,
        hold,
        run_state: RunState::Running,
        policy: Policy::new(Duration::from_millis(300)),
        epoch: 0,
    };
    source::Source::new(now, config)
}

pub(crate) fn target(now: Instant) -> target::Target {
    let config = target::Config {
        attempt: ATTEMPT,
        incarnation: INCARNATION,
        verify: Verify::Full,
        qemu: "10.0.2".into(),
        stay_paused: false,
        epoch: 0,
    };
    target::Target::new(now, config)
}

/// One of each input of the source; some in two kinds that differ in what they bring about.
pub(crate) fn source_inputs() -> Vec<Named<source::Input>> {
    let mut inputs = source_frames();
    inputs.extend(source_events());
    inputs
}

fn source_frames() -> Vec<Named<source::Input>> {
    use source::Input;
    let frame = Input::Frame;
    vec![
        (
            "Frame Ready",
            frame(Frame::Ready {
                verify: Verify::Full,
                qemu: text(),
            }),
        ),
        ("Frame LayoutTaken", frame(Frame::LayoutTaken)),
        (
            "Frame Progress",
            frame(Frame::Progress {
                applied_bytes: [1; 8],
            }),
        ),
        ("Frame Applied", frame(Frame::Applied { barrier: 1 })),
        ("Frame Loaded", frame(Frame::Loaded { root: ROOT })),
        (
            "Frame Loaded, other root",
            frame(Frame::Loaded { root: OTHER }),
        ),
        ("Frame Running", frame(Frame::Running)),
        ("Frame Answer Unknown", frame(answer(Verdict::Unknown))),
        ("Frame Answer Refused", frame(answer(Verdict::Refused))),
        ("Frame Answer NeverRan", frame(answer(Verdict::NeverRan))),
        ("Frame Answer Committed", frame(answer(Verdict::Committed))),
        ("Frame Answer Running", frame(answer(Verdict::Running))),
        ("Frame Ask", frame(ask())),
        ("Frame Settled", frame(Frame::Settled { attempt: ATTEMPT })),
        ("Frame Abort", frame(abort())),
        ("Frame Commit", frame(commit(ROOT, RunState::Running))),
    ]
}

fn source_events() -> Vec<Named<source::Input>> {
    use source::Input;
    vec![
        ("PeerLost", Input::PeerLost(text())),
        ("Reconnected", Input::Reconnected),
        ("VmStopped", Input::VmStopped),
        ("VmResumed", Input::VmResumed),
        ("VmMigration Other", Input::VmMigration(VmMigration::Other)),
        (
            "VmMigration Completed",
            Input::VmMigration(VmMigration::Completed),
        ),
        (
            "VmMigration Failed",
            Input::VmMigration(VmMigration::Failed(text())),
        ),
        ("PassStarted", Input::PassStarted),
        ("VmGone", Input::VmGone(text())),
        (
            "Head",
            Input::Head {
                head: Bytes::new(),
                blocks: blocks(),
            },
        ),
        ("Relay", Input::Relay),
        ("Relayed", Input::Relayed { bytes: 7 }),
        ("PassDrained", Input::PassDrained { pages: 2 }),
        ("RamEnd", Input::RamEnd),
        (
            "Tail",
            Input::Tail {
                pieces: vec![(Bytes::from_static(b"state"), TAIL_BYTES)],
                total_bytes: u64::from(TAIL_BYTES),
            },
        ),
        ("CaptureFailed", Input::CaptureFailed(text())),
        ("Sample, nothing left", Input::Sample(sample(0))),
        ("Sample, much left", Input::Sample(sample(100_000))),
        (
            "Marked",
            Input::Marked {
                barrier: 1,
                root: ROOT,
            },
        ),
        ("Proved Ok", Input::Proved(Ok(()))),
        ("Proved Err", Input::Proved(Err(text()))),
        ("Journaled Ok", Input::Journaled(Ok(()))),
        ("Journaled Err", Input::Journaled(Err(text()))),
        ("VmCommandFailed", Input::VmCommandFailed(text())),
        ("Abort", Input::Abort(text())),
        ("Downtime", Input::Downtime(Duration::from_millis(100))),
        ("Timer", Input::Timer),
    ]
}

fn sample(backlog_pages: u64) -> source::Sample {
    source::Sample {
        backlog_pages,
        announced_pages: 1000,
        content_pages: 1000,
        sent_bytes: 8,
        rtt: Duration::from_millis(20),
        link_bytes_per_s: 10_000_000,
    }
}

/// One of each input of the target.
pub(crate) fn target_inputs() -> Vec<Named<target::Input>> {
    use target::Input;
    let frame = Input::Frame;
    vec![
        (
            "Frame Layout",
            frame(Frame::Layout {
                head: Bytes::new(),
                blocks: blocks(),
            }),
        ),
        ("Frame Relay", frame(Frame::Relay)),
        ("Frame Stopped", frame(Frame::Stopped)),
        ("Frame Tail", frame(tail())),
        ("Frame Final", frame(last(ROOT))),
        ("Frame Final, other root", frame(last(OTHER))),
        ("Frame Commit", frame(commit(ROOT, RunState::Running))),
        (
            "Frame Commit, paused",
            frame(commit(ROOT, RunState::Paused)),
        ),
        (
            "Frame Commit, other root",
            frame(commit(OTHER, RunState::Running)),
        ),
        ("Frame Ask", frame(ask())),
        ("Frame Settled", frame(Frame::Settled { attempt: ATTEMPT })),
        ("Frame Abort", frame(abort())),
        ("Frame Running", frame(Frame::Running)),
        ("PeerLost", Input::PeerLost(text())),
        ("VmPrepared", Input::VmPrepared),
        ("VmFailed", Input::VmFailed(text())),
        (
            "Applied",
            Input::Applied {
                barrier: 1,
                root: ROOT,
            },
        ),
        ("LaneFailed", Input::LaneFailed(text())),
        ("VmLoaded", Input::VmLoaded),
        ("VmResumed", Input::VmResumed),
        ("Rechecked Ok", Input::Rechecked(Ok(()))),
        ("Rechecked Err", Input::Rechecked(Err(text()))),
        ("Proved Ok", Input::Proved(Ok(()))),
        ("Proved Err", Input::Proved(Err(text()))),
        ("Journaled Ok", Input::Journaled(Ok(()))),
        ("Journaled Err", Input::Journaled(Err(text()))),
        ("NeverRan", Input::NeverRan(text())),
        ("Abort", Input::Abort(text())),
        ("Timer", Input::Timer),
    ]
}

/// States of the source with the inputs, by name, that lead there from the last state named before
/// `from`.
pub(crate) const SOURCE_STATES: [Place; 24] = [
    ("waiting", "", &[]),
    ("preparing", "waiting", &["Frame Ready"]),
    ("layout", "preparing", &["Head"]),
    (
        "pre-copy, first pass",
        "layout",
        &["Frame LayoutTaken", "PassStarted"],
    ),
    ("pre-copy, held", "pre-copy, first pass", &["PassDrained"]),
    (
        "pre-copy, pass triggered",
        "pre-copy, held",
        &["Sample, nothing left"],
    ),
    (
        "pre-copy, held again",
        "pre-copy, pass triggered",
        &["PassStarted", "PassDrained"],
    ),
    (
        "stop asked for",
        "pre-copy, held again",
        &["Sample, nothing left"],
    ),
    ("stopped unasked", "pre-copy, held", &["VmStopped"]),
    (
        "draining",
        "stop asked for",
        &["VmStopped", "RamEnd", "Tail"],
    ),
    ("all is sent", "draining", &["Marked"]),
    ("loaded, not proved here", "all is sent", &["Frame Loaded"]),
    (
        "SHUT(0) is given",
        "all is sent",
        &["Proved Ok", "Frame Loaded"],
    ),
    (
        "intent being written",
        "SHUT(0) is given",
        &["VmMigration Completed"],
    ),
    ("committed", "intent being written", &["Journaled Ok"]),
    ("in doubt", "committed", &["PeerLost"]),
    ("asking", "in doubt", &["Reconnected"]),
    ("settling", "committed", &["Frame Running"]),
    ("returning, socket closed", "draining", &["Abort"]),
    (
        "returning, on the way to postmigrate",
        "SHUT(0) is given",
        &["Abort"],
    ),
    (
        "returning, refused after Commit",
        "committed",
        &["Frame Answer Refused"],
    ),
    ("relay, layout", "preparing", &["Relay"]),
    ("relaying", "relay, layout", &["Frame LayoutTaken"]),
    ("relaying, stopped", "relaying", &["VmStopped"]),
];

/// The same for the target.
pub(crate) const TARGET_STATES: [Place; 16] = [
    ("waiting", "", &[]),
    ("preparing", "waiting", &["Frame Layout"]),
    ("receiving", "preparing", &["VmPrepared"]),
    (
        "receiving, all applied",
        "receiving",
        &["Frame Tail", "Applied"],
    ),
    ("loading", "receiving, all applied", &["Frame Final"]),
    ("proving", "loading", &["VmLoaded"]),
    ("loaded", "proving", &["Proved Ok"]),
    ("rechecking", "loaded", &["Frame Commit"]),
    ("Commit being written", "rechecking", &["Rechecked Ok"]),
    ("starting", "Commit being written", &["Journaled Ok"]),
    ("running", "starting", &["VmResumed"]),
    ("refusing before Loaded", "receiving", &["Abort"]),
    ("refusing after Loaded", "rechecking", &["Rechecked Err"]),
    ("never ran", "starting", &["NeverRan"]),
    ("relay, preparing", "waiting", &["Frame Relay"]),
    ("relaying", "relay, preparing", &["VmPrepared"]),
];

/// Name, name of the state before, inputs from there.
pub(crate) type Place = (&'static str, &'static str, &'static [&'static str]);

/// All inputs from the beginning to a place.
pub(crate) fn way(places: &[Place], name: &str) -> Vec<&'static str> {
    let (_, from, inputs) = places
        .iter()
        .find(|(place, ..)| *place == name)
        .expect("a place of the list");
    let mut all = if from.is_empty() {
        Vec::new()
    } else {
        way(places, from)
    };
    all.extend(*inputs);
    all
}

/// The input of this name.
pub(crate) fn named<T>(inputs: Vec<Named<T>>, name: &str) -> T {
    let found = inputs.into_iter().find(|(known, _)| *known == name);
    found.expect("an input of the list").1
}
