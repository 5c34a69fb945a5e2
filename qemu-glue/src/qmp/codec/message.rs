//! One line to one message.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use super::CodecError;

/// One message of QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// First line of every connection.
    Greeting(Greeting),
    /// A command was done.
    Return {
        /// Id of the request; QEMU leaves it out when it could not read the request.
        id: Option<u64>,
        /// The result, `{}` for commands without one.
        value: Value,
    },
    /// A command was refused or failed.
    Error {
        /// Id of the request; QEMU leaves it out when it could not read the request.
        id: Option<u64>,
        /// QEMU's class, most often `GenericError`.
        class: String,
        /// Text for humans.
        description: String,
    },
    /// Something happened.
    Event {
        /// QEMU's name of the event, such as `STOP`.
        name: String,
        /// When, by QEMU's wall clock; `None` when QEMU could not tell.
        timestamp: Option<Timestamp>,
        /// The event's data, `Null` when it has none.
        data: Value,
    },
}

/// What QEMU says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// QEMU's version.
    pub version: Version,
    /// The packager's name of the build, may be empty.
    pub package: String,
    /// Commands may be executed out of band.
    pub has_oob: bool,
}

/// A version of QEMU, ordered as one expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl Version {
    /// Is this `major.minor.0` or later?
    pub fn at_least(self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Wall clock of QEMU's host when an event was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: u64,
    /// Microseconds of that second.
    pub microseconds: u32,
}

/// All fields that a message may have. An absent `return` differs from `"return": null`.
#[derive(Deserialize)]
struct Fields {
    #[serde(rename = "QMP")]
    qmp: Option<GreetingFields>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    result: Option<Value>,
    error: Option<ErrorFields>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<TimestampFields>,
    #[serde(default, deserialize_with = "present")]
    id: Option<Value>,
}

#[derive(Deserialize)]
struct GreetingFields {
    version: VersionFields,
    #[serde(default)]
    capabilities: Vec<String>,
}

#[derive(Deserialize)]
struct VersionFields {
    qemu: Version,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct ErrorFields {
    class: String,
    desc: String,
}

/// QEMU sends -1 in both when it could not read the clock.
#[derive(Deserialize)]
struct TimestampFields {
    seconds: i64,
    microseconds: i64,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

/// One line, without its end; `None` when it is empty.
pub(super) fn parse(line: &[u8]) -> Result<Option<Message>, CodecError> {
    match line.trim_ascii_start().first() {
        None => return Ok(None),
        Some(b'{') => {}
        // The parser would take an array for the fields in their order.
        Some(_) => return Err(not_a_message("no object")),
    }
    let fields: Fields =
        serde_json::from_slice(line).map_err(|error| not_a_message(&describe(&error)))?;
    let id = match fields.id {
        None => None,
        Some(id) => Some(id.as_u64().ok_or(CodecError::ForeignId)?),
    };
    let message = match (fields.qmp, fields.result, fields.error, fields.event) {
        (Some(greeting), None, None, None) => Message::Greeting(Greeting {
            version: greeting.version.qemu,
            package: greeting.version.package,
            has_oob: greeting.capabilities.iter().any(|name| name == "oob"),
        }),
        (None, Some(value), None, None) => Message::Return { id, value },
        (None, None, Some(error), None) => Message::Error {
            id,
            class: error.class,
            description: error.desc,
        },
        (None, None, None, Some(name)) => Message::Event {
            name,
            timestamp: fields.timestamp.as_ref().and_then(checked_timestamp),
            data: fields.data,
        },
        _ => {
            return Err(not_a_message(
                "not exactly one of QMP, return, error, event",
            ));
        }
    };
    Ok(Some(message))
}

/// Where and what sort, without the line's content, which may be guest data.
fn describe(error: &serde_json::Error) -> String {
    format!("{:?} error at byte {}", error.classify(), error.column())
}

fn not_a_message(detail: &str) -> CodecError {
    CodecError::NotAMessage {
        detail: detail.to_owned(),
    }
}

fn checked_timestamp(fields: &TimestampFields) -> Option<Timestamp> {
    Some(Timestamp {
        seconds: u64::try_from(fields.seconds).ok()?,
        microseconds: u32::try_from(fields.microseconds)
            .ok()
            .filter(|&us| us < 1_000_000)?,
    })
}
