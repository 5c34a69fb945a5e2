//! Frames come back as they were; what is no frame is refused by its own error.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use transport::block::BlockSpec;
use transport::wire::*;

use crate::any_frame;

/// Reads all frames of a stream that comes in pieces.
fn read(stream: &[u8], piece: usize) -> Result<Vec<Frame>, WireError> {
    let mut reader = FrameReader::new();
    let mut frames = Vec::new();
    for bytes in stream.chunks(piece) {
        reader.push(bytes);
        while let Some(frame) = reader.next_frame()? {
            frames.push(frame);
        }
    }
    assert!(reader.is_between_frames() || frames.is_empty());
    Ok(frames)
}

/// A frame of a type with a body.
fn forged(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 1).unwrap();
    [&length.to_be_bytes()[..], &[kind], body].concat()
}

fn check(stream: &[u8], expected: WireError) {
    assert_eq!(read(stream, 4096), Err(expected));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// decode(encode(x)) == x, under any split of the stream.
    #[test]
    fn frames_come_back(
        frames in prop::collection::vec(any_frame::frame(), 1..6),
        piece in prop_oneof![1_usize..20, Just(4096)],
    ) {
        let mut stream = BytesMut::new();
        for frame in &frames {
            frame.encode(&mut stream).unwrap();
        }
        // Megabytes in pieces of one byte take long and show nothing more.
        let piece = if stream.len() > 100_000 { 4096 } else { piece };
        prop_assert_eq!(read(&stream, piece).unwrap(), frames);
    }

    /// A frame cut short and sealed again is an error, and never another frame that panics.
    #[test]
    fn truncated_frames_are_refused(frame in any_frame::frame(), cut in any::<prop::sample::Index>()) {
        let mut stream = BytesMut::new();
        frame.encode(&mut stream).unwrap();
        let body = &stream[5..];
        // These go to the end of the frame, whatever that is.
        let is_open = matches!(
            frame,
            Frame::Tail { .. }
                | Frame::Basis { .. }
                | Frame::LayoutTaken { .. }
                | Frame::Probe { .. }
                | Frame::Query { .. }
                | Frame::Missing { .. }
                | Frame::Absent { .. }
                | Frame::Wanted { .. }
                | Frame::Urgent { .. }
        );
        if body.is_empty() || is_open {
            return Ok(());
        }
        let result = read(&forged(stream[4], &body[..cut.index(body.len())]), 4096);
        prop_assert!(matches!(result, Err(WireError::PeerTruncated { .. })), "{:?}", result);
    }

    /// Any bytes: frames, an error or a wait for more; never a panic.
    #[test]
    fn any_bytes_are_survived(
        kind in 0_u8..36,
        body in prop::collection::vec(any::<u8>(), 0..200),
        after in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut reader = FrameReader::new();
        reader.push(&forged(kind, &body));
        reader.push(&after);
        while let Ok(Some(_)) = reader.next_frame() {}
    }
}

/// Lengths at and above the limit, before their bytes are there.
#[test]
fn frame_length_is_bounded() {
    check(&[0, 0, 0, 0], WireError::PeerFrameLength(0));
    check(
        &u32::MAX.to_be_bytes(),
        WireError::PeerFrameLength(u32::MAX),
    );
    let most = u32::try_from(limits::FRAME_MAX_BYTES - 4).unwrap();
    check(
        &(most + 1).to_be_bytes(),
        WireError::PeerFrameLength(most + 1),
    );
    assert_eq!(read(&most.to_be_bytes(), 4), Ok(vec![]));
}

/// Types that this version does not have, and bytes after the last field.
#[test]
fn unknown_and_trailing_are_refused() {
    check(&forged(0, &[]), WireError::UnknownFrame(0));
    check(&forged(200, &[1, 2, 3]), WireError::UnknownFrame(200));
    check(
        &forged(11, &[0]),
        WireError::PeerTrailing {
            frame: 11,
            bytes: 1,
        },
    );
    check(
        &forged(6, &[0; 7]),
        WireError::PeerTrailing { frame: 6, bytes: 3 },
    );
}

