//! A machine of each side, and one of each input.

use std::time::{Duration, Instant};

use bytes::Bytes;
use transport::block::{
    ABSENT_RANGE_BYTES, AbsentRange, BlockId, BlockSpec, PageAddress, PageRun, Root,
};
use transport::session::{Hold, Policy, VmMigration, WhenStuck, source, target};
use transport::wire::{AbortCode, AttemptId, Frame, Offer, RunState, Verdict, Verify};

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

fn runs() -> Vec<PageRun> {
    let first = PageAddress {
        block: BlockId(0),
        page: 0,
    };
    vec![PageRun { first, count: 1 }]
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

fn absent() -> Frame {
    let mut pages = [0; ABSENT_RANGE_BYTES];
    pages[0] = 1;
    Frame::Absent {
        ranges: vec![AbsentRange { range: 0, pages }],
        more: false,
    }
}

fn urgent() -> Frame {
    Frame::Urgent {
        digest: [0; 16],
        runs: runs(),
        data: Bytes::new(),
    }
}

fn last_of(absent_pages: u64) -> Frame {
    Frame::Final {
        root: ROOT,
        barrier: 1,
        tail_bytes: u64::from(TAIL_BYTES),
        missing_taken: 0,
        absent_pages,
    }
}

fn last(root: Root) -> Frame {
    Frame::Final {
        root,
        barrier: 1,
        tail_bytes: u64::from(TAIL_BYTES),
        missing_taken: 0,
        absent_pages: 0,
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
        post_copy: true,
        epoch: 0,
    };
    source::Source::new(now, config)
}

pub(crate) fn target(now: Instant) -> target::Target {
    let config = target::Config {
        attempt: ATTEMPT,
        incarnation: INCARNATION,
        // A relay is refused with a full one.
        verify: Verify::Sample,
        qemu: "10.0.2".into(),
        stay_paused: false,
        epoch: 0,
        nonce: [1; 16],
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
                nonce: [1; 16],
            }),
        ),
        (
            "Frame LayoutTaken",
            frame(Frame::LayoutTaken {
                basis: Bytes::new(),
                offer: Offer::default(),
            }),
        ),
        (
            "Frame Known",
            frame(Frame::Known {
                first: 0,
                numbers: vec![Some(1), None],
            }),
        ),
        ("Frame Missing", frame(Frame::Missing { runs: runs() })),
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
        ("Frame Wanted", frame(Frame::Wanted { runs: runs() })),
        ("Frame Absent", frame(absent())),
        ("Frame AllPages", frame(Frame::AllPages)),
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
                basis: Vec::new(),
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
                absent_pages: 0,
            },
        ),
        (
            "Marked, pages stay behind",
            Input::Marked {
                barrier: 1,
                root: ROOT,
                absent_pages: 2,
            },
        ),
        ("Proved Ok", Input::Proved(Ok(()))),
        ("Proved Err", Input::Proved(Err(text()))),
        ("Journaled Ok", Input::Journaled(Ok(()))),
        ("Journaled Err", Input::Journaled(Err(text()))),
        ("VmCommandFailed", Input::VmCommandFailed(text())),
        ("Abort", Input::Abort(text())),
        ("Downtime", Input::Downtime(Duration::from_millis(100))),
        ("WhenStuck", Input::WhenStuck(WhenStuck::Abort)),
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
    let mut inputs = target_frames();
    inputs.extend(target_events());
    inputs
}

fn target_frames() -> Vec<Named<target::Input>> {
    use target::Input;
    let frame = Input::Frame;
    vec![
        (
            "Frame Layout",
            frame(Frame::Layout {
                head: Bytes::new(),
                blocks: blocks(),
                basis_ranges: 0,
                post_copy: false,
            }),
        ),
        (
            "Frame Layout, basis",
            frame(Frame::Layout {
                head: Bytes::new(),
                blocks: blocks(),
                basis_ranges: 2,
                post_copy: false,
            }),
        ),
        (
            "Frame Basis",
            frame(Frame::Basis {
                digests: vec![[5; 16]; 2],
            }),
        ),
        (
            "Frame Query",
            frame(Frame::Query {
                first: 0,
                prefixes: vec![[6; 8]],
            }),
        ),
        (
            "Frame Probe",
            frame(Frame::Probe {
                ranges: vec![(0, [5; 16])],
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
        ("Frame Absent", frame(absent())),
        ("Frame Urgent", frame(urgent())),
        ("Frame Final, pages stay behind", frame(last_of(2))),
        ("Frame Abort", frame(abort())),
        ("Frame Running", frame(Frame::Running)),
    ]
}

fn target_events() -> Vec<Named<target::Input>> {
    use target::Input;
    vec![
        ("PeerLost", Input::PeerLost(text())),
        (
            "VmPrepared",
            Input::VmPrepared {
                offer: Offer::default(),
            },
        ),
        (
            "VmPrepared, post-copy",
            Input::VmPrepared {
                offer: Offer {
                    post_copy: true,
                    ..Offer::default()
                },
            },
        ),
        (
            "BasisAgreed",
            Input::BasisAgreed {
                basis: Bytes::from_static(&[3]),
            },
        ),
        ("Missing", Input::Missing(runs())),
        ("VmFailed", Input::VmFailed(text())),
        (
            "Applied",
            Input::Applied {
                barrier: 1,
                root: ROOT,
                missing_pages: 0,
            },
        ),
        (
            "Applied, pages missing",
            Input::Applied {
                barrier: 1,
                root: ROOT,
                missing_pages: 2,
            },
        ),
        ("LaneFailed", Input::LaneFailed(text())),
        ("VmLoaded", Input::VmLoaded),
        ("LeftOut", Input::LeftOut(Ok(ROOT))),
        ("LeftOut, other root", Input::LeftOut(Ok(OTHER))),
        ("LeftOut Err", Input::LeftOut(Err(text()))),
        ("AllPages", Input::AllPages),
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
