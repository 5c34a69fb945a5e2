//! Transfers from cloud to client, by each flow's own program.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{CONVERGENCE, Flow, LATER, SHARED, STARTUP, STEADY};
use crate::clock;
use crate::guest::Place;
use crate::host::HostProcess;
use crate::lab::{CLIENT_ADDRESS, Lab};
use crate::netns::PRIVATE;
use crate::product::{self, Product};

/// Beyond the measured time: start, handshakes, results.
const SLACK: Duration = Duration::from_secs(30);
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// Of the first flow; the second has the next one.
const PORT: u16 = 7117;
const IPERF_PORT: u16 = 5201;

/// What a transfer gave.
pub(super) struct Moved {
    /// Bits per second that each application received in the measured part.
    pub(super) flows: Vec<(Flow, f64)>,
    /// Of the whole run, where there is one flow.
    pub(super) whole_bps: Option<f64>,
    /// When the first one began.
    pub(super) started_us: u64,
    /// What was measured, counted from there.
    pub(super) measured: Span,
    /// The programs' own reports.
    pub(super) report: Value,
}

/// A part of a flow's time, counted from its start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) from: Duration,
    pub(super) to: Duration,
}

/// One flow's result.
struct Carried {
    started_us: u64,
    /// Of the measured part.
    goodput_bps: f64,
    whole_bps: f64,
    report: Value,
}

/// Fills the link with one flow.
pub(super) fn alone(flow: Flow, lab: &Lab) -> anyhow::Result<Moved> {
    let measured = Span {
        from: STARTUP,
        to: STARTUP + STEADY,
    };
    let carried = carry(flow, lab, 0, measured)?;
    Ok(Moved {
        flows: vec![(flow, carried.goodput_bps)],
        whole_bps: Some(carried.whole_bps),
        started_us: carried.started_us,
        measured,
        report: carried.report,
    })
}

/// Two flows on one link.
pub(super) fn beside(first: Flow, second: Flow, lab: &Lab) -> anyhow::Result<Moved> {
    let early = Span {
        from: LATER + CONVERGENCE,
        to: LATER + CONVERGENCE + SHARED,
    };
    let late = Span {
        from: CONVERGENCE,
        to: CONVERGENCE + SHARED,
    };
    let first_is_late = first == Flow::Yielding;
    let (spans, pauses) = if first_is_late {
        ([late, early], [LATER, Duration::ZERO])
    } else {
        ([early, late], [Duration::ZERO, LATER])
    };
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            clock::pause(pauses[1]);
            carry(second, lab, 1, spans[1])
        });
        clock::pause(pauses[0]);
        let one = carry(first, lab, 0, spans[0]);
        (one, other.join())
    });
    let one = one.with_context(|| first.to_string())?;
    let other = match other {
        Ok(other) => other.with_context(|| second.to_string())?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    Ok(Moved {
        flows: vec![(first, one.goodput_bps), (second, other.goodput_bps)],
        whole_bps: None,
        started_us: one.started_us.min(other.started_us),
        measured: early,
        report: json!([one.report, other.report]),
    })
}

fn carry(flow: Flow, lab: &Lab, place: u16, measured: Span) -> anyhow::Result<Carried> {
    match flow {
        Flow::Tcp(congestion) => tcp(lab, congestion, IPERF_PORT + place, measured),
        Flow::Scaleaway => scaleaway(lab, &[], PORT + place, measured),
        Flow::Yielding => scaleaway(lab, &["--yield"], PORT + place, measured),
    }
}

fn tcp(lab: &Lab, congestion: &str, port: u16, measured: Span) -> anyhow::Result<Carried> {
    let port_text = port.to_string();
    let mut server = lab.client.command("iperf3");
    server
        .args(["--server", "--json", "--port", &port_text])
        .stdin(Stdio::null());
    let mut server = lab
        .client
        .spawn(server.stdout(Stdio::null()).stderr(Stdio::null()))?;
    wait_for_listener(&mut server, lab, port)?;
    let limit = (measured.to + SLACK).as_secs().to_string();
    let mut client = lab.cloud.command("timeout");
    client
        .args([limit.as_str(), "iperf3", "--client", CLIENT_ADDRESS])
        .args(["--json", "--get-server-output", "--port", &port_text])
        .args(["--congestion", congestion])
        .args(["--time", &measured.to.as_secs().to_string()]);
    let started_us = clock::epoch_us();
    let text = lab.cloud.output(&mut client)?;
    server.kill()?;
    let report: Value = serde_json::from_str(&text).context("read iperf3's report")?;
    let end = &report["end"];
    let used = end["sender_tcp_congestion"].as_str().unwrap_or_default();
    ensure!(used == congestion, "iperf3 used {used:?}, not {congestion}");
    let whole_bps = end["sum_received"]["bits_per_second"]
        .as_f64()
        .context("iperf3's report has no goodput")?;
    let seconds = report["server_output_json"]["intervals"]
        .as_array()
        .context("iperf3's report has no seconds")?;
    let seconds = seconds.iter().map(|second| {
        let field = |name| second["sum"][name].as_f64();
        Some((field("start")?, field("end")?, field("bits_per_second")?))
    });
    let seconds: Option<Vec<_>> = seconds.collect();
    let goodput_bps = mean_bps(&seconds.context("a second without figures")?, measured)
        .context("iperf3's report ends too early")?;
    // The samples of every second fill pages; the end has all that counts.
    Ok(Carried {
        started_us,
        goodput_bps,
        whole_bps,
        report: end.clone(),
    })
}

