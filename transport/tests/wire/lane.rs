//! Cutting a lane into items.

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use transport::wire::*;

const HEADER: LaneHeader = LaneHeader {
    lane: 7,
    incarnation: 9,
    first_seq: 1,
};

fn items(stream: &[u8], piece: usize) -> Result<Vec<LaneItem>, WireError> {
    let mut framer = LaneFramer::new();
    let mut items = Vec::new();
    for bytes in stream.chunks(piece) {
        framer.push(bytes);
        while let Some(item) = framer.next_item()? {
            items.push(item);
        }
    }
    Ok(items)
}

/// A lane with a header and then these bytes.
fn after_header(bytes: &[u8]) -> BytesMut {
    let mut stream = BytesMut::new();
    HEADER.put(&mut stream);
    stream.put_slice(bytes);
    stream
}

proptest! {
    /// Items come back whole, in order, with all their bytes counted, under any split.
    #[test]
    fn any_split_gives_the_same_items(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
        piece in 1_usize..400,
    ) {
        let mut stream = after_header(&[]);
        let mut expected = vec![LaneItem::Header(HEADER)];
        for (barrier, body) in (1..).zip(bodies) {
            stream.put_u32(u32::try_from(body.len() + 1).unwrap());
            stream.put_u8(1);
            stream.put_slice(&body);
            expected.push(LaneItem::Batch(body.into()));
            put_mark(&mut stream, barrier);
            expected.push(LaneItem::Mark { barrier });
        }
        let found = items(&stream, piece).unwrap();
        prop_assert_eq!(found.iter().map(LaneItem::wire_bytes).sum::<usize>(), stream.len());
        prop_assert_eq!(found, expected);
    }

    /// Any bytes: items, an error or a wait for more; never a panic.
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300), header in any::<bool>()) {
        let stream = if header { after_header(&bytes).to_vec() } else { bytes };
        assert!(items(&stream, 64).is_ok() || items(&stream, 1).is_err());
    }
}

/// What does not begin as a lane of this version is refused at its first wrong byte.
#[test]
fn wrong_headers_are_refused() {
    let good = after_header(&[]);
    for place in 0..4 {
        let mut stream = good.clone();
        stream[place] ^= 1;
        assert_eq!(items(&stream[..=place], 1), Err(WireError::PeerLaneHeader));
    }
    let mut lane = good.clone();
    lane[4] = 8;
    assert_eq!(items(&lane, 5), Err(WireError::PeerLaneHeader));
    let mut first_seq = good;
    first_seq[16] = 0;
    assert_eq!(items(&first_seq, 5), Err(WireError::PeerLaneHeader));
}

/// Lengths and kinds outside the protocol, before their bytes are there.
#[test]
fn wrong_frames_are_refused() {
    let check = |bytes: &[u8], expected: WireError| {
        assert_eq!(items(&after_header(bytes), 1), Err(expected));
    };
    check(&[0, 0, 0, 0], WireError::PeerLaneFrameLength(0));
    let most = u32::try_from(limits::BATCH_MAX_BYTES - 4).unwrap();
    check(
        &(most + 1).to_be_bytes(),
        WireError::PeerLaneFrameLength(most + 1),
    );
    assert_eq!(
        items(&after_header(&most.to_be_bytes()), 1).unwrap().len(),
        1
    );
    check(&[0, 0, 0, 1, 2], WireError::PeerLaneFrameLength(1));
    check(
        &[0, 0, 0, 6, 2, 0, 0, 0, 1, 0],
        WireError::PeerLaneFrameLength(6),
    );
    check(&[0, 0, 0, 1, 3], WireError::UnknownLaneFrame(3));
}
