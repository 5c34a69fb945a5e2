//! Any frame within its limits.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use transport::block::{AbsentRange, BlockId, BlockSpec, PageAddress, PageRun, Root};
use transport::wire::*;

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zäß€ 0-9]{0,40}",
        Just("x".repeat(limits::TEXT_MAX_BYTES))
    ]
}

fn bytes(bytes_max: usize) -> impl Strategy<Value = Bytes> {
    prop_oneof![8 => vec(any::<u8>(), 0..200), 1 => Just(vec![7; bytes_max])].prop_map(Bytes::from)
}

fn attempt() -> impl Strategy<Value = AttemptId> {
    any::<[u8; 16]>().prop_map(AttemptId)
}

fn root() -> impl Strategy<Value = Root> {
    any::<[u8; 32]>().prop_map(Root)
}

fn verdict() -> impl Strategy<Value = Verdict> {
    select(vec![
        Verdict::Unknown,
        Verdict::Refused,
        Verdict::NeverRan,
        Verdict::Committed,
        Verdict::Running,
        Verdict::Stayed,
    ])
}

fn abort_code() -> impl Strategy<Value = AbortCode> {
    select(vec![
        AbortCode::Operator,
        AbortCode::Incompatible,
        AbortCode::Qemu,
        AbortCode::Protocol,
        AbortCode::Memory,
        AbortCode::Resources,
        AbortCode::Unsettled,
        AbortCode::Link,
    ])
}

fn hello() -> impl Strategy<Value = Hello> {
    let numbers = (any::<u16>(), any::<u64>(), any::<u64>());
    let kinds = (
        select(vec![Role::Source, Role::Target]),
        select(vec![Purpose::Migrate, Purpose::Settle, Purpose::Probe]),
    );
    let secrets = (any::<Option<[u8; 16]>>(), any::<Option<[u8; 32]>>());
    (numbers, kinds, text(), attempt(), secrets, text()).prop_map(
        |(
            (version, features, incarnation),
            (role, purpose),
            vm,
            attempt,
            (secret_id, secret),
            software,
        )| Hello {
            version,
            features,
            role,
            purpose,
            vm,
            attempt,
            incarnation,
            secret_id,
            secret,
            software,
        },
    )
}

fn layout() -> impl Strategy<Value = Frame> {
    let block =
        ("[a-z./0-9:@]{0,255}", any::<u32>()).prop_map(|(name, pages)| BlockSpec { name, pages });
    let blocks = prop_oneof![
        8 => vec(block, 0..20),
        1 => Just(vec![
            BlockSpec { name: "n".repeat(255), pages: u32::MAX };
            limits::BLOCKS_MAX
        ]),
    ];
    let asked = (any::<u32>(), any::<bool>());
    (bytes(limits::HEAD_MAX_BYTES), blocks, asked).prop_map(
        |(head, blocks, (basis_ranges, post_copy))| Frame::Layout {
            head,
            blocks,
            basis_ranges,
            post_copy,
        },
    )
}

/// A list, now and then as long as it may be.
fn list<T: Clone + std::fmt::Debug>(
    entry: impl Strategy<Value = T> + Clone,
    entries_max: usize,
) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![
        8 => vec(entry.clone(), 0..40),
        1 => entry.prop_map(move |entry| vec![entry; entries_max]),
    ]
}

fn run() -> impl Strategy<Value = PageRun> + Clone {
    (any::<u16>(), any::<u32>(), any::<u16>()).prop_map(|(block, page, count)| PageRun {
        first: PageAddress {
            block: BlockId(block),
            page,
        },
        count,
    })
}

