//! CPU cost of framing: bytes per second and core.

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use transport::block::{BlockSpec, Root};
use transport::wire::*;

fn frames() -> [(&'static str, Frame); 3] {
    let block = |n: u32| BlockSpec {
        name: format!("/machine/memory{n}"),
        pages: 1 << 18,
    };
    [
        (
            "layout-of-64-blocks",
            Frame::Layout {
                head: Bytes::from(vec![7; 2000]),
                blocks: (0..64).map(block).collect(),
                basis_ranges: 0,
                post_copy: false,
            },
        ),
        (
            "tail-64KiB",
            Frame::Tail {
                data: Bytes::from(vec![7; 64 << 10]),
                raw_len: 1 << 18,
            },
        ),
        (
            "final",
            Frame::Final {
                root: Root([1; 32]),
                barrier: 1,
                tail_bytes: 1,
                missing_taken: 0,
                absent_pages: 0,
            },
        ),
    ]
}

fn control(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("control");
    for (name, frame) in frames() {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes).expect("within limits");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        let mut out = BytesMut::with_capacity(bytes.len());
        group.bench_function(format!("encode/{name}"), |bencher| {
            bencher.iter(|| {
                out.clear();
                frame.encode(&mut out)
            });
        });
        group.bench_function(format!("decode/{name}"), |bencher| {
            bencher.iter(|| {
                let mut reader = FrameReader::new();
                reader.push(&bytes);
                reader.next_frame()
            });
        });
    }
}

/// A lane of batches of 90 KB, as compressed ones are, that comes in pieces of 64 KiB.
fn lane(criterion: &mut Criterion) {
    let mut stream = BytesMut::new();
    LaneHeader {
        lane: 0,
        incarnation: 1,
        first_seq: 1,
    }
    .put(&mut stream);
    for _ in 0..64 {
        stream.extend_from_slice(&90_001_u32.to_be_bytes());
        stream.extend_from_slice(&[1]);
        stream.extend_from_slice(&[7; 90_000]);
    }
    let mut group = criterion.benchmark_group("lane");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    group.bench_function("cut-into-batches", |bencher| {
        bencher.iter(|| {
            let mut framer = LaneFramer::new();
            let mut batches = 0;
            for bytes in stream.chunks(64 << 10) {
                framer.push(bytes);
                while let Ok(Some(_)) = framer.next_item() {
                    batches += 1;
                }
            }
            batches
        });
    });
}

criterion_group!(benches, control, lane);
criterion_main!(benches);