/// Mean of (from, to, rate) over the measured part; whatever lies half in it counts by half.
fn mean_bps(seconds: &[(f64, f64, f64)], measured: Span) -> Option<f64> {
    let (from, to) = (measured.from.as_secs_f64(), measured.to.as_secs_f64());
    let parts = seconds.iter().map(|&(begin, end, bps)| {
        let time = (end.min(to) - begin.max(from)).max(0.0);
        (time, time * bps)
    });
    let (time, bits) = parts.fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    (time > 0.8 * (to - from)).then(|| bits / time)
}

/// iperf3 does not say that it listens.
fn wait_for_listener(server: &mut HostProcess, lab: &Lab, port: u16) -> anyhow::Result<()> {
    clock::wait_until("iperf3's port", LISTEN_LIMIT, || {
        if let Some(status) = server.try_wait()? {
            anyhow::bail!("iperf3 ended: {status}");
        }
        // State 0A is LISTEN; ports are hexadecimal.
        let path = |family| format!("/proc/{}/net/{family}", lab.client.holder());
        let tables =
            ["tcp", "tcp6"].map(|family| std::fs::read_to_string(path(family)).unwrap_or_default());
        let listens = |line: &str| line.contains(&format!(":{port:04X} ")) && line.contains(" 0A ");
        Ok(tables
            .iter()
            .any(|table| table.lines().any(listens))
            .then_some(()))
    })
}

fn scaleaway(lab: &Lab, options: &[&str], port: u16, measured: Span) -> anyhow::Result<Carried> {
    let program = product::program()?;
    let state = Path::new(PRIVATE).join(format!("state-{port}"));
    let cloud = Product::new(Place::Host(&lab.cloud), &program, &state);
    let client = Product::new(Place::Host(&lab.client), &program, &state);
    product::introduce(&cloud, &client)?;

    let log = format!("bench-link-{port}.log");
    let log = lab.client.outside(&Path::new(PRIVATE).join(log));
    let file = std::fs::File::create(&log).context("make the listener's log")?;
    let mut listener = client.command(&["bench", "link"]);
    listener
        .args(["--listen", &format!("0.0.0.0:{port}")])
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
        .args(["--to", &format!("{CLIENT_ADDRESS}:{port}"), "--json"])
        .args(["--seconds", &measured.to.as_secs().to_string()])
        .args(options);
    let started_us = clock::epoch_us();
    let text = lab.cloud.output(&mut dialer)?;
    let lines = text.lines().map(serde_json::from_str);
    let lines: Vec<Value> = lines
        .collect::<Result<_, _>>()
        .context("read what `bench link` printed")?;
    let report = lines.last().context("`bench link` printed nothing")?;
    let whole_bps = report["goodput_bps"]
        .as_f64()
        .with_context(|| format!("`bench link` has no goodput: {report}"))?;
    let goodput_bps = mean_bps(&seconds_of(&lines), measured)
        .with_context(|| format!("`bench link` ended too early: {report}"))?;
    Ok(Carried {
        started_us,
        goodput_bps,
        whole_bps,
        report: report.clone(),
    })
}

/// The lines of each second as (from, to, rate).
fn seconds_of(lines: &[Value]) -> Vec<(f64, f64, f64)> {
    let mut before = 0.0;
    let second = |line: &Value| {
        let (end, bps) = (line["s"].as_f64()?, line["goodput_bps"].as_f64()?);
        let begin = std::mem::replace(&mut before, end);
        Some((begin, end, bps))
    };
    lines.iter().filter_map(second).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds at the edges count by their part; too few of them are no measurement.
    #[test]
    fn means() {
        let seconds = [(0.0, 1.0, 9.0), (1.0, 2.0, 4.0), (2.0, 3.5, 6.0)];
        let span = |from, to| Span {
            from: Duration::from_millis(from),
            to: Duration::from_millis(to),
        };
        assert_eq!(mean_bps(&seconds, span(1000, 3000)), Some(5.0));
        assert_eq!(mean_bps(&seconds, span(500, 1500)), Some(6.5));
        assert_eq!(mean_bps(&seconds, span(3000, 9000)), None);
    }

    /// The summary is no second.
    #[test]
    fn lines_of_seconds() {
        let line = |text: &str| serde_json::from_str(text).unwrap();
        let lines = [
            line(r#"{"event": "second", "s": 1.0, "goodput_bps": 8.0}"#),
            line(r#"{"event": "second", "s": 2.5, "goodput_bps": 7.0}"#),
            line(r#"{"event": "summary", "goodput_bps": 7.5}"#),
        ];
        assert_eq!(seconds_of(&lines), [(0.0, 1.0, 8.0), (1.0, 2.5, 7.0)]);
    }
}
