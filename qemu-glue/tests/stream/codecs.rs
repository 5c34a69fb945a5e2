//! Changes of a page, and the return path, by hand.

use qemu_glue::stream::return_path::{Message, Parser, ReturnPathError};
use qemu_glue::stream::{PAGE_SIZE, xbzrle};

/// Changes of a page, by hand.
#[test]
fn changes_of_a_page() {
    let check = |encoded: &[u8], expected: Result<(usize, &[u8]), usize>| {
        let mut page = [0xaa; PAGE_SIZE];
        let result = xbzrle::apply(&mut page, encoded);
        match expected {
            Ok((at, fresh)) => {
                assert_eq!(result, Ok(()));
                let mut want = [0xaa; PAGE_SIZE];
                want[at..at + fresh.len()].copy_from_slice(fresh);
                assert!(page == want, "{encoded:x?}");
            }
            Err(at) => assert_eq!(result, Err(xbzrle::XbzrleError { at }), "{encoded:x?}"),
        }
    };
    check(&[], Ok((0, &[])));
    check(&[0, 2, 1, 2], Ok((0, &[1, 2])));
    check(&[3, 1, 9], Ok((3, &[9])));
    check(&[0x80, 0x01, 1, 9], Ok((128, &[9])));
    check(&[0xff, 0x1f, 1, 9], Ok((4095, &[9])));
    check(&[0x80, 0x20, 1, 9], Err(3)); // starts behind the page
    check(&[0xff, 0x1f, 2, 9, 9], Err(3)); // ends behind it
    check(&[0, 1, 7, 0, 1, 7], Err(4)); // nothing kept between two changes
    check(&[0, 0], Err(2)); // no new bytes
    check(&[0, 3, 1, 2], Err(2)); // new bytes missing
    check(&[5], Err(1)); // no second count
    check(&[0x80, 0x80, 1, 9], Err(0)); // a count of three bytes
    check(&[0x80], Err(0)); // a cut count
}

/// The messages of the return path are read in any pieces.
#[test]
fn return_path_messages() {
    let bytes = [
        &[0, 7, 0, 0][..],                                   // SWITCHOVER_ACK
        &[0, 2, 0, 4, 0, 0, 0, 1],                           // PONG 1
        &[0, 3, 0, 15, 0, 0, 0, 0, 0, 0, 0x10, 0],           // REQ_PAGES_ID at 0x1000
        &[0, 0, 0x20, 0, 2, b'r', b'm'],                     //   0x2000 bytes of "rm"
        &[0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0], // REQ_PAGES at 0, 0x1000 bytes
        &[0, 1, 0, 4, 0, 0, 0, 0],                           // SHUT 0
    ]
    .concat();
    let messages = [
        Message::SwitchoverAck,
        Message::Pong(1),
        Message::RequestPages {
            block: Some(b"rm".to_vec()),
            start: 0x1000,
            length: 0x2000,
        },
        Message::RequestPages {
            block: None,
            start: 0,
            length: 0x1000,
        },
        Message::Shut(0),
    ];
    for piece in [1, 3, bytes.len()] {
        let (mut parser, mut seen) = (Parser::new(), Vec::new());
        for chunk in bytes.chunks(piece) {
            parser
                .push(chunk, &mut |message| seen.push(message))
                .unwrap();
        }
        assert_eq!(
            (seen.as_slice(), parser.finish()),
            (messages.as_slice(), Ok(()))
        );
    }
}

/// What is no message of a pre-copy target is refused before its payload is waited for.
#[test]
fn return_path_messages_that_are_refused() {
    let refused = |bytes: &[u8], expected: ReturnPathError| {
        let mut parser = Parser::new();
        let result = parser.push(bytes, &mut |message| panic!("{message:?} from {bytes:x?}"));
        assert_eq!(result, Err(expected));
        assert_eq!(
            parser.push(&[], &mut |_| ()),
            Err(ReturnPathError::AlreadyFailed)
        );
    };
    refused(
        &[0, 1, 0, 5],
        ReturnPathError::Malformed { kind: 1, length: 5 },
    );
    refused(
        &[0, 8, 0, 0],
        ReturnPathError::Malformed { kind: 8, length: 0 },
    );
    refused(
        &[0, 3, 2, 1],
        ReturnPathError::Malformed {
            kind: 3,
            length: 513,
        },
    );
    refused(&[0, 5, 0, 2], ReturnPathError::Recovery { kind: 5 });
    refused(&[0, 6, 0, 4], ReturnPathError::Recovery { kind: 6 });
    let mut lying = vec![0, 3, 0, 15];
    lying.extend([0; 12]);
    lying.extend([3, b'r', b'm']);
    refused(
        &lying,
        ReturnPathError::Malformed {
            kind: 3,
            length: 15,
        },
    );
    let mut parser = Parser::new();
    parser.push(&[0, 1, 0], &mut |_| ()).unwrap();
    assert_eq!(parser.finish(), Err(ReturnPathError::Truncated));
}