/// Fields with values or lengths that they may not have.
#[test]
fn wrong_fields_are_refused() {
    check(
        &forged(2, &[9, 0, 0]),
        WireError::PeerValue {
            frame: 2,
            field: "verify",
        },
    );
    check(
        &forged(2, &[0, 0, 2, 0xff, 0xfe]),
        WireError::PeerValue {
            frame: 2,
            field: "qemu",
        },
    );
    let long = [&[1_u8][..], &1025_u16.to_be_bytes(), &[b'x'; 1025]].concat();
    check(
        &forged(15, &long),
        WireError::PeerTooLong {
            field: "detail",
            bytes: 1025,
            bytes_max: 1024,
        },
    );
    check(
        &forged(3, &65_537_u32.to_be_bytes()),
        WireError::PeerTooLong {
            field: "head",
            bytes: 65_537,
            bytes_max: 65_536,
        },
    );
    check(
        &forged(3, &[0, 0, 0, 0, 0x04, 0x01]),
        WireError::PeerTooLong {
            field: "blocks",
            bytes: 1025,
            bytes_max: 1024,
        },
    );
    check(
        &forged(7, &(1_048_577_u32).to_be_bytes()),
        WireError::PeerTooLong {
            field: "raw_len",
            bytes: 1_048_577,
            bytes_max: 1_048_576,
        },
    );
}

/// What is too long is refused before it is sent, and leaves the buffer as it was.
#[test]
fn own_limits_are_kept() {
    let check = |frame: Frame, field: &'static str, bytes: usize, bytes_max: usize| {
        let mut out = BytesMut::from(&b"before"[..]);
        assert_eq!(
            frame.encode(&mut out),
            Err(WireError::LocalTooLong {
                field,
                bytes,
                bytes_max
            })
        );
        assert_eq!(out[..], b"before"[..]);
    };
    let detail = "x".repeat(1025);
    check(
        Frame::Abort {
            code: AbortCode::Qemu,
            detail,
        },
        "detail",
        1025,
        1024,
    );
    let head = Bytes::from(vec![0; 65_537]);
    check(
        Frame::Layout {
            head,
            blocks: vec![],
            basis_ranges: 0,
            post_copy: false,
        },
        "head",
        65_537,
        65_536,
    );
    let block = BlockSpec {
        name: "n".repeat(256),
        pages: 1,
    };
    check(
        Frame::Layout {
            head: Bytes::new(),
            blocks: vec![block],
            basis_ranges: 0,
            post_copy: false,
        },
        "block name",
        256,
        255,
    );
    let block = BlockSpec {
        name: "n".into(),
        pages: 1,
    };
    let blocks = vec![block; 1025];
    check(
        Frame::Layout {
            head: Bytes::new(),
            blocks,
            basis_ranges: 0,
            post_copy: false,
        },
        "blocks",
        1025,
        1024,
    );
    let data = Bytes::from(vec![0; limits::FRAME_MAX_BYTES - 8]);
    let (whole, most) = (limits::FRAME_MAX_BYTES + 1, limits::FRAME_MAX_BYTES);
    check(Frame::Tail { data, raw_len: 0 }, "frame", whole, most);
}

/// The secret that a hello may carry never reaches a log.
#[test]
fn debug_of_hello_hides_the_secret() {
    let hello = Hello {
        version: PROTOCOL_VERSION,
        features: FEATURES,
        role: Role::Target,
        purpose: Purpose::Migrate,
        vm: "vm".into(),
        attempt: AttemptId([0; 16]),
        incarnation: 1,
        secret_id: Some([231; 16]),
        secret: Some([231; 32]),
        software: "scaleaway".into(),
    };
    let text = format!("{:?}", Frame::Hello(hello));
    assert!(!text.contains("231"), "{text}");
}
