//! `scaleaway set` and `scaleaway abort`: change, or end, a move that is under way.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::Value;

use crate::cli::rate;
use crate::control::{Command, Setting, call};
use crate::progress::say;
use crate::shaping::yield_ms;
use crate::state_dir::{StateDir, StateDirArgs};

/// What can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Longest stop of the guest that is asked for, in ms.
    Downtime,
    /// Cap of the transfer's rate in bit/s (k, M, G), or `off`.
    MaxBandwidth,
    /// Queueing delay in ms above which the transfer gives way to others, `on` (5) or `off`.
    Yield,
    /// wait, throttle, post-copy, force or abort.
    WhenStuck,
}

/// Change a running `send` of this VM.
#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// UUID or name of the VM, as `scaleaway status` has it.
    vm: String,
    #[arg(value_enum)]
    what: What,
    value: String,
    #[command(flatten)]
    state: StateDirArgs,
}

/// End a running move of this VM: before Commit the guest stays at the source.
#[derive(Debug, clap::Args)]
pub(crate) struct AbortArgs {
    /// UUID or name of the VM, as `scaleaway status` has it.
    vm: String,
    #[command(flatten)]
    state: StateDirArgs,
}

/// Exit code 0 when it is set, 1 when the other process refused.
pub(crate) async fn set(args: SetArgs) -> anyhow::Result<ExitCode> {
    let setting = setting(args.what, &args.value)?;
    let state = StateDir::open(&args.state)?;
    let answer = call(&state, &args.vm, &Command::Set(setting)).await?;
    told(&answer, "set")
}

/// Exit code 0 when the move ends, 1 when that was refused.
pub(crate) async fn abort(args: AbortArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    let answer = call(&state, &args.vm, &Command::Abort).await?;
    told(&answer, "the move ends, the guest stays")
}

fn setting(what: What, value: &str) -> anyhow::Result<Setting> {
    let mut setting = Setting::default();
    match what {
        What::Downtime => {
            let ms = value.parse().context("give milliseconds, such as 500")?;
            setting.downtime_ms = Some(ms);
        }
        What::MaxBandwidth if value == "off" => setting.max_bandwidth_bps = Some(0),
        What::MaxBandwidth => match rate(value) {
            Ok(bps) => setting.max_bandwidth_bps = Some(bps),
            Err(error) => bail!(error),
        },
        What::Yield => match yield_ms(value) {
            Some(ms) => setting.yield_ms = Some(ms),
            None => bail!("give on, off or milliseconds, such as 5"),
        },
        What::WhenStuck => {
            let known: transport::session::WhenStuck = value.parse()?;
            setting.when_stuck = Some(known.to_string());
        }
    }
    Ok(setting)
}

fn told(answer: &Value, done: &str) -> anyhow::Result<ExitCode> {
    if answer["ok"] == Value::Bool(true) {
        say(done);
        return Ok(ExitCode::SUCCESS);
    }
    bail!("{}", answer["error"].as_str().unwrap_or("refused"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values are read before anybody is asked.
    #[test]
    fn settings() {
        let check = |what, value: &str, expected: Option<Setting>| {
            assert_eq!(setting(what, value).ok(), expected, "{value}");
        };
        let downtime = Setting {
            downtime_ms: Some(500),
            ..Setting::default()
        };
        check(What::Downtime, "500", Some(downtime));
        check(What::Downtime, "soon", None);
        let cap = |bps| Setting {
            max_bandwidth_bps: Some(bps),
            ..Setting::default()
        };
        check(What::MaxBandwidth, "20M", Some(cap(20_000_000)));
        check(What::MaxBandwidth, "off", Some(cap(0)));
        check(What::MaxBandwidth, "20MB", None);
        let force = Setting {
            when_stuck: Some("force".into()),
            ..Setting::default()
        };
        check(What::WhenStuck, "force", Some(force));
        check(What::WhenStuck, "hope", None);
    }
}
