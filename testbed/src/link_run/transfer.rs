//! One transfer from cloud to client, by each arm's own program.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::LinkArm;
use crate::clock;
use crate::guest::Place;
use crate::host::HostProcess;
use crate::lab::{CLIENT_ADDRESS, Lab};
use crate::netns::PRIVATE;
use crate::product::{self, Product};

/// Beyond the measured time: start, handshakes, results.
const SLACK: Duration = Duration::from_secs(30);
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 7117;

/// What a transfer gave.
pub(super) struct Moved {
    /// Bits per second that the application received, after the start-up.
    pub(super) goodput_bps: f64,
    /// When it began, if the arm needs a while before.
    pub(super) started_us: Option<u64>,
    /// The program's own report.
    pub(super) report: Value,
}

/// Fills the link for `startup` and `steady`.
pub(super) fn run(
    arm: LinkArm,
    lab: &Lab,
    startup: Duration,
    steady: Duration,
) -> anyhow::Result<Moved> {
    match arm {
        LinkArm::Tcp(congestion) => tcp(lab, congestion, startup, steady),
        LinkArm::Scaleaway => scaleaway(lab, startup + steady),
    }
}

fn tcp(lab: &Lab, congestion: &str, startup: Duration, steady: Duration) -> anyhow::Result<Moved> {
    let mut server = lab.client.command("iperf3");
    server.args(["--server"]).stdin(Stdio::null());
    let mut server = lab
        .client
        .spawn(server.stdout(Stdio::null()).stderr(Stdio::null()))?;
    wait_for_listener(&mut server, lab)?;
    let limit = (startup + steady + SLACK).as_secs().to_string();
    let mut client = lab.cloud.command("timeout");
    client
        .args([
            limit.as_str(),
            "iperf3",
            "--client",
            CLIENT_ADDRESS,
            "--json",
        ])
        .args(["--congestion", congestion])
        .args(["--omit", &startup.as_secs().to_string()])
        .args(["--time", &steady.as_secs().to_string()]);
    let started_us = Some(clock::epoch_us());
    let text = lab.cloud.output(&mut client)?;
    server.kill()?;
    let report: Value = serde_json::from_str(&text).context("read iperf3's report")?;
    let end = &report["end"];
    let used = end["sender_tcp_congestion"].as_str().unwrap_or_default();
    ensure!(used == congestion, "iperf3 used {used:?}, not {congestion}");
    let goodput_bps = end["sum_received"]["bits_per_second"]
        .as_f64()
        .context("iperf3's report has no goodput")?;
    // The samples of every second fill pages; the end has all that counts.
    Ok(Moved {
        goodput_bps,
        started_us,
        report: end.clone(),
    })
}

/// iperf3 does not say that it listens.
fn wait_for_listener(server: &mut HostProcess, lab: &Lab) -> anyhow::Result<()> {
    clock::wait_until("iperf3's port", LISTEN_LIMIT, || {
        if let Some(status) = server.try_wait()? {
            anyhow::bail!("iperf3 ended: {status}");
        }
        // State 0A is LISTEN; 1451 is 5201.
        let path = |family| format!("/proc/{}/net/{family}", lab.client.holder());
        let tables =
            ["tcp", "tcp6"].map(|family| std::fs::read_to_string(path(family)).unwrap_or_default());
        let listens = |line: &str| line.contains(":1451 ") && line.contains(" 0A ");
        Ok(tables
            .iter()
            .any(|table| table.lines().any(listens))
            .then_some(()))
    })
}

fn scaleaway(lab: &Lab, duration: Duration) -> anyhow::Result<Moved> {
    let program = product::program()?;
    let state = Path::new(PRIVATE).join("state");
    let cloud = Product::new(Place::Host(&lab.cloud), &program, &state);
    let client = Product::new(Place::Host(&lab.client), &program, &state);
    product::introduce(&cloud, &client)?;

    let log = lab
        .client
        .outside(&Path::new(PRIVATE).join("bench-link.log"));
    let file = std::fs::File::create(&log).context("make the listener's log")?;
    let mut listener = client.command(&["bench", "link"]);
    listener
        .args(["--listen", &format!("0.0.0.0:{PORT}")])
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let mut listener = lab.client.spawn(&mut listener)?;
    clock::wait_until("the start of `bench link`", LISTEN_LIMIT, || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        if let Some(status) = listener.try_wait()? {
            anyhow::bail!("`bench link` ended: {status}\n{text}");
        }
        Ok(text.contains("listening on").then_some(()))
    })?;

    let mut dialer = cloud.command(&["bench", "link"]);
    dialer
        .args(["--to", &format!("{CLIENT_ADDRESS}:{PORT}"), "--json"])
        .args(["--seconds", &duration.as_secs().to_string()]);
    let started_us = Some(clock::epoch_us());
    let text = lab.cloud.output(&mut dialer)?;
    let last = text
        .lines()
        .last()
        .context("`bench link` printed nothing")?;
    let report: Value = serde_json::from_str(last).context("read the summary of `bench link`")?;
    let goodput_bps = report["steady_goodput_bps"]
        .as_f64()
        .with_context(|| format!("`bench link` has no steady goodput: {last}"))?;
    Ok(Moved {
        goodput_bps,
        started_us,
        report,
    })
}
