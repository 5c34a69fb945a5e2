//! The emulator against its own promises: asked and measured, by tools that know nothing of it.
//!
//! Round trips by `ping`; loss and rate by the counters of the hosts' interfaces while `iperf3 -u`
//! sends at 60 % and at 130 % of the rate. One lab; the links are changed live.

use std::process::Stdio;
use std::time::Duration;

use testbed::clock;
use testbed::host::Host;
use testbed::lab::{CLIENT_ADDRESS, Lab, LabOptions, UNDERLAY_DEVICE};
use testbed::probe::PingProbe;
use testbed::requirement::{NETWORK, met};
use testbed::wan::WanCounters;
use testbed_link::{LinkParams, Loss, named};

const LINKS: [&str; 5] = [
    "lan-500m",
    "metro-500m",
    "wan-100m-demo",
    "burst-200m",
    "jitter-40m",
];
/// Tries to fill a link, on a machine that does other work.
const FILL_TRIES: u32 = 4;
/// UDP payload of a full packet: 1500 less IPv4 20 and UDP 8.
const PAYLOAD_BYTES: &str = "1472";

/// What was measured on one link.
#[derive(Debug)]
struct Measured {
    rtt_min_ms: f64,
    rtt_p50_ms: f64,
    rtt_p95_ms: f64,
    loss_share: f64,
    packets: f64,
    rate_bps: f64,
    emulator_cores: f64,
}

