//! A scripted monitor: what a hostile, slow or dying QEMU does to the client.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use qemu_glue::qmp::{
    Client, CloseReason, CodecError, EventKind, EventReceiver, Options, QmpError,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::scratch::Scratch;

const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "x"}, "#,
    r#""capabilities": ["oob"]}}"#
);
const STOP: &str = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
const SHORT: Duration = Duration::from_millis(200);

/// Replies find their callers by id, whatever their order and split; an event that came before a
/// reply is in the queue when the reply is.
#[tokio::test]
async fn replies_out_of_order_in_single_bytes() {
    let (client, mut events, mut fake) = connected(Options::default()).await;
    let script = tokio::spawn(async move {
        let first = fake.request().await;
        let second = fake.request().await;
        let mut text = format!("{STOP}\r\n");
        for request in [second, first] {
            text += &json!({"return": request["execute"], "id": request["id"]}).to_string();
            text += "\r\n";
        }
        for byte in text.bytes() {
            fake.stream.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        fake
    });
    let (first, second) = tokio::join!(
        client.execute("first", json!({})),
        client.execute("second", json!({}))
    );
    assert_eq!(
        (first.unwrap(), second.unwrap()),
        (json!("first"), json!("second"))
    );
    let event = events.try_next().unwrap();
    assert_eq!(event.kind, EventKind::Stop);
    assert_eq!(event.timestamp.unwrap().microseconds, 2);
    assert_eq!(events.try_next(), None);
    drop(script.await.unwrap());
}

/// A refusal carries QEMU's own words, and the monitor stays usable.
#[tokio::test]
async fn refusal() {
    let (client, _events, mut fake) = connected(Options::default()).await;
    let script = tokio::spawn(async move {
        let id = fake.request().await["id"].clone();
        let error = json!({"class": "GenericError", "desc": "no way"});
        fake.send(&json!({"error": error, "id": id}).to_string())
            .await;
        fake.reply(json!({})).await;
        fake
    });
    let error = client.cont().await.unwrap_err();
    assert!(!error.may_have_run());
    assert!(
        matches!(error, QmpError::Refused { command, class, description }
        if command == "cont" && class == "GenericError" && description == "no way")
    );
    client.stop().await.unwrap();
    drop(script.await.unwrap());
}

/// A reply with other fields than the command's is an error that names the command.
#[tokio::test]
async fn bad_reply() {
    let (client, _events, mut fake) = connected(Options::default()).await;
    let script = tokio::spawn(async move {
        fake.reply(json!({"status": "running", "running": "yes"}))
            .await;
        fake.reply(json!({"ram": {"transferred": -1}})).await;
        fake
    });
    let error = client.query_status().await.unwrap_err();
    assert!(matches!(error, QmpError::BadReply { command, .. } if command == "query-status"));
    let error = client.query_migrate().await.unwrap_err();
    assert!(matches!(error, QmpError::BadReply { command, .. } if command == "query-migrate"));
    drop(script.await.unwrap());
}

/// One event more than the queue holds breaks the monitor, for callers and for the reader, who
/// still gets every event that was kept.
#[tokio::test]
async fn flood_of_events() {
    let options = Options {
        events_max: 10,
        ..Options::default()
    };
    let (client, mut events, mut fake) = connected(options).await;
    for _ in 0..11 {
        fake.send(STOP).await;
    }
    let reason = CloseReason::EventsNotRead { queue_max: 10 };
    assert_closed(client.stop().await, &reason);
    for _ in 0..10 {
        assert_eq!(events.next().await.unwrap().kind, EventKind::Stop);
    }
    assert_ended(&mut events, reason).await;
}

/// Who drops the receiver wants no events: then a flood is harmless.
#[tokio::test]
async fn flood_that_nobody_wants() {
    let options = Options {
        events_max: 1,
        ..Options::default()
    };
    let (client, events, mut fake) = connected(options).await;
    drop(events);
    for _ in 0..1000 {
        fake.send(STOP).await;
    }
    let script = tokio::spawn(async move {
        fake.reply(json!({})).await;
        fake
    });
    client.stop().await.unwrap();
    drop(script.await.unwrap());
}

/// Lines that end the connection, each with its reason.
#[tokio::test]
async fn lines_that_break_the_monitor() {
    let unexpected = CloseReason::UnexpectedReply;
    check_breaks(r#"{"return": {}, "id": 4711}"#, &unexpected).await;
    check_breaks(r#"{"return": {}}"#, &unexpected).await;
    let line = r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#;
    check_breaks(line, &unexpected).await;
    check_breaks(GREETING, &CloseReason::GreetingOutOfPlace).await;
    check_breaks(&"x".repeat(2 << 20), &CodecError::LineTooLong.into()).await;
    check_breaks(
        r#"{"return": {}, "id": "1"}"#,
        &CodecError::ForeignId.into(),
    )
    .await;
    let detail = "no object".to_owned();
    check_breaks("hello", &CodecError::NotAMessage { detail }.into()).await;
}

async fn check_breaks(line: &str, reason: &CloseReason) {
    let (client, mut events, mut fake) = connected(Options::default()).await;
    // The client may close before it has taken all of a line that is too long.
    drop(fake.stream.write_all(line.as_bytes()).await);
    drop(fake.stream.write_all(b"\n").await);
    assert_closed(client.stop().await, reason);
    assert_ended(&mut events, reason.clone()).await;
}

/// A monitor that says nothing is held by another client: the error tells what to do.
#[tokio::test]
async fn busy_monitor() {
    let scratch = Scratch::new();
    let path = scratch.path().join("q");
    let _listener = UnixListener::bind(&path).unwrap();
    let options = Options {
        greeting_timeout: SHORT,
        ..Options::default()
    };
    let error = Client::connect_with(&path, options).await.unwrap_err();
    assert!(
        error.to_string().contains("start QEMU with a second -qmp"),
        "{error}"
    );
    assert!(matches!(error, QmpError::MonitorBusy { waited, .. } if waited == SHORT));
}

/// No socket, and a socket that no one listens on.
#[tokio::test]
async fn nobody_listens() {
    let scratch = Scratch::new();
    let path = scratch.path().join("q");
    for _ in 0..2 {
        let error = Client::connect(&path).await.unwrap_err();
        assert!(matches!(error, QmpError::Connect { path: named, .. } if named == path));
        drop(UnixListener::bind(&path));
    }
}

/// Something else than a greeting, or an end, before the greeting.
#[tokio::test]
async fn no_greeting() {
    for (line, expected) in [
        ("", CloseReason::EndOfFile),
        (STOP, CloseReason::GreetingOutOfPlace),
        (
            r#"{"return": {}, "id": 1}"#,
            CloseReason::GreetingOutOfPlace,
        ),
    ] {
        let scratch = Scratch::new();
        let path = scratch.path().join("q");
        let listener = UnixListener::bind(&path).unwrap();
        let script = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream
                .write_all(format!("{line}\n").as_bytes())
                .await
                .unwrap();
        });
        let error = Client::connect(&path).await.unwrap_err();
        let closed = matches!(&error, QmpError::MonitorClosed { reason } if *reason == expected);
        assert!(closed, "{error:?}");
        script.await.unwrap();
    }
}

/// A reply that comes after the limit goes to nobody else, and the monitor stays usable.
#[tokio::test]
async fn late_reply() {
    let (client, _events, mut fake) = connected(Options::default()).await;
    let error = client.with_timeout(SHORT).cont().await.unwrap_err();
    assert!(error.may_have_run());
    assert!(
        matches!(error, QmpError::Timeout { command, may_still_run: true, .. }
        if command == "cont")
    );
    let script = tokio::spawn(async move {
        fake.reply(json!("late")).await;
        fake.reply(json!("in time")).await;
        fake
    });
    assert_eq!(
        client.execute("next", json!({})).await.unwrap(),
        json!("in time")
    );
    drop(script.await.unwrap());
}

/// The end of the monitor ends every pending call and every later one.
#[tokio::test]
async fn death_with_calls_pending() {
    let (client, mut events, mut fake) = connected(Options::default()).await;
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.stop().await })
        })
        .collect();
    fake.send(STOP).await;
    fake.request().await;
    drop(fake);
    for call in calls {
        assert_closed(call.await.unwrap(), &CloseReason::EndOfFile);
    }
    assert_closed(client.stop().await, &CloseReason::EndOfFile);
    client.quit().await.unwrap();
    assert_eq!(events.next().await.unwrap().kind, EventKind::Stop);
    assert_ended(&mut events, CloseReason::EndOfFile).await;
}

