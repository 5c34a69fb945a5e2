//! The monitor's codec: any bytes, whole and split, give the same messages and never panic. What
//! a reply says of RAM blocks goes on into the readers of those tables.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_glue::memory::{flat_view, ramblock};
use qemu_glue::qmp::codec::{Codec, CodecError, Message};

fuzz_target!(|input: &[u8]| {
    let Some((&split, bytes)) = input.split_first() else {
        return;
    };
    let whole = parse(bytes, bytes.len().max(1));
    let parts = parse(bytes, usize::from(split).max(1));
    assert_eq!(whole, parts);
    for message in whole.0 {
        if let Message::Return { value, .. } = message
            && let Some(text) = value.as_str()
        {
            // Only that it returns matters.
            drop(ramblock::parse(text));
            drop(flat_view::parse(text));
            let _place = flat_view::parse_gpa2hva(text);
        }
    }
});

fn parse(bytes: &[u8], split: usize) -> (Vec<Message>, Result<(), CodecError>) {
    let mut codec = Codec::new();
    let mut messages = Vec::new();
    let result = bytes
        .chunks(split)
        .try_for_each(|part| codec.push(part, &mut messages));
    (messages, result)
}
