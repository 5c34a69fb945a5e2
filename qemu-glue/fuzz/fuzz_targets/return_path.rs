//! The return path's parser on any bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_glue::stream::return_path::{Message, Parser, ReturnPathError};

fuzz_target!(|input: &[u8]| {
    let Some((&piece, bytes)) = input.split_first() else {
        return;
    };
    let (whole, result) = parse(bytes, bytes.len().max(1));
    let (pieces, result_in_pieces) = parse(bytes, usize::from(piece) + 1);
    assert_eq!((&whole, result), (&pieces, result_in_pieces));
    let mut encoded = Vec::new();
    for message in &whole {
        message.encode(&mut encoded);
    }
    assert!(
        bytes.starts_with(&encoded),
        "a message is encoded differently"
    );
});

fn parse(bytes: &[u8], piece: usize) -> (Vec<Message>, Result<(), ReturnPathError>) {
    let (mut parser, mut messages) = (Parser::new(), Vec::new());
    let result = bytes
        .chunks(piece)
        .try_for_each(|chunk| parser.push(chunk, &mut |message| messages.push(message)));
    (messages, result)
}
