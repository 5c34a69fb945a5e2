//! One migration on its way, whichever arm makes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::native::{self, Ends, Method};
use super::ssh::Tunnel;
use super::{Arm, Congestion};
use crate::clock;
use crate::guest::{Guest, Place};
use crate::host::Host;
use crate::lab::{CLIENT_ADDRESS, CLOUD_ADDRESS, Lab, set_congestion_control};
use crate::netns::PRIVATE;
use crate::product::{self, Product, Running};
use crate::stores::Stores;

/// Where QEMU's own migration listens.
const MIGRATION_PORT: u16 = 4444;
/// The product's state directory in the private folder of a host.
const STATE_DIR: &str = "state";
/// UDP port of the product.
const PRODUCT_PORT: u16 = 7117;
/// Measurements of a few seconds, on a slow link too.
const PLAN_MAX: Duration = Duration::from_secs(60);
/// The product's record of a migration, at the source.
pub(crate) const TRACE: &str = "trace.jsonl";

/// What every arm of a run is asked for.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Asked {
    /// The longest downtime.
    pub downtime_ms: u64,
    /// More words for the product's `send`.
    pub send_flags: Vec<String>,
    /// The product writes down what it sees and decides on the way.
    #[serde(skip)]
    pub trace: bool,
    /// The product predicts the move before it starts.
    #[serde(skip)]
    pub plan: bool,
}

/// Both ends of a migration.
#[derive(Debug)]
pub struct Sides<'a> {
    /// The lab they are in.
    pub lab: &'a Lab,
    /// Which way the guest goes.
    pub way: Way,
    /// Which of the migrations that go on at once, from 0: each has ports and files of its own.
    pub slot: u16,
    /// What the arm is asked for.
    pub asked: &'a Asked,
    /// The guest.
    pub source: &'a Guest,
    /// The QEMU that waits for it.
    pub target: &'a Guest,
    /// What both ends of the product have kept of the guest.
    pub stores: Option<&'a Stores>,
    /// A disk image that the target of the product knows, as that host sees it.
    pub known: Option<&'a Path>,
    /// Program for `--hook`, as the hosts see it.
    pub hook: Option<PathBuf>,
}

impl Asked {
    /// Whether the product may stop the guest for longer than asked.
    pub fn may_force(&self, arm: &Arm) -> bool {
        let Arm::Scaleaway { flags, .. } = arm else {
            return false;
        };
        let words: Vec<&str> = flags
            .iter()
            .chain(&self.send_flags)
            .map(String::as_str)
            .collect();
        // The last word counts.
        let mut policies = words.windows(2).filter(|pair| pair[0] == "--when-stuck");
        policies.next_back().is_some_and(|pair| pair[1] == "force")
    }
}

impl Sides<'_> {
    /// Where the product's `send` writes down what it sees and decides.
    pub fn trace_file(&self) -> PathBuf {
        let [(source, _), _] = self.way.ends(self.lab);
        source.outside(&self.private(TRACE))
    }

    /// A file in a host's private folder.
    fn private(&self, name: &str) -> PathBuf {
        let folder = Path::new(PRIVATE);
        match self.slot {
            0 => folder.join(name),
            slot => folder.join(format!("{slot}-{name}")),
        }
    }

    fn migration_port(&self) -> u16 {
        MIGRATION_PORT + self.slot
    }

    fn product_port(&self) -> u16 {
        PRODUCT_PORT + self.slot
    }
}

/// Which way the guest goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// From cloud to client.
    Out,
    /// From client to cloud.
    Back,
}

impl Way {
    /// Host and its name at the source's side, then those at the target's.
    pub fn ends(self, lab: &Lab) -> [(&Host, &'static str); 2] {
        let (cloud, client) = ((&lab.cloud, "cloud"), (&lab.client, "client"));
        match self {
            Self::Out => [cloud, client],
            Self::Back => [client, cloud],
        }
    }

    fn target_address(self) -> &'static str {
        match self {
            Self::Out => CLIENT_ADDRESS,
            Self::Back => CLOUD_ADDRESS,
        }
    }
}

/// A migration that is prepared, and then on its way.
#[derive(Debug)]
pub enum Flight {
    /// None.
    Nothing,
    /// QEMU's own.
    Native {
        /// How QEMU sends.
        method: Method,
        /// Where it goes through ssh.
        tunnel: Option<Box<Tunnel>>,
        /// After the first pass the target is told to run.
        switched: bool,
    },
    /// The product's.
    Product {
        /// The arm's words for `send`.
        flags: Vec<String>,
        /// At the target.
        receive: Running,
        /// At the source, once it is started.
        send: Option<Running>,
    },
}

