//! What happened to a guest before its state was saved.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Control;
use crate::clock;

/// Time in which the guest settles after its start and after its warm-up.
const SETTLE: Duration = Duration::from_secs(3);
/// Longer than any command needs beyond the time that it was asked to take.
const COMMAND_MAX: Duration = Duration::from_secs(300);

/// A guest's life from power-on to the saved state.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Past {
    /// A shell command that runs in the guest after its start.
    #[serde(default)]
    pub warm_up: Option<String>,
    /// What it did at the client, where the scenario is its way back.
    #[serde(default)]
    pub stay: Option<Stay>,
}

/// A stay at the client.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Stay {
    /// How long, in seconds.
    pub seconds: u32,
    /// A shell command that runs in the guest first; `{seconds}` in it is the time above, which then
    /// is not waited for. Without one the guest is idle for that time.
    #[serde(default)]
    pub run: Option<String>,
}

impl Past {
    /// The life before the stay: what the guest was when it left the cloud.
    #[must_use]
    pub fn before_stay(&self) -> Self {
        Self {
            stay: None,
            ..self.clone()
        }
    }

    /// Makes a stay shorter or longer; one that is over when its command is over stays as it is.
    pub fn set_stay(&mut self, seconds: u32) {
        if let Some(stay) = self.stay.as_mut().filter(|stay| stay.takes_its_time()) {
            stay.seconds = seconds;
        }
    }

    /// Has a guest that just came up go through its warm-up.
    pub(super) fn warm_up(&self, control: &Control) -> anyhow::Result<()> {
        clock::pause(SETTLE);
        if let Some(command) = &self.warm_up {
            control.run(command, COMMAND_MAX)?;
            clock::pause(SETTLE);
        }
        Ok(())
    }
}

impl Stay {
    fn takes_its_time(&self) -> bool {
        self.run
            .as_ref()
            .is_none_or(|run| run.contains("{seconds}"))
    }

    /// Has a running guest live through it.
    pub(super) fn live(&self, control: &Control) -> anyhow::Result<()> {
        let time = Duration::from_secs(self.seconds.into());
        match &self.run {
            Some(command) => {
                let command = command.replace("{seconds}", &self.seconds.to_string());
                control.run(&command, time + COMMAND_MAX)?;
                clock::pause(SETTLE);
            }
            None => clock::pause(time),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command without a time in it is not changed by `--stay`.
    #[test]
    fn stays() {
        let stay = |run: Option<&str>| {
            let run = run.map(str::to_owned);
            let mut past = Past {
                stay: Some(Stay { seconds: 10, run }),
                ..Past::default()
            };
            past.set_stay(40);
            past.stay.unwrap().seconds
        };
        assert_eq!(stay(None), 40);
        assert_eq!(stay(Some("lab-use {seconds} 1,1")), 40);
        assert_eq!(stay(Some("guestload change-redis 1,1,1")), 10);
    }
}