/// Commands without a reply are limited; one more is refused and not sent.
#[tokio::test]
async fn too_many_pending() {
    let (client, mut events, mut fake) = connected(Options::default()).await;
    let limited = client.with_timeout(SHORT);
    let calls: Vec<_> = (0..64)
        .map(|_| {
            let client = limited.clone();
            tokio::spawn(async move { client.stop().await })
        })
        .collect();
    for call in calls {
        assert!(matches!(
            call.await.unwrap(),
            Err(QmpError::Timeout {
                may_still_run: true,
                ..
            })
        ));
    }
    let error = client.cont().await.unwrap_err();
    assert!(!error.may_have_run());
    assert!(matches!(
        error,
        QmpError::TooManyPending {
            pending_max: 64,
            ..
        }
    ));
    for _ in 0..64 {
        assert_eq!(fake.reply(json!({})).await, "stop");
    }
    // Once this event is there, the replies before it have been taken.
    fake.send(STOP).await;
    assert_eq!(events.next().await.unwrap().kind, EventKind::Stop);
    let script = tokio::spawn(async move { fake.reply(json!({})).await });
    client.quit().await.unwrap();
    assert_eq!(script.await.unwrap(), "quit");
}

/// A QEMU that takes no bytes: what is queued is bounded, calls end in time, and a command whose
/// caller has given up before it was on its way is never sent.
#[tokio::test]
async fn qemu_takes_no_bytes() {
    let (client, _events, mut fake) = connected(Options::default()).await;
    let limited = client.with_timeout(SHORT * 5);
    let calls: Vec<_> = (0..60)
        .map(|number| {
            let client = limited.clone();
            let arguments = json!({"number": number, "filling": "x".repeat(50_000)});
            tokio::spawn(async move { client.execute("long", arguments).await })
        })
        .collect();
    let mut never_sent = BTreeSet::new();
    for (number, call) in calls.into_iter().enumerate() {
        match call.await.unwrap() {
            Err(QmpError::Timeout { may_still_run, .. }) if may_still_run => {}
            Err(QmpError::Timeout { .. }) => {
                never_sent.insert(number as u64);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(never_sent.len() > 20, "{never_sent:?}");
    let script = tokio::spawn(async move {
        let mut received = BTreeSet::new();
        loop {
            let request = fake.request().await;
            let id = &request["id"];
            fake.send(&json!({"return": {}, "id": id}).to_string())
                .await;
            if request["execute"] == "cont" {
                break received;
            }
            received.insert(request["arguments"]["number"].as_u64().unwrap());
        }
    });
    client.cont().await.unwrap();
    let received = script.await.unwrap();
    assert!(
        received.is_disjoint(&never_sent),
        "{received:?} {never_sent:?}"
    );
    // The 16 that waited for the task were abandoned as well.
    assert!(
        received.len() + never_sent.len() + 16 <= 60,
        "{}",
        received.len()
    );
}

/// A request beyond the limit is refused before it is sent.
#[tokio::test]
async fn too_long_request() {
    let (client, _events, _fake) = connected(Options::default()).await;
    let error = client
        .human_monitor_command(&"x".repeat(70_000))
        .await
        .unwrap_err();
    assert!(!error.may_have_run());
    assert!(matches!(
        error,
        QmpError::RequestTooLong {
            request_max_bytes: 65_536,
            ..
        }
    ));
}

/// The last client that is dropped closes the connection, and the event reader learns it.
#[tokio::test]
async fn dropped_clients_close() {
    let (client, mut events, mut fake) = connected(Options::default()).await;
    let other = client.clone();
    drop(client);
    let script = tokio::spawn(async move {
        fake.reply(json!({})).await;
        fake
    });
    other.stop().await.unwrap();
    let mut fake = script.await.unwrap();
    drop(other);
    assert_ended(&mut events, CloseReason::Dropped).await;
    assert_eq!(fake.stream.read(&mut [0]).await.unwrap(), 0);
}

struct Fake {
    stream: BufReader<UnixStream>,
    _scratch: Scratch,
}

impl Fake {
    async fn send(&mut self, line: &str) {
        self.stream
            .write_all(format!("{line}\r\n").as_bytes())
            .await
            .unwrap();
    }

    async fn request(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Answers the next request; returns its command.
    async fn reply(&mut self, value: Value) -> String {
        let request = self.request().await;
        self.send(&json!({"return": value, "id": request["id"]}).to_string())
            .await;
        request["execute"].as_str().unwrap().to_owned()
    }
}

/// A client that has connected, and its monitor.
async fn connected(options: Options) -> (Client, EventReceiver, Fake) {
    let scratch = Scratch::new();
    let path = scratch.path().join("q");
    let listener = UnixListener::bind(&path).unwrap();
    let script = tokio::spawn(accept(listener, scratch));
    let (client, events) = connect(&path, options).await;
    (client, events, script.await.unwrap())
}

async fn connect(path: &Path, options: Options) -> (Client, EventReceiver) {
    Client::connect_with(path, options).await.unwrap()
}

async fn accept(listener: UnixListener, scratch: Scratch) -> Fake {
    let (stream, _) = listener.accept().await.unwrap();
    let mut fake = Fake {
        stream: BufReader::new(stream),
        _scratch: scratch,
    };
    fake.send(GREETING).await;
    assert_eq!(fake.reply(json!({})).await, "qmp_capabilities");
    fake
}

fn assert_closed(result: Result<(), QmpError>, expected: &CloseReason) {
    match result {
        Err(QmpError::MonitorClosed { reason }) => assert_eq!(&reason, expected),
        other => panic!("{other:?} instead of {expected:?}"),
    }
}

async fn assert_ended(events: &mut EventReceiver, reason: CloseReason) {
    assert_eq!(
        events.next().await.unwrap().kind,
        EventKind::MonitorClosed { reason }
    );
    assert_eq!(events.next().await, None);
}
