//! One batch, byte by byte. A change here is a change of the protocol.

use bytes::BytesMut;
use transport::block::*;

use crate::memory::*;

/// Lane 0's header, then its first batch: page 1 of "ram" raw, pages 2 and 3 zero.
#[test]
fn batch_wire_format() {
    let mut source = Memory::default();
    source.write(ram(1), random_page(7));
    let mut out = BytesMut::new();
    let mut encoder = encoder(0, Disable::default());
    encoder.header(INCARNATION).put(&mut out);
    encoder
        .encode(&data(1..4), &Sources::of(&source), &mut out)
        .unwrap();
    transport::wire::put_mark(&mut out, 5);

    #[rustfmt::skip]
    let before_digest = [
        0x53, 0x57, 0x4c, 0x01,                         // "SWL", version 1
        0x00,                                           // lane 0
        0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, // incarnation
        0x00, 0x00, 0x00, 0x03,                         // first batch is number 3
        0x00, 0x00, 0x10, 0x31,                         // 4145 bytes follow
        0x01,                                           // a batch
        0x00, 0x00, 0x00, 0x03,                         // number 3
        0x00, 0x02,                                     // two records
        0x00, 0x00, 0x00, 0x00,                         // no literal bytes
        0x00, 0x00, 0x00, 0x00,                         // no delta bytes
    ];
    #[rustfmt::skip]
    let records = [
        0x07, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x01, // raw, block 0, page 1, 1 page
        0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x02, // zero, block 0, page 2, 2 pages
    ];
    #[rustfmt::skip]
    let mark = [
        0x00, 0x00, 0x00, 0x05,                         // 5 bytes follow
        0x02,                                           // a mark
        0x00, 0x00, 0x00, 0x05,                         // barrier 5
    ];
    // The digest as the spec words it.
    let mut digest =
        blake3::Hasher::new_keyed(&blake3::derive_key("scaleaway/1 batch digest", &KEY));
    digest.update(&[0]).update(&[0, 0, 0, 3]).update(&records);
    for page in [random_page(7), [0; PAGE_SIZE], [0; PAGE_SIZE]] {
        digest.update(&blake3::keyed_hash(&KEY, &page).as_bytes()[..16]);
    }
    let digest = digest.finalize();
    let expected = [
        &before_digest[..],
        &digest.as_bytes()[..16],
        &records,
        &random_page(7),
        &mark,
    ]
    .concat();
    assert_eq!(out[..], expected[..]);
}

/// A literal frame as it may send it: any zstd that unpacks to the pages is right.
#[test]
fn literal_frame_is_zstd() {
    let mut source = Memory::default();
    source.write(ram(0), text_page(1));
    source.write(ram(1), text_page(2));
    let mut out = BytesMut::new();
    encoder(0, Disable::default())
        .encode(&data(0..2), &Sources::of(&source), &mut out)
        .unwrap();
    let body = bodies(&out).remove(0);
    assert_eq!(body[30..39], [6, 0, 0, 0, 0, 0, 0, 0, 2]);
    let pages = zstd::bulk::decompress(&body[39..], 8192).unwrap();
    assert_eq!(pages, [text_page(1), text_page(2)].concat());
}

/// A batch that names its pages: two known ones, and two that are copies of an applied one and of
/// one in the batch.
#[test]
fn reference_wire_format() {
    let mut source = Memory::default();
    source.write(ram(1), disk_page(4));
    source.write(ram(2), disk_page(5));
    source.write(ram(3), random_page(1));
    source.write(ram(4), disk_page(4));
    let hasher = PageHasher::new(&KEY);
    let copies = CopyIndex::new(&layout(), 1 << 20);
    copies.insert(hasher.hash(&random_page(1)), ram(0x0201), 9);
    copies.acknowledge(1, 9);
    let known = KnownTable::new(10);
    for number in [4, 5] {
        known.insert(
            *hasher.hash(&disk_page(number)).0.first_chunk().unwrap(),
            number,
        );
    }
    let sources = Sources {
        copies: Some(&copies),
        known: Some(&known),
        ..Sources::of(&source)
    };
    let mut out = BytesMut::new();
    let mut encoder = encoder(0, Disable::default());
    encoder.encode(&data(1..5), &sources, &mut out).unwrap();
    let body = bodies(&out).remove(0);
    #[rustfmt::skip]
    let after_digest = [
        0x04, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x02, // known, block 0, page 1, 2 pages
        0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0x00, 0x01, // copy, block 0, page 3, 1 page
        0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x00, 0x01, // copy, block 0, page 4, 1 page
        0x00, 0x00, 0x00, 0x04,                               // numbers 4 and 5
        0x00, 0x00, 0x00, 0x00, 0x02, 0x01,                   // of block 0, page 0x201
        0x00, 0x00, 0x00, 0x00, 0x00, 0x01,                   // of block 0, page 1: in this batch
    ];
    assert_eq!(body[30..], after_digest[..]);
}
