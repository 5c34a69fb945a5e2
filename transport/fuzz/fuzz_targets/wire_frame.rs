//! Any bytes on the control stream: never a panic; what is read is written again as the same
//! bytes, whatever the split.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use transport::wire::{Frame, FrameReader, tail};

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, stream) = input;
    let mut reader = FrameReader::new();
    let mut written = BytesMut::new();
    for bytes in stream.chunks(usize::from(piece).max(1)) {
        reader.push(bytes);
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => {
                    frame
                        .encode(&mut written)
                        .expect("a frame that was read is within limits");
                    assert!(
                        stream.starts_with(&written),
                        "{frame:?} came out differently"
                    );
                    if let Frame::Tail { data, raw_len } = frame {
                        let _: Result<Vec<u8>, _> = tail::unpack(&data, raw_len);
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
