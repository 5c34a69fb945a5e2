//! The fuzzers' seeds, replayed: they are what an honest peer sends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use transport::block::*;
use transport::wire::*;

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty());
    paths
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

/// Every control seed is whole frames, and is written again as it was.
#[test]
fn control_seeds_are_read() {
    for (path, seed) in seeds("wire_frame") {
        let mut reader = FrameReader::new();
        reader.push(&seed[1..]);
        let mut written = bytes::BytesMut::new();
        while let Some(frame) = reader.next_frame().unwrap() {
            frame.encode(&mut written).unwrap();
        }
        assert_eq!(written[..], seed[1..], "{}", path.display());
    }
}

/// Every lane seed is batches that are applied.
#[test]
fn lane_seeds_are_applied() {
    /// What the fuzzer's target holds, whatever was written.
    struct Nowhere;
    impl Sink for Nowhere {
        fn zero(&mut self, _: PageAddress, _: u32) -> std::io::Result<()> {
            Ok(())
        }
        fn page(&mut self, _: PageAddress, _: &[u8; PAGE_SIZE]) -> std::io::Result<()> {
            Ok(())
        }
        fn read(&mut self, at: PageAddress, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
            into.fill(at.page.to_be_bytes()[3]);
            Ok(())
        }
        fn known(&mut self, number: u32, into: &mut [u8; PAGE_SIZE]) -> std::io::Result<()> {
            into.fill(number.to_be_bytes()[3]);
            Ok(())
        }
    }
    let blocks = vec![
        BlockSpec {
            name: "ram".into(),
            pages: 5000,
        },
        BlockSpec {
            name: "rom".into(),
            pages: 40,
        },
    ];
    let layout = Arc::new(Layout::new(blocks).unwrap());
    for (path, seed) in seeds("lane_batch") {
        let lane = usize::from(seed[0]);
        let part = Ledger::split(&layout, &[1; 32])[lane].clone();
        let mut decoder = LaneDecoder::new(part, &[1; 32], 7).unwrap();
        let header = LaneHeader {
            lane,
            incarnation: 7,
            first_seq: FIRST_SEQ,
        };
        decoder.open(&header).unwrap();
        let mut stream = bytes::BytesMut::new();
        header.put(&mut stream);
        stream.extend_from_slice(&seed[2..]);
        let mut framer = LaneFramer::new();
        framer.push(&stream);
        while let Some(item) = framer.next_item().unwrap() {
            if let LaneItem::Batch(body) = item {
                let applied = decoder.apply(&body, &mut Nowhere).unwrap();
                assert_eq!(applied.missing, [], "{}", path.display());
            }
        }
        assert!(framer.is_between_frames());
        assert!(decoder.ledger().announced_pages() > 0, "{}", path.display());
    }
}
