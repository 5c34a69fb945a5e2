use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "#,
    r#""package": "Debian 1:10.0.2"}, "capabilities": ["oob"]}}"#
);

/// A real exchange with 10.0.2, every sort of message in it.
#[test]
fn real_lines() {
    let text = [
        GREETING,
        r#"{"return": {}, "id": 1}"#,
        r#"{"timestamp": {"seconds": 1795529025, "microseconds": 80908}, "event": "RESUME"}"#,
        r#"{"id": 3, "error": {"class": "CommandNotFound", "desc": "The command x"}}"#,
        r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "E", "data": {"a": 1}}"#,
        r#"{"return": null}"#,
    ]
    .join("\r\n")
        + "\r\n";
    let version = Version {
        major: 10,
        minor: 0,
        micro: 2,
    };
    let expected = vec![
        Message::Greeting(Greeting {
            version,
            package: "Debian 1:10.0.2".to_owned(),
            has_oob: true,
        }),
        Message::Return {
            id: Some(1),
            value: json!({}),
        },
        Message::Event {
            name: "RESUME".to_owned(),
            timestamp: Some(Timestamp {
                seconds: 1_795_529_025,
                microseconds: 80_908,
            }),
            data: Value::Null,
        },
        Message::Error {
            id: Some(3),
            class: "CommandNotFound".to_owned(),
            description: "The command x".to_owned(),
        },
        Message::Event {
            name: "E".to_owned(),
            timestamp: None,
            data: json!({"a": 1}),
        },
        Message::Return {
            id: None,
            value: Value::Null,
        },
    ];
    for split in [1, 7, 4096] {
        assert_eq!(
            parse(text.as_bytes(), split),
            (expected.clone(), Ok(())),
            "split {split}"
        );
    }
}

/// Versions are ordered by number, not by text.
#[test]
fn version_order() {
    let version = Version {
        major: 9,
        minor: 1,
        micro: 50,
    };
    assert!(version.at_least(9, 1) && version.at_least(8, 2));
    assert!(!version.at_least(9, 2) && !version.at_least(10, 0));
}

/// Lines that are no messages, each with its error; the codec stays broken afterwards.
#[test]
fn bad_lines() {
    let not = |detail: &str| CodecError::NotAMessage {
        detail: detail.to_owned(),
    };
    let one_of = not("not exactly one of QMP, return, error, event");
    check_bad(b"x", &not("no object"));
    check_bad(b"{\xff\xfe", &not("Syntax error at byte 2"));
    check_bad(
        br#"[null, 1, null, null, null, null, null]"#,
        &not("no object"),
    );
    check_bad(b"{}", &one_of);
    check_bad(br#"{"return": 1, "event": "X"}"#, &one_of);
    check_bad(br#"{"return": 1"#, &not("Eof error at byte 12"));
    check_bad(br#"{"event": 5}"#, &not("Data error at byte 11"));
    check_bad(br#"{"QMP": {}}"#, &not("Data error at byte 10"));
    check_bad(br#"{"return": 1, "id": "1"}"#, &CodecError::ForeignId);
    check_bad(br#"{"return": 1, "id": -1}"#, &CodecError::ForeignId);
    check_bad(br#"{"return": 1, "id": null}"#, &CodecError::ForeignId);
    let deep = [b"{\"return\": ".as_slice(), &b"[".repeat(100_000)].concat();
    check_bad(&deep, &not("Syntax error at byte 138"));
}

/// The longest line passes, one more byte does not, with or without its end.
#[test]
fn longest_line() {
    let fill = LINE_MAX_BYTES - r#"{"return": ""}"#.len();
    let longest = format!(r#"{{"return": "{}"}}"#, "a".repeat(fill));
    let (messages, result) = parse((longest.clone() + "\n").as_bytes(), 4096);
    assert_eq!((messages.len(), result), (1, Ok(())));
    for line in [longest.clone() + " ", longest + " \n"] {
        assert_eq!(
            parse(line.as_bytes(), 4096),
            (vec![], Err(CodecError::LineTooLong))
        );
        assert_eq!(
            parse(line.as_bytes(), line.len()),
            (vec![], Err(CodecError::LineTooLong))
        );
    }
}

proptest! {
    /// Any bytes, in any split, never panic, and the split does not matter.
    #[test]
    fn any_bytes(input in proptest::collection::vec(any::<u8>(), 0..2000), split in 1_usize..50) {
        prop_assert_eq!(parse(&input, split), parse(&input, input.len().max(1)));
    }

    /// The same for bytes that are made of the pieces of messages.
    #[test]
    fn pieces_of_messages(
        pieces in proptest::collection::vec(proptest::sample::select(PIECES), 0..60),
        split in 1_usize..50,
    ) {
        let input = pieces.concat();
        let whole = parse(input.as_bytes(), input.len().max(1));
        prop_assert_eq!(parse(input.as_bytes(), split), whole);
    }

    /// Replies come out as they were put in.
    #[test]
    fn replies_survive(ids in proptest::collection::vec(any::<u64>(), 0..50), split in 1_usize..99) {
        let line = |id: &u64| json!({"id": id, "return": {"n": id}}).to_string() + "\r\n";
        let text: String = ids.iter().map(line).collect();
        let message = |id: &u64| Message::Return { id: Some(*id), value: json!({"n": id}) };
        prop_assert_eq!(parse(text.as_bytes(), split), (ids.iter().map(message).collect(), Ok(())));
    }
}

const PIECES: &[&str] = &[
    "{",
    "}",
    "\n",
    "\r\n",
    "\"return\"",
    "\"event\"",
    "\"id\"",
    ":",
    ",",
    "1",
    "{}",
    "null",
    "{\"return\": {}}\n",
    "{\"event\": \"STOP\"}\n",
    "\"error\": {\"class\": \"a\", \"desc\": \"b\"}",
    "{\"return\": 1, \"id\": 7}\n",
    "[",
    "]",
    "\"\\ud800\"",
    "-1e999",
    " ",
];

fn parse(input: &[u8], split: usize) -> (Vec<Message>, Result<(), CodecError>) {
    let mut codec = Codec::new();
    let mut messages = Vec::new();
    let result = input
        .chunks(split)
        .try_for_each(|part| codec.push(part, &mut messages));
    (messages, result)
}

fn check_bad(line: &[u8], expected: &CodecError) {
    let input = [b"{\"return\": {}}\n", line, b"\n{\"return\": {}}\n"].concat();
    let mut codec = Codec::new();
    let mut messages = Vec::new();
    assert_eq!(codec.push(&input, &mut messages).as_ref(), Err(expected));
    assert_eq!(
        codec.push(b"{\"return\": {}}\n", &mut messages).as_ref(),
        Err(expected)
    );
    assert_eq!(
        messages,
        vec![Message::Return {
            id: None,
            value: json!({})
        }]
    );
}

/// Another reader's last line is passed over wherever it was cut; only the first one may be bad.
#[test]
fn a_line_begun_by_another_reader() {
    let line =
        br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "E", "data": {"a": {}}}"#;
    let next = b"\n{\"return\": {}, \"id\": 9}\n";
    for cut in 0..=line.len() {
        let mut codec = Codec::mid_line();
        let mut messages = Vec::new();
        let input = [&line[cut..], next].concat();
        codec.push(&input, &mut messages).unwrap();
        let expected = if cut == 0 { 2 } else { 1 };
        assert_eq!(messages.len(), expected, "cut at {cut}");
        assert!(matches!(
            messages.last(),
            Some(Message::Return { id: Some(9), .. })
        ));
        assert!(codec.push(b"bad\n", &mut messages).is_err());
    }
}
