//! One migration on its way, whichever arm makes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::native::{self, DOWNTIME_MS, Method};
use super::ssh::Tunnel;
use super::{Arm, Congestion};
use crate::clock;
use crate::guest::{Guest, Place};
use crate::lab::{CLIENT_ADDRESS, Lab, set_congestion_control};
use crate::netns::PRIVATE;
use crate::product::{self, Product, Running};

/// Where QEMU's own migration listens.
const MIGRATION_PORT: u16 = 4444;
/// UDP port of the product.
const PRODUCT_PORT: u16 = 7117;
/// From the target's RESUME to the end of the source's part.
const FINISH_MAX: Duration = Duration::from_secs(20);

/// Both ends of a migration.
#[derive(Debug)]
pub struct Sides<'a> {
    /// The lab they are in.
    pub lab: &'a Lab,
    /// The guest at cloud.
    pub source: &'a Guest,
    /// The QEMU at client that waits for it.
    pub target: &'a Guest,
    /// Program for `--hook`, as the hosts see it.
    pub hook: Option<PathBuf>,
}

/// A migration that is prepared, and then on its way.
#[derive(Debug)]
pub enum Flight {
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
        /// `send --disable`.
        disabled: Option<String>,
        /// At client.
        receive: Running,
        /// At cloud, once it is started.
        send: Option<Running>,
    },
}

impl Flight {
    /// Everything that is done before the clock starts: keys, listening ends, TCP settings.
    ///
    /// # Errors
    /// When a part does not start.
    pub fn prepare(arm: &Arm, sides: &Sides<'_>) -> anyhow::Result<Self> {
        let (cloud, client) = (&sides.lab.cloud, &sides.lab.client);
        match arm {
            Arm::Qemu {
                method,
                through_ssh,
                congestion,
            } => {
                set_congestion(sides, *congestion)?;
                let tunnel = match through_ssh {
                    true => Some(Box::new(Tunnel::open(
                        cloud,
                        client,
                        CLIENT_ADDRESS,
                        MIGRATION_PORT,
                    )?)),
                    false => None,
                };
                Ok(Self::Native {
                    method: *method,
                    tunnel,
                    switched: false,
                })
            }
            Arm::Scaleaway { disabled } => {
                let (cloud, client) = (at(Place::Host(cloud))?, at(Place::Host(client))?);
                product::introduce(&cloud, &client)?;
                let mut arguments = words(&["--listen", &format!("0.0.0.0:{PRODUCT_PORT}")]);
                arguments.extend(words(&["--peer", "cloud"]));
                arguments.extend(role_arguments(sides.target, &sides.hook));
                let log = sides.lab.client.outside(&private("receive.log"));
                let mut receive = client.start("receive", &arguments, &log)?;
                receive.wait_listening()?;
                Ok(Self::Product {
                    disabled: disabled.clone(),
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
            Self::Native { method, tunnel, .. } => {
                let listen = format!("tcp:0.0.0.0:{MIGRATION_PORT}");
                let host = if tunnel.is_some() {
                    "127.0.0.1"
                } else {
                    CLIENT_ADDRESS
                };
                let dial = format!("tcp:{host}:{MIGRATION_PORT}");
                native::start(sides.source, sides.target, *method, &listen, &dial)
            }
            Self::Product { disabled, send, .. } => {
                let to = format!("{CLIENT_ADDRESS}:{PRODUCT_PORT}");
                let mut arguments = words(&["--to", &to, "--peer", "client"]);
                arguments.extend(words(&["--downtime", &DOWNTIME_MS.to_string()]));
                if let Some(stage) = disabled {
                    arguments.extend(words(&["--disable", stage]));
                }
                arguments.extend(role_arguments(sides.source, &sides.hook));
                let cloud = at(Place::Host(&sides.lab.cloud))?;
                let log = sides.lab.cloud.outside(&private("send.log"));
                *send = Some(cloud.start("send", &arguments, &log)?);
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

    /// After the target's RESUME: waits for the source's part; the product's report.
    ///
    /// # Errors
    /// When an end does not come to its end.
    pub fn finish(&mut self, sides: &Sides<'_>) -> anyhow::Result<Option<Value>> {
        match self {
            Self::Native { .. } => {
                clock::wait_until("the source's end of the migration", FINISH_MAX, || {
                    native::check(sides.source)?;
                    let status = sides.source.monitor().migration_status()?;
                    Ok((status == "completed").then_some(()))
                })?;
                Ok(None)
            }
            Self::Product { receive, send, .. } => {
                let send = send.as_mut().context("it was not started")?;
                for running in [send, receive] {
                    let code = running.wait(FINISH_MAX)?;
                    if code != 0 {
                        bail!("it ended with {code}: {}", last_line(running));
                    }
                }
                let path = sides.lab.cloud.outside(&private("product-report.json"));
                let text = fs::read(&path).context("`send` wrote no report")?;
                Ok(Some(
                    serde_json::from_slice(&text).context("the report is no JSON")?,
                ))
            }
        }
    }
}

fn set_congestion(sides: &Sides<'_>, congestion: Congestion) -> anyhow::Result<()> {
    set_congestion_control(&sides.lab.cloud, congestion.name())?;
    set_congestion_control(&sides.lab.client, congestion.name())
}

fn at(place: Place<'_>) -> anyhow::Result<Product<'_>> {
    Ok(Product::new(place, &product::program()?, &private("state")))
}

/// What both roles are given.
fn role_arguments(guest: &Guest, hook: &Option<PathBuf>) -> Vec<String> {
    let report = private("product-report.json").display().to_string();
    let monitor = guest.product_monitor().display().to_string();
    let mut arguments = words(&["--qmp", &monitor, "--report", &report]);
    if let Some(hook) = hook {
        arguments.extend(words(&["--hook", &hook.display().to_string()]));
    }
    arguments
}

fn private(name: &str) -> PathBuf {
    Path::new(PRIVATE).join(name)
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

fn last_line(running: &Running) -> String {
    let output = running.output();
    // A progress line is overwritten by carriage returns.
    let line = output
        .split(['\n', '\r'])
        .rfind(|line| !line.trim().is_empty());
    line.unwrap_or_default().trim().to_owned()
}