impl Flight {
    /// Everything that is done before the clock starts: keys, listening ends, TCP settings.
    ///
    /// # Errors
    /// When a part does not start.
    pub fn prepare(arm: &Arm, sides: &Sides<'_>) -> anyhow::Result<Self> {
        match arm {
            Arm::None => Ok(Self::Nothing),
            Arm::Qemu {
                method,
                through_ssh,
                congestion,
            } => {
                set_congestion(sides, *congestion)?;
                let [(source, _), (target, _)] = sides.way.ends(sides.lab);
                let tunnel = match through_ssh {
                    true => Some(Box::new(Tunnel::open(
                        source,
                        target,
                        sides.way.target_address(),
                        sides.migration_port(),
                    )?)),
                    false => None,
                };
                Ok(Self::Native {
                    method: *method,
                    tunnel,
                    switched: false,
                })
            }
            Arm::Scaleaway { flags, .. } => {
                let receive = receive(sides)?;
                if sides.asked.plan {
                    plan(sides)?;
                }
                Ok(Self::Product {
                    flags: flags.clone(),
                    receive,
                    send: None,
                })
            }
        }
    }

    /// The start command.
    ///
    /// # Errors
    /// When it is refused at once.
    pub fn start(&mut self, sides: &Sides<'_>) -> anyhow::Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Native { method, tunnel, .. } => {
                let port = sides.migration_port();
                let listen = format!("tcp:0.0.0.0:{port}");
                let host = if tunnel.is_some() {
                    "127.0.0.1"
                } else {
                    sides.way.target_address()
                };
                let dial = format!("tcp:{host}:{port}");
                let ends = Ends {
                    listen: &listen,
                    dial: &dial,
                };
                let downtime_ms = sides.asked.downtime_ms;
                native::start(sides.source, sides.target, *method, &ends, downtime_ms)
            }
            Self::Product { flags, send, .. } => {
                let [(source, _), _] = sides.way.ends(sides.lab);
                let mut arguments = to_target(sides);
                arguments.extend(role_arguments(sides.source, sides));
                if sides.asked.trace {
                    let trace = sides.private(TRACE).display().to_string();
                    arguments.extend(words(&["--trace", &trace]));
                }
                arguments.extend(flags.iter().cloned());
                arguments.extend(sides.asked.send_flags.iter().cloned());
                let log = source.outside(&sides.private("send.log"));
                *send = Some(at(source, sides)?.start("send", &arguments, &log)?);
                Ok(())
            }
        }
    }

    /// Looks after it, and says in a few words how far it is.
    ///
    /// # Errors
    /// Why it cannot succeed any more.
    pub fn check(&mut self, sides: &Sides<'_>) -> anyhow::Result<String> {
        match self {
            Self::Nothing => Ok("the guest stays".to_owned()),
            Self::Native {
                method,
                tunnel,
                switched,
            } => {
                if let Some(tunnel) = tunnel {
                    tunnel.check()?;
                }
                native::check(sides.source)?;
                let ram = sides
                    .source
                    .monitor()
                    .execute("query-migrate", &json!({}))?["ram"]
                    .take();
                let passes = ram["dirty-sync-count"].as_u64().unwrap_or(0);
                if *method == Method::PostcopyPreempt && passes > 1 && !*switched {
                    sides
                        .source
                        .monitor()
                        .execute("migrate-start-postcopy", &json!({}))?;
                    *switched = true;
                }
                let left_mb = ram["remaining"].as_u64().unwrap_or(0) / 1_000_000;
                Ok(format!("pass {passes}, {left_mb} MB left"))
            }
            Self::Product { receive, send, .. } => {
                let ended = |running: &mut Running| -> anyhow::Result<()> {
                    match running.exit_code()? {
                        None | Some(0) => Ok(()),
                        Some(code) => bail!("it ended with {code}: {}", last_line(running)),
                    }
                };
                ended(receive).context("receive")?;
                let send = send.as_mut().context("it was not started")?;
                ended(send).context("send")?;
                Ok(last_line(send))
            }
        }
    }

    /// After the target's RESUME: waits for the source's part, no longer than `limit`; the product's
    /// reports.
    ///
    /// # Errors
    /// When an end does not come to its end.
    pub fn finish(&mut self, sides: &Sides<'_>, limit: Duration) -> anyhow::Result<Reports> {
        match self {
            Self::Nothing => Ok(Reports::default()),
            Self::Native { .. } => {
                clock::wait_until("the source's end of the migration", limit, || {
                    native::check(sides.source)?;
                    let status = sides.source.monitor().migration_status()?;
                    Ok((status == "completed").then_some(()))
                })?;
                Ok(Reports::default())
            }
            Self::Product { receive, send, .. } => {
                let send = send.as_mut().context("it was not started")?;
                for running in [send, receive] {
                    let code = running.wait(limit)?;
                    if code != 0 {
                        bail!("it ended with {code}: {}", last_line(running));
                    }
                }
                let [(source, _), (target, _)] = sides.way.ends(sides.lab);
                let report = |host: &Host| -> anyhow::Result<Value> {
                    let path = host.outside(&sides.private("product-report.json"));
                    let text = fs::read(&path).context("it wrote no report")?;
                    serde_json::from_slice(&text).context("its report is no JSON")
                };
                Ok(Reports {
                    source: Some(report(source).context("send")?),
                    target: Some(report(target).context("receive")?),
                })
            }
        }
    }
}

