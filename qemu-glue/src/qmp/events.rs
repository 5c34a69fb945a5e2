//! Typed events of the monitor.

use serde_json::Value;

use super::codec::Timestamp;
use super::error::CloseReason;
use super::names::MigrationStatus;

/// Longest event name that is kept; QEMU's longest has about 30 bytes.
const NAME_MAX_BYTES: usize = 128;

/// Something that happened in QEMU, or the end of its monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When, by QEMU's wall clock; `None` when QEMU could not tell, and at the monitor's end.
    pub timestamp: Option<Timestamp>,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// The guest was stopped.
    Stop,
    /// The guest runs.
    Resume,
    /// The guest shut down, or QEMU was asked to.
    Shutdown {
        /// Was it the guest's wish?
        guest: bool,
    },
    /// A migration changed its status (capability `events`).
    Migration {
        /// The new status.
        status: MigrationStatus,
    },
    /// A dirty bitmap sync ended (capability `events`).
    MigrationPass {
        /// Number of the pass that begins, 1 for the one at set-up.
        pass: u64,
    },
    /// Another event, by name.
    Other {
        /// QEMU's name of the event.
        name: String,
    },
    /// The monitor is gone; no event follows.
    MonitorClosed {
        /// Why.
        reason: CloseReason,
    },
}

impl Event {
    /// From the parts of a QMP event. Data that does not fit makes it [`EventKind::Other`].
    pub(super) fn from_parts(mut name: String, data: &Value, timestamp: Option<Timestamp>) -> Self {
        let typed = match name.as_str() {
            "STOP" => Some(EventKind::Stop),
            "RESUME" => Some(EventKind::Resume),
            "SHUTDOWN" => Some(EventKind::Shutdown {
                guest: data.get("guest").and_then(Value::as_bool).unwrap_or(false),
            }),
            "MIGRATION" => {
                data.get("status")
                    .and_then(Value::as_str)
                    .map(|status| EventKind::Migration {
                        status: MigrationStatus::from(bounded(status.to_owned())),
                    })
            }
            "MIGRATION_PASS" => data
                .get("pass")
                .and_then(Value::as_u64)
                .map(|pass| EventKind::MigrationPass { pass }),
            _ => None,
        };
        let kind = typed.unwrap_or_else(|| {
            name = bounded(std::mem::take(&mut name));
            EventKind::Other { name }
        });
        Self { timestamp, kind }
    }

    /// The last event of a monitor.
    pub(super) fn closed(reason: CloseReason) -> Self {
        Self {
            timestamp: None,
            kind: EventKind::MonitorClosed { reason },
        }
    }
}

fn bounded(mut name: String) -> String {
    let mut end = name.len().min(NAME_MAX_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name.shrink_to_fit();
    name
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(name: &str, data: &Value, expected: &EventKind) {
        assert_eq!(
            &Event::from_parts(name.to_owned(), data, None).kind,
            expected
        );
    }

    /// Every typed event, an unknown status, and data that does not fit.
    #[test]
    fn typed_events() {
        check("STOP", &Value::Null, &EventKind::Stop);
        check("RESUME", &json!({}), &EventKind::Resume);
        check(
            "SHUTDOWN",
            &json!({"guest": true}),
            &EventKind::Shutdown { guest: true },
        );
        let status = MigrationStatus::PreSwitchover;
        check(
            "MIGRATION",
            &json!({"status": "pre-switchover"}),
            &EventKind::Migration { status },
        );
        let status = MigrationStatus::Unknown("later".to_owned());
        check(
            "MIGRATION",
            &json!({"status": "later"}),
            &EventKind::Migration { status },
        );
        check(
            "MIGRATION_PASS",
            &json!({"pass": 3}),
            &EventKind::MigrationPass { pass: 3 },
        );
        let other = EventKind::Other {
            name: "MIGRATION_PASS".to_owned(),
        };
        check("MIGRATION_PASS", &json!({"pass": -3}), &other);
    }

    /// A name of any length and alphabet is cut at a character.
    #[test]
    fn long_name_is_cut() {
        let name = "é".repeat(200) + "x";
        check(
            &name,
            &Value::Null,
            &EventKind::Other {
                name: "é".repeat(64),
            },
        );
        let name = "x".to_owned() + &"é".repeat(200);
        check(
            &name,
            &Value::Null,
            &EventKind::Other {
                name: "x".to_owned() + &"é".repeat(63),
            },
        );
    }
}
