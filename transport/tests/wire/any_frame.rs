//! Any frame within its limits.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use transport::block::{BlockSpec, Root};
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
        select(vec![Purpose::Migrate, Purpose::Settle]),
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
    (bytes(limits::HEAD_MAX_BYTES), blocks)
        .prop_map(|(head, blocks)| Frame::Layout { head, blocks })
}

/// Any frame that may be sent.
pub(crate) fn frame() -> impl Strategy<Value = Frame> {
    let verify = select(vec![Verify::Off, Verify::Sample, Verify::Full]);
    let run_state = select(vec![RunState::Running, RunState::Paused]);
    let raw_len = 0..=u32::try_from(limits::FRAME_MAX_BYTES).unwrap();
    prop_oneof![
        hello().prop_map(Frame::Hello),
        (verify, text()).prop_map(|(verify, qemu)| Frame::Ready { verify, qemu }),
        layout(),
        Just(Frame::LayoutTaken),
        any::<[u64; 8]>().prop_map(|applied_bytes| Frame::Progress { applied_bytes }),
        any::<u32>().prop_map(|barrier| Frame::Applied { barrier }),
        (bytes(limits::FRAME_MAX_BYTES - 9), raw_len)
            .prop_map(|(data, raw_len)| Frame::Tail { data, raw_len }),
        (root(), any::<u32>(), any::<u64>()).prop_map(|(root, barrier, tail_bytes)| Frame::Final {
            root,
            barrier,
            tail_bytes
        }),
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
