//! The overlay: one segment over three hosts, and a MAC that moves when its host says so.

use std::time::Duration;

use testbed::host::Host;
use testbed::lab::{Lab, LabOptions, wait_for_ports};
use testbed::overlay::{CLIENT_OVERLAY_ADDRESS, GUEST_ADDRESS, Overlay, TAP};
use testbed::probe::PingProbe;
use testbed::requirement::{NETWORK, met};
use testbed_link::named;

const GUEST_MAC: &str = "52:54:00:5c:a1:e1";
const PROGRAM: &str = env!("CARGO_BIN_EXE_testbed");

/// Packets of full size pass between user and client, and TCP with its offloads does too.
#[test]
fn hosts_reach_each_other() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = lab("wan-100m")?;
    Overlay::join(&lab, GUEST_MAC, PROGRAM.as_ref())?;
    let full = [
        "-c",
        "3",
        "-i",
        "0.2",
        "-M",
        "do",
        "-s",
        "1422",
        CLIENT_OVERLAY_ADDRESS,
    ];
    lab.user.output(lab.user.command("ping").args(full))?;

    let mut server = lab.client.command("iperf3");
    let mut server = lab.client.spawn(
        server
            .args(["-s", "-1"])
            .stdout(std::process::Stdio::null()),
    )?;
    let client = ["-c", CLIENT_OVERLAY_ADDRESS, "-t", "3", "-J"];
    let report = testbed::clock::wait_until("iperf3", Duration::from_secs(10), || {
        Ok(lab
            .user
            .output(lab.user.command("iperf3").args(client))
            .ok())
    })?;
    server.wait()?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    let rate = report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .unwrap_or_default();
    println!("TCP through the overlay: {:.1} Mbit/s", rate / 1e6);
    assert!(rate > 40e6, "{rate} bit/s");
    Ok(())
}

/// A stand-in for the guest (its address and MAC on a host's tap side) is pinged while it "moves":
/// the user's packets follow the hook's calls to the client, and back when the move failed.
#[test]
fn hook_moves_the_mac_there_and_back() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = lab("wan-100m")?;
    let overlay = Overlay::join(&lab, GUEST_MAC, PROGRAM.as_ref())?;
    let hook = |host: &Host, role: &str, phase: &str| -> anyhow::Result<()> {
        let mut command = host.command(overlay.hook());
        host.output(command.arg(phase).env("SCALEAWAY_ROLE", role))?;
        Ok(())
    };
    let [at_cloud, at_client] = [
        StandIn::plug_in(&lab.cloud)?,
        StandIn::plug_in(&lab.client)?,
    ];
    at_cloud.run()?;
    let ping = PingProbe::start(&lab.user, GUEST_ADDRESS, Duration::from_millis(20))?;
    testbed::clock::pause(Duration::from_secs(1));

    // The guest stops at cloud and its MAC moves; it runs at the client only half a second later.
    at_cloud.stop()?;
    hook(&lab.client, "target", "stopped")?;
    testbed::clock::pause(Duration::from_millis(500));
    at_client.run()?;
    hook(&lab.client, "target", "running")?;
    testbed::clock::pause(Duration::from_secs(1));
    let moved_us = testbed::clock::epoch_us();

    // A failed move: both sides are told, and the source's host has it again.
    at_client.stop()?;
    hook(&lab.client, "target", "failed")?;
    hook(&lab.cloud, "source", "failed")?;
    at_cloud.run()?;
    testbed::clock::pause(Duration::from_secs(4));
    let log = ping.stop()?;

    let back_us = moved_us + 2_000_000;
    let there = log.span(moved_us - 300_000, moved_us - 100_000);
    let back = log.span(back_us, back_us + 1_000_000);
    println!("there {there:?}\nback {back:?}");
    assert!(
        there.sent >= 8 && there.lost == 0 && there.rtt_p50_ms.unwrap() > 49.0,
        "{there:?}"
    );
    assert!(
        back.sent >= 40 && back.lost == 0 && back.rtt_p50_ms.unwrap() < 5.0,
        "{back:?}"
    );
    let calls = overlay.hook_calls(&lab.client)?;
    let took: Vec<_> = calls
        .iter()
        .map(|call| (call.phase.as_str(), call.took_us))
        .collect();
    println!("the hook took (us) {took:?}");
    assert_eq!(calls.len(), 3);
    Ok(())
}

/// A namespace's worth of guest in place of a tap: an interface with the guest's MAC behind a
/// bridge port that is up, as a tap is while a QEMU waits. It answers only while it "runs".
struct StandIn<'a> {
    host: &'a Host,
}

impl<'a> StandIn<'a> {
    fn plug_in(host: &'a Host) -> anyhow::Result<Self> {
        let stand_in = Self { host };
        stand_in.sh(&format!(
            "ip link del {TAP}
             unshare --net sleep 600 & guest=$!
             while [ \"$(readlink /proc/$guest/ns/net)\" = \"$(readlink /proc/self/ns/net)\" ]; do
                 sleep 0.02
             done
             # Or it would announce itself by neighbour discovery.
             nsenter -t $guest -n sh -c 'echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6'
             ip link add {TAP} type veth peer name eth0 address {GUEST_MAC} netns $guest
             nsenter -t $guest -n ip link set eth0 up
             ip link set {TAP} mtu 1450 master br0 up
             echo $guest > guest"
        ))?;
        wait_for_ports(host, 2)?;
        Ok(stand_in)
    }

    fn run(&self) -> anyhow::Result<()> {
        self.sh(&format!(
            "nsenter -t $(cat guest) -n ip addr add {GUEST_ADDRESS}/24 dev eth0"
        ))
    }

    fn stop(&self) -> anyhow::Result<()> {
        self.sh("nsenter -t $(cat guest) -n ip addr flush dev eth0")
    }

    fn sh(&self, script: &str) -> anyhow::Result<()> {
        let mut command = self.host.command("sh");
        // The background process must keep no pipe of ours open, or the end would not be seen.
        command.args(["-ec", &format!("exec 2>>stand-in.log >/dev/null\n{script}")]);
        self.host.output(&mut command)?;
        Ok(())
    }
}

fn lab(link: &str) -> anyhow::Result<Lab> {
    let mut options = LabOptions::new(named(link).expect("a named link"))?;
    options.program = PROGRAM.into();
    Lab::start(&options)
}