/// What the two sides hold already.
fn references() -> impl Strategy<Value = Frame> {
    let offer = (any::<bool>(), any::<u32>(), any::<bool>()).prop_map(
        |(readable, known_pages, post_copy)| Offer {
            readable,
            known_pages,
            post_copy,
        },
    );
    prop_oneof![
        list(any::<[u8; 16]>(), limits::BASIS_MAX_DIGESTS)
            .prop_map(|digests| Frame::Basis { digests }),
        (bytes(limits::FRAME_MAX_BYTES / 2), offer)
            .prop_map(|(basis, offer)| Frame::LayoutTaken { basis, offer }),
        (
            any::<u32>(),
            list(any::<[u8; 8]>(), limits::QUERY_MAX_PAGES)
        )
            .prop_map(|(first, prefixes)| Frame::Query { first, prefixes }),
        (
            any::<u32>(),
            list(any::<Option<u32>>(), limits::QUERY_MAX_PAGES)
        )
            .prop_map(|(first, numbers)| Frame::Known { first, numbers }),
        list((any::<u32>(), any::<[u8; 16]>()), limits::PROBE_MAX_RANGES)
            .prop_map(|ranges| Frame::Probe { ranges }),
        list(run(), limits::MISSING_MAX_RUNS).prop_map(|runs| Frame::Missing { runs }),
    ]
}

fn post_copy() -> impl Strategy<Value = Frame> {
    let range = (any::<u32>(), any::<[u8; 32]>()).prop_map(|(range, half)| AbsentRange {
        range,
        pages: std::array::from_fn(|byte| half[byte / 2]),
    });
    let urgent = vec(run(), 0..limits::URGENT_MAX_PAGES).prop_map(|mut runs| {
        runs.iter_mut().for_each(|run| run.count %= 2);
        runs
    });
    prop_oneof![
        (list(range, limits::ABSENT_MAX_RANGES), any::<bool>())
            .prop_map(|(ranges, more)| Frame::Absent { ranges, more }),
        list(run(), limits::MISSING_MAX_RUNS).prop_map(|runs| Frame::Wanted { runs }),
        (
            any::<[u8; 16]>(),
            urgent,
            bytes(limits::FRAME_MAX_BYTES / 2)
        )
            .prop_map(|(digest, runs, data)| Frame::Urgent { digest, runs, data }),
        Just(Frame::AllPages),
    ]
}

/// Any frame that may be sent.
pub(crate) fn frame() -> impl Strategy<Value = Frame> {
    let verify = select(vec![Verify::Off, Verify::Sample, Verify::Full]);
    let run_state = select(vec![RunState::Running, RunState::Paused]);
    let raw_len = 0..=u32::try_from(limits::FRAME_MAX_BYTES).unwrap();
    prop_oneof![
        hello().prop_map(Frame::Hello),
        (verify, text(), any::<[u8; 16]>()).prop_map(|(verify, qemu, nonce)| Frame::Ready {
            verify,
            qemu,
            nonce
        }),
        layout(),
        references(),
        any::<[u64; 8]>().prop_map(|applied_bytes| Frame::Progress { applied_bytes }),
        any::<u32>().prop_map(|barrier| Frame::Applied { barrier }),
        (bytes(limits::FRAME_MAX_BYTES - 9), raw_len)
            .prop_map(|(data, raw_len)| Frame::Tail { data, raw_len }),
        (root(), any::<(u32, u64, u32, u64)>()).prop_map(
            |(root, (barrier, tail_bytes, missing_taken, absent_pages))| Frame::Final {
                root,
                barrier,
                tail_bytes,
                missing_taken,
                absent_pages,
            }
        ),
        post_copy(),
        root().prop_map(|root| Frame::Loaded { root }),
        (attempt(), any::<u64>(), root(), run_state).prop_map(
            |(attempt, target_incarnation, root, run_state)| Frame::Commit {
                attempt,
                target_incarnation,
                root,
                run_state
            }
        ),
        Just(Frame::Running),
        Just(Frame::Stopped),
        Just(Frame::Relay),
        (attempt(), verdict(), any::<u64>()).prop_map(|(attempt, verdict, epoch)| Frame::Answer {
            attempt,
            verdict,
            epoch
        }),
        (attempt(), verdict(), any::<u64>()).prop_map(|(attempt, verdict, epoch)| Frame::Ask {
            attempt,
            verdict,
            epoch
        }),
        attempt().prop_map(|attempt| Frame::Settled { attempt }),
        (abort_code(), text()).prop_map(|(code, detail)| Frame::Abort { code, detail }),
    ]
}
