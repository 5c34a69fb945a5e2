//! What the operator wants of a running move: words over the control socket, and signals.

use std::time::Duration;

use transport::session::source::Input;
use transport::session::{Outcome, WhenStuck};

use super::Driver;
use crate::control::{Command, Request, Setting};
use crate::shaping;
use crate::waiting::now;

impl Driver {
    pub(super) fn request(&mut self, request: Request) {
        let answer = match request.command {
            Command::Status => serde_json::to_value(self.snapshot()).unwrap_or_default(),
            Command::Set(setting) => self.set(&setting),
            Command::Abort if self.machine.is_past_intent() => serde_json::json!({
                "ok": false, "error": "the guest is being handed over: only the target decides"
            }),
            Command::Abort => {
                self.machine
                    .handle(now(), Input::Abort("aborted by the operator".into()));
                serde_json::json!({"ok": true})
            }
        };
        if request.answer.send(answer).is_err() {
            tracing::debug!("who asked is gone");
        }
    }

    fn set(&mut self, setting: &Setting) -> serde_json::Value {
        if let Some(ms) = setting.downtime_ms {
            let downtime = Duration::from_millis(ms);
            self.machine.handle(now(), Input::Downtime(downtime));
        }
        if let Some(bps) = setting.max_bandwidth_bps {
            let cap = (bps > 0).then_some(bps);
            self.options.shaping.set_rate_max(cap);
            if let Some(lanes) = &self.lanes {
                lanes.set_rate_max(cap.map(shaping::lane_bytes_per_s));
            }
        }
        if let Some(ms) = setting.yield_ms {
            self.options.shaping.set_mode(shaping::mode(ms));
        }
        if let Some(name) = &setting.when_stuck {
            let when_stuck: WhenStuck = match name.parse() {
                Ok(when_stuck) => when_stuck,
                Err(error) => return serde_json::json!({"ok": false, "error": format!("{error}")}),
            };
            self.machine.handle(now(), Input::WhenStuck(when_stuck));
        }
        serde_json::json!({"ok": true})
    }

    pub(super) fn interrupted(&mut self) {
        if self.machine.has_arrived() {
            self.outcome = Some(Outcome::Arrived);
        } else if self.machine.is_past_intent() {
            let detail = "interrupted before the target's answer";
            self.outcome = Some(Outcome::Doubt {
                detail: detail.into(),
            });
        } else {
            self.machine
                .handle(now(), Input::Abort("interrupted by the operator".into()));
        }
    }
}
