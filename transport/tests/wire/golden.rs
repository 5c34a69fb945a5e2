//! Some frames, byte by byte. A change here is a change of the protocol.

use bytes::{Bytes, BytesMut};
use transport::block::{
    ABSENT_RANGE_BYTES, AbsentRange, BlockId, BlockSpec, PageAddress, PageRun, Root,
};
use transport::wire::*;

fn check(frame: Frame, expected: &[&[u8]]) {
    let mut out = BytesMut::new();
    frame.encode(&mut out).unwrap();
    let expected = expected.concat();
    assert_eq!(out[..], expected[..]);
    let mut reader = FrameReader::new();
    reader.push(&expected);
    assert_eq!(reader.next_frame(), Ok(Some(frame)));
    assert!(reader.is_between_frames());
}

/// The first frame of a source.
#[test]
#[rustfmt::skip]
fn hello_wire_format() {
    let hello = Hello {
        version: 1,
        features: 0x0102,
        role: Role::Source,
        purpose: Purpose::Migrate,
        vm: "web".into(),
        attempt: AttemptId([0xaa; 16]),
        incarnation: 0x1122_3344_5566_7788,
        secret_id: Some([0xbb; 16]),
        secret: None,
        software: "scaleaway 0.1.0".into(),
    };
    check(Frame::Hello(hello), &[
        &[0x00, 0x00, 0x00, 0x4d],                         // 77 bytes follow
        &[0x01],                                           // hello
        &[0x00, 0x01],                                     // version 1
        &[0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x02], // features
        &[0x01],                                           // source
        &[0x01],                                           // migrate
        &[0x00, 0x03], b"web",                             // VM
        &[0xaa; 16],                                       // attempt
        &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88], // incarnation
        &[0x01], &[0xbb; 16],                              // secret's id
        &[0x00],                                           // no secret
        &[0x00, 0x0f], b"scaleaway 0.1.0",                 // software
    ]);
}

/// The block list.
#[test]
#[rustfmt::skip]
fn layout_wire_format() {
    let blocks = vec![
        BlockSpec { name: "pc.ram".into(), pages: 0x0001_0000 },
        BlockSpec { name: "pc.rom".into(), pages: 32 },
    ];
    let layout = Frame::Layout { head: Bytes::from_static(b"QEVM"), blocks, basis_ranges: 129, post_copy: true };
    check(layout, &[
        &[0x00, 0x00, 0x00, 0x26],                         // 38 bytes follow
        &[0x03],                                           // layout
        &[0x00, 0x00, 0x00, 0x04], b"QEVM",                // head
        &[0x00, 0x02],                                     // two blocks
        &[0x06], b"pc.ram", &[0x00, 0x01, 0x00, 0x00],     // 65536 pages
        &[0x06], b"pc.rom", &[0x00, 0x00, 0x00, 0x20],     // 32 pages
        &[0x00, 0x00, 0x00, 0x81],                         // digests of 129 ranges follow
        &[0x01],                                           // pages may stay behind
    ]);
}

/// The point of no return.
#[test]
#[rustfmt::skip]
fn commit_wire_format() {
    let commit = Frame::Commit {
        attempt: AttemptId([0xaa; 16]),
        target_incarnation: 5,
        root: Root([0xcc; 32]),
        run_state: RunState::Running,
    };
    check(commit, &[
        &[0x00, 0x00, 0x00, 0x3a],                         // 58 bytes follow
        &[0x0a],                                           // commit
        &[0xaa; 16],                                       // attempt
        &[0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x05], // target's incarnation
        &[0xcc; 32],                                       // root
        &[0x01],                                           // it runs
    ]);
}

/// What the target holds already.
#[test]
#[rustfmt::skip]
fn references_wire_format() {
    check(Frame::Basis { digests: vec![[0xaa; 16], [0xbb; 16]] }, &[
        &[0, 0, 0, 33, 0x12], &[0xaa; 16], &[0xbb; 16],
    ]);
    check(Frame::Probe { ranges: vec![(3, [0xaa; 16])] }, &[
        &[0, 0, 0, 21, 0x20],
        &[0, 0, 0, 3], &[0xaa; 16],                        // range 3 and its digest
    ]);
    check(Frame::Query { first: 8, prefixes: vec![[0xaa; 8], [0xbb; 8]] }, &[
        &[0, 0, 0, 21, 0x13],
        &[0, 0, 0, 8],                                     // the first has number 8
        &[0xaa; 8], &[0xbb; 8],
    ]);
    check(Frame::Known { first: 8, numbers: vec![None, Some(7)] }, &[
        &[0, 0, 0, 12, 0x14],
        &[0, 0, 0, 8], &[0, 2],                            // two answers from number 8 on
        &[0b10],                                           // the second is held
        &[0, 0, 0, 7],                                     // as page 7
    ]);
    let first = PageAddress { block: BlockId(1), page: 2 };
    check(Frame::Missing { runs: vec![PageRun { first, count: 3 }] }, &[
        &[0, 0, 0, 9, 0x15],
        &[0, 1], &[0, 0, 0, 2], &[0, 3],                   // block 1, from page 2 on, 3 pages
    ]);
}