/// The product's own reports of a finished move.
#[derive(Clone, Debug, Default)]
pub struct Reports {
    /// By `send`.
    pub source: Option<Value>,
    /// By `receive`.
    pub target: Option<Value>,
}

impl Reports {
    /// Whether pages came after the guest ran at the target.
    pub fn has_post_copy(&self) -> bool {
        let reports = [&self.source, &self.target].into_iter().flatten();
        reports
            .filter_map(|report| report.get("post_copy"))
            .any(Value::is_object)
    }
}

fn set_congestion(sides: &Sides<'_>, congestion: Congestion) -> anyhow::Result<()> {
    set_congestion_control(&sides.lab.cloud, congestion.name())?;
    set_congestion_control(&sides.lab.client, congestion.name())
}

/// `plan` at the source, beside the `receive` that waits; `send` then has it in its report.
fn plan(sides: &Sides<'_>) -> anyhow::Result<()> {
    let [(source, _), _] = sides.way.ends(sides.lab);
    let mut arguments = to_target(sides);
    let monitor = sides.source.product_monitor().display().to_string();
    arguments.extend(words(&["--qmp", &monitor, "--json"]));
    let log = source.outside(&sides.private("plan.log"));
    let mut plan = at(source, sides)?.start("plan", &arguments, &log)?;
    match plan.wait(PLAN_MAX)? {
        0 => Ok(()),
        code => bail!("`plan` ended with {code}: {}", last_line(&plan)),
    }
}

/// Where the target is, and what it is asked for.
fn to_target(sides: &Sides<'_>) -> Vec<String> {
    let [_, (_, peer)] = sides.way.ends(sides.lab);
    let to = format!("{}:{}", sides.way.target_address(), sides.product_port());
    let downtime = sides.asked.downtime_ms.to_string();
    words(&["--to", &to, "--peer", peer, "--downtime", &downtime])
}

/// `receive` at the target, which listens, knows its peer and has what the scenario gives it.
fn receive(sides: &Sides<'_>) -> anyhow::Result<Running> {
    let [(_, peer), (target, _)] = sides.way.ends(sides.lab);
    let (cloud, client) = (&sides.lab.cloud, &sides.lab.client);
    match sides.stores {
        // They know each other since they moved the guest.
        Some(stores) => stores.give(cloud, client, &sides.private(STATE_DIR))?,
        None => product::introduce(&at(cloud, sides)?, &at(client, sides)?)?,
    }
    let product = at(target, sides)?;
    if let Some(image) = sides.known {
        product.share_content(image, peer)?;
    }
    let mut arguments = words(&["--listen", &format!("0.0.0.0:{}", sides.product_port())]);
    arguments.extend(words(&["--peer", peer]));
    arguments.extend(role_arguments(sides.target, sides));
    let log = target.outside(&sides.private("receive.log"));
    let mut receive = product.start("receive", &arguments, &log)?;
    receive.wait_listening()?;
    Ok(receive)
}

fn at<'a>(host: &'a Host, sides: &Sides<'_>) -> anyhow::Result<Product<'a>> {
    let program = product::program()?;
    Ok(Product::new(
        Place::Host(host),
        &program,
        &sides.private(STATE_DIR),
    ))
}

/// What both roles are given.
fn role_arguments(guest: &Guest, sides: &Sides<'_>) -> Vec<String> {
    let report = sides.private("product-report.json").display().to_string();
    let monitor = guest.product_monitor().display().to_string();
    let mut arguments = words(&["--qmp", &monitor, "--report", &report]);
    if let Some(hook) = &sides.hook {
        arguments.extend(words(&["--hook", &hook.display().to_string()]));
    }
    arguments
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

fn last_line(running: &Running) -> String {
    let output = running.output();
    // A progress line is overwritten by carriage returns.
    let lines = || output.split(['\n', '\r']);
    // A wrong word is named before the advice to look for help.
    let refused = lines().find(|line| line.starts_with("error: "));
    let last = lines().rfind(|line| !line.trim().is_empty());
    refused.or(last).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last policy counts, and only the product has one.
    #[test]
    fn who_may_force() {
        let may = |arm: &str, words: &[&str]| {
            let asked = Asked {
                send_flags: self::words(words),
                ..Asked::default()
            };
            asked.may_force(&arm.parse().unwrap())
        };
        assert!(may("scaleaway-force", &[]));
        assert!(may("scaleaway", &["--when-stuck", "force"]));
        assert!(!may("scaleaway-force", &["--when-stuck", "wait"]));
        assert!(!may("scaleaway", &[]) && !may("qemu-plain", &["--when-stuck", "force"]));
    }
}