/// Five links: round trip, loss and rate are as asked, and the emulator loses nothing by itself.
#[test]
fn asked_against_measured() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let mut options = LabOptions::new(named(LINKS[0]).expect("a named link"))?;
    options.program = env!("CARGO_BIN_EXE_testbed").into();
    let lab = Lab::start(&options)?;
    let mut wrong = Vec::new();
    println!(
        "{:<14} {:>8} {:>8} {:>8} {:>8}  {:>6} {:>6}  {:>8} {:>8}  {:>5}",
        "link", "rtt", "min", "p50", "p95", "loss %", "meas.", "Mbit/s", "meas.", "cores"
    );
    for name in LINKS {
        let link = named(name).expect("a named link");
        lab.wan.set(&link)?;
        let measured = measure(&lab, &link)?;
        println!(
            "{name:<14} {:>8.2} {:>8.2} {:>8.2} {:>8.2}  {:>6.2} {:>6.2}  {:>8.1} {:>8.1}  {:>5.2}",
            rtt_ms(&link),
            measured.rtt_min_ms,
            measured.rtt_p50_ms,
            measured.rtt_p95_ms,
            share(&link) * 100.0,
            measured.loss_share * 100.0,
            rate_mbps(link.rate_bps),
            measured.rate_bps / 1e6,
            measured.emulator_cores,
        );
        wrong.extend(check(name, &link, &measured));
    }
    let counters = lab.wan.counters()?;
    let by_itself = (
        counters.send_failures,
        counters.oversize,
        counters.kernel_drops,
    );
    assert_eq!(
        by_itself,
        (0, 0, 0),
        "losses that no model asked for: {counters:?}"
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn measure(lab: &Lab, link: &LinkParams) -> anyhow::Result<Measured> {
    let ping = PingProbe::start(&lab.cloud, CLIENT_ADDRESS, Duration::from_millis(10))?;
    clock::pause(Duration::from_secs(2));
    let log = ping.stop()?;
    let mut rtts_us: Vec<u64> = log.replies.values().map(|reply| reply.rtt_us).collect();
    rtts_us.sort_unstable();
    let rtt_ms = |percent: usize| {
        let rank = (rtts_us.len() * percent / 100).min(rtts_us.len() - 1);
        Duration::from_micros(rtts_us[rank]).as_secs_f64() * 1e3
    };

    // Until the last ping has gone both ways.
    clock::pause(2 * (link.delay + link.jitter) + Duration::from_millis(100));
    let drops_before = lab.wan.counters()?.queue_drops();
    let (sent, received) = (packets(&lab.cloud)?.sent, packets(&lab.client)?.received);
    udp(lab, link.rate_bps * 6 / 10, 3)?;
    clock::pause(2 * link.delay + Duration::from_millis(200));
    let sent = packets(&lab.cloud)?.sent - sent;
    let lost = sent - (packets(&lab.client)?.received - received);
    let drops = lab.wan.counters()?.queue_drops() - drops_before;
    // A load that comes in bursts may overflow the queue: that is not loss.
    let lost = lost - f64::from(u32::try_from(drops)?);

    let (rate_bps, emulator_cores) = full_rate(lab, link)?;
    Ok(Measured {
        rtt_min_ms: rtt_ms(0),
        rtt_p50_ms: rtt_ms(50),
        rtt_p95_ms: rtt_ms(95),
        loss_share: lost / sent,
        packets: sent,
        rate_bps,
        emulator_cores,
    })
}

/// The rate in the middle of a run that fills the link, once its buffer has filled.
fn full_rate(lab: &Lab, link: &LinkParams) -> anyhow::Result<(f64, f64)> {
    for _ in 0..FILL_TRIES {
        let before = lab.wan.counters()?;
        let measured = std::thread::scope(|scope| {
            let load = scope.spawn(|| udp(lab, link.rate_bps * 130 / 100, 5));
            clock::pause(Duration::from_secs(2));
            let rate = received_rate(lab, Duration::from_secs(2));
            load.join().expect("the load does not panic").and(rate)
        })?;
        // Less than one drop in 20 is no load of 130 %: the machine had no time for the sender.
        let after = lab.wan.counters()?;
        let offered = after.to_client.offered_packets - before.to_client.offered_packets;
        if after.queue_drops() - before.queue_drops() > offered / 20 {
            return Ok(measured);
        }
    }
    anyhow::bail!("iperf3 could not fill the link in {FILL_TRIES} tries: the machine is too busy")
}

/// IP bits per second that the client's interface received, and the emulator's cores meanwhile.
fn received_rate(lab: &Lab, span: Duration) -> anyhow::Result<(f64, f64)> {
    let look = || -> anyhow::Result<(f64, std::time::Instant, WanCounters)> {
        let bytes = packets(&lab.client)?.received_ip_bytes;
        Ok((bytes, clock::now(), lab.wan.counters()?))
    };
    let (bytes_before, start, before) = look()?;
    clock::pause(span);
    let (bytes_after, end, after) = look()?;
    let passed_s = end.duration_since(start).as_secs_f64();
    let cores = (after.cpu_s - before.cpu_s) / passed_s;
    Ok(((bytes_after - bytes_before) * 8.0 / passed_s, cores))
}

/// Counters of a host's underlay interface.
struct Packets {
    received: f64,
    received_ip_bytes: f64,
    sent: f64,
}

fn packets(host: &Host) -> anyhow::Result<Packets> {
    // Of the holder, so that no program needs to start at the moment of the reading.
    let table = std::fs::read_to_string(format!("/proc/{}/net/dev", host.holder()))?;
    let line = table.lines().find_map(|line| {
        line.trim_start()
            .strip_prefix(UNDERLAY_DEVICE)?
            .strip_prefix(':')
    });
    let fields: Vec<f64> = line
        .unwrap_or_default()
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let (bytes, received, sent) = (fields[0], fields[1], fields[9]);
    Ok(Packets {
        received,
        received_ip_bytes: bytes - 14.0 * received,
        sent,
    })
}

/// UDP from cloud to client at `rate_bps` of IP bytes.
fn udp(lab: &Lab, rate_bps: u64, seconds: u32) -> anyhow::Result<()> {
    // The tools go before other work of the machine (and after the emulator): what is measured is
    // the link.
    let mut server = lab.client.command("chrt");
    server
        .args(["--rr", "1", "iperf3", "-s"])
        .stdin(Stdio::null());
    let mut server = lab
        .client
        .spawn(server.stdout(Stdio::null()).stderr(Stdio::null()))?;
    let payload_rate = (rate_bps * 1472 / 1500).to_string();
    clock::wait_until("iperf3", Duration::from_secs(20), || {
        let mut client = lab.cloud.command("chrt");
        client.args([
            "--rr",
            "1",
            "timeout",
            "15",
            "iperf3",
            "-c",
            CLIENT_ADDRESS,
            "-u",
        ]);
        client.args(["-l", PAYLOAD_BYTES, "-b", &payload_rate, "-w", "2M", "-J"]);
        Ok(lab
            .cloud
            .output(client.args(["-t", &seconds.to_string()]))
            .ok())
    })?;
    server.kill()?;
    Ok(())
}

fn check(name: &str, link: &LinkParams, measured: &Measured) -> Vec<String> {
    let jitter_ms = 2.0 * link.jitter.as_secs_f64() * 1e3;
    let rtt_ms = rtt_ms(link);
    let share = share(link);
    // Five standard deviations; a burst is one event of ten packets.
    let burst = match link.loss {
        Loss::Bursts { mean_packets, .. } => 2.0 * mean_packets,
        Loss::None | Loss::Random { .. } => 1.0,
    };
    let spread = 5.0 * (share * burst / measured.packets).sqrt();
    let rate_bps = rate_mbps(link.rate_bps) * 1e6 * (1.0 - share);
    let checks = [
        (
            "rtt min",
            measured.rtt_min_ms,
            rtt_ms - 0.1,
            rtt_ms + 0.3 + jitter_ms / 2.0,
        ),
        (
            "rtt p50",
            measured.rtt_p50_ms,
            rtt_ms - 0.1,
            rtt_ms + 0.5 + jitter_ms,
        ),
        (
            "loss",
            measured.loss_share,
            share - spread,
            share + spread + 1e-4,
        ),
        ("rate", measured.rate_bps, rate_bps * 0.98, rate_bps * 1.01),
    ];
    checks
        .into_iter()
        .filter(|(_, value, low, high)| !(low..=high).contains(&value))
        .map(|(what, value, low, high)| format!("{name}: {what} {value}, not {low} to {high}"))
        .collect()
}

fn rtt_ms(link: &LinkParams) -> f64 {
    2.0 * link.delay.as_secs_f64() * 1e3
}

fn rate_mbps(rate_bps: u64) -> f64 {
    f64::from(u32::try_from(rate_bps / 1000).expect("below 4 Tbit/s")) / 1e3
}

fn share(link: &LinkParams) -> f64 {
    match link.loss {
        Loss::None => 0.0,
        Loss::Random { share } | Loss::Bursts { share, .. } => share,
    }
}