/// Post-copy.
#[test]
#[rustfmt::skip]
fn post_copy_wire_format() {
    let mut pages = [0; ABSENT_RANGE_BYTES];
    pages[1] = 0x81;
    let ranges = vec![AbsentRange { range: 5, pages }];
    check(Frame::Absent { ranges, more: true }, &[
        &[0, 0, 0, 70, 0x16],
        &[1],                                              // another one follows
        &[0, 0, 0, 5],                                     // range 5
        &[0, 0x81], &[0; 62],                              // its pages 8 and 15
    ]);
    let first = PageAddress { block: BlockId(1), page: 2 };
    check(Frame::Wanted { runs: vec![PageRun { first, count: 1 }] }, &[
        &[0, 0, 0, 9, 0x17],
        &[0, 1], &[0, 0, 0, 2], &[0, 1],                   // block 1, page 2
    ]);
    let runs = vec![PageRun { first, count: 1 }];
    check(Frame::Urgent { digest: [9; 16], runs, data: Bytes::from_static(&[0x28, 0xb5]) }, &[
        &[0, 0, 0, 29, 0x18],
        &[9; 16],                                          // digest
        &[0, 1], &[0, 1], &[0, 0, 0, 2], &[0, 1],          // one run
        &[0x28, 0xb5],                                     // zstd to the end of the frame
    ]);
    check(Frame::AllPages, &[&[0, 0, 0, 1, 0x19]]);
    check(
        Frame::Final { root: Root([7; 32]), barrier: 2, tail_bytes: 3, missing_taken: 4, absent_pages: 5 },
        &[
            &[0, 0, 0, 57, 0x08],
            &[7; 32],
            &[0, 0, 0, 2],                                 // barrier
            &[0, 0, 0, 0, 0, 0, 0, 3],                     // bytes of device state
            &[0, 0, 0, 4],                                 // Missing frames taken
            &[0, 0, 0, 0, 0, 0, 0, 5],                     // pages that stay behind
        ],
    );
}

/// The smaller ones.
#[test]
#[rustfmt::skip]
fn small_frames_wire_format() {
    let offer = Offer { readable: true, known_pages: 3, post_copy: true };
    check(Frame::LayoutTaken { basis: Bytes::from_static(&[0x05]), offer }, &[
        &[0, 0, 0, 8, 0x04],
        &[1],                                              // its image can be read
        &[0, 0, 0, 3],                                     // it may name 3 pages
        &[1],                                              // pages may come after the stop
        &[0x05],                                           // ranges 0 and 2 are equal
    ]);
    check(Frame::Running, &[&[0, 0, 0, 1, 0x0b]]);
    check(Frame::Applied { barrier: 3 }, &[&[0, 0, 0, 5, 0x06, 0, 0, 0, 3]]);
    check(Frame::Ready { verify: Verify::Sample, qemu: "10.0.2".into(), nonce: [9; 16] }, &[
        &[0, 0, 0, 26, 0x02],
        &[0x01],                                           // sample
        &[0, 6], b"10.0.2",
        &[9; 16],                                          // nonce
    ]);
    check(Frame::Tail { data: Bytes::from_static(&[0x28, 0xb5]), raw_len: 9 }, &[
        &[0, 0, 0, 7, 0x07],
        &[0, 0, 0, 9],                                     // 9 bytes when unpacked
        &[0x28, 0xb5],                                     // zstd to the end of the frame
    ]);
    check(Frame::Answer { attempt: AttemptId([1; 16]), verdict: Verdict::NeverRan, epoch: 2 }, &[
        &[0, 0, 0, 26, 0x0c],
        &[1; 16],
        &[0x02],                                           // never ran
        &[0, 0, 0, 0, 0, 0, 0, 2],
    ]);
    check(Frame::Abort { code: AbortCode::Memory, detail: "differs".into() }, &[
        &[0, 0, 0, 11, 0x0f],
        &[0x05],                                           // memory
        &[0, 7], b"differs",
    ]);
}
