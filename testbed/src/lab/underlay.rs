//! The network below the overlay: one subnet, cut in two by the emulated link.
//!
//! Neighbour entries are fixed, so that no lost ARP packet stalls a run for a second, and only what
//! hosts send is counted on the link. Offloads are off where frames enter: the emulator must see
//! what a wire would carry, at most 1500 bytes with finished checksums.

use std::time::Duration;

use anyhow::Context;

use super::run_checked;
use crate::clock;
use crate::host::Host;

/// The cloud's address.
pub const CLOUD_ADDRESS: &str = "10.70.0.1";
/// The client's address at the start.
pub const CLIENT_ADDRESS: &str = "10.70.0.2";
/// The client's address after it changed networks.
pub const CLIENT_ADDRESS_2: &str = "10.70.0.102";
/// The user's address.
pub const USER_ADDRESS: &str = "10.70.0.3";
/// The cloud's tunnel end.
pub const CLOUD_TUNNEL: &str = "10.70.1.1";
/// The client's tunnel end; it stays when the client changes its address.
pub const CLIENT_TUNNEL: &str = "10.70.1.2";
/// The user's tunnel end.
pub const USER_TUNNEL: &str = "10.70.1.3";
/// Each host's underlay interface.
pub const UNDERLAY_DEVICE: &str = "net0";

/// The emulator's interface towards cloud and user.
pub(super) const SITE_PORT: &str = "site-port";
/// The emulator's interface towards the client.
pub(super) const FAR_PORT: &str = "to-client";

const PORTS_LIMIT: Duration = Duration::from_secs(10);

const OFFLOADS: [&str; 10] = [
    "tx",
    "off",
    "tso",
    "off",
    "gso",
    "off",
    "gro",
    "off",
    "tx-udp-segmentation",
    "off",
];

/// Cables, addresses, neighbours.
pub(super) fn connect(
    cloud: &Host,
    client: &Host,
    user: &Host,
    middle: &Host,
) -> anyhow::Result<()> {
    let hosts = [
        (cloud, CLOUD_ADDRESS, CLOUD_TUNNEL, "to-cloud"),
        (client, CLIENT_ADDRESS, CLIENT_TUNNEL, FAR_PORT),
        (user, USER_ADDRESS, USER_TUNNEL, "to-user"),
    ];
    for (number, (host, address, tunnel, port)) in (1u8..).zip(hosts) {
        cable(host, middle, port, &mac(number))?;
        for address in [address, tunnel] {
            ip(
                host,
                &format!("addr add {address}/24 dev {UNDERLAY_DEVICE}"),
            )?;
        }
        ip(host, &format!("link set {UNDERLAY_DEVICE} up"))?;
        for (other, (_, other_address, other_tunnel, _)) in (1u8..).zip(hosts) {
            if other != number {
                neighbour(host, other_address, &mac(other))?;
                neighbour(host, other_tunnel, &mac(other))?;
            }
        }
        neighbour(host, CLIENT_ADDRESS_2, &mac(2))?;
        offloads_off(host, UNDERLAY_DEVICE)?;
    }
    ip(
        middle,
        &format!("link add site-end type veth peer name {SITE_PORT}"),
    )?;
    ip(
        middle,
        "link add site type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
    )?;
    for port in ["to-cloud", "to-user", "site-end"] {
        ip(middle, &format!("link set {port} master site"))?;
    }
    for device in [
        "to-cloud", "to-user", "site-end", SITE_PORT, FAR_PORT, "site",
    ] {
        ip(middle, &format!("link set {device} up"))?;
        if device != "site" {
            offloads_off(middle, device)?;
        }
    }
    only_for_the_client(middle)?;
    wait_for_ports(middle, 3)
}

/// Keeps what the site's hosts say to each other, and to all, off the emulated link.
fn only_for_the_client(middle: &Host) -> anyhow::Result<()> {
    let bridge = |words: &str| {
        run_checked(
            middle
                .network_command("bridge")
                .args(words.split_whitespace()),
        )
        .context("set up the site's bridge")
    };
    bridge("link set dev site-end flood off mcast_flood off bcast_flood off")?;
    bridge(&format!(
        "fdb replace {} dev site-end master static",
        mac(2)
    ))
}

/// Waits until `count` bridge ports of a host forward: the kernel notices a cable up to 1 s late.
///
/// # Errors
/// If they do not within 10 s.
pub fn wait_for_ports(host: &Host, count: usize) -> anyhow::Result<()> {
    clock::wait_until("the bridge's ports", PORTS_LIMIT, || {
        let ports = host.output(host.network_command("bridge").arg("link"))?;
        let forwarding = ports
            .lines()
            .filter(|line| line.contains("state forwarding"))
            .count();
        Ok((forwarding == count).then_some(()))
    })
}

/// Gives the client its other address. Connections of the first one see their packets vanish.
pub(super) fn change_client_address(client: &Host, to_second: bool) -> anyhow::Result<()> {
    let (old, new) = match to_second {
        true => (CLIENT_ADDRESS, CLIENT_ADDRESS_2),
        false => (CLIENT_ADDRESS_2, CLIENT_ADDRESS),
    };
    ip(client, &format!("addr add {new}/24 dev {UNDERLAY_DEVICE}"))?;
    ip(client, &format!("addr del {old}/24 dev {UNDERLAY_DEVICE}"))
}

fn cable(host: &Host, middle: &Host, port: &str, mac: &str) -> anyhow::Result<()> {
    let peer = format!("peer name {port} netns {}", middle.holder());
    ip(
        host,
        &format!("link add {UNDERLAY_DEVICE} address {mac} mtu 1500 type veth {peer}"),
    )
}

fn neighbour(host: &Host, address: &str, mac: &str) -> anyhow::Result<()> {
    let entry = format!("{address} lladdr {mac} dev {UNDERLAY_DEVICE} nud permanent");
    ip(host, &format!("neigh replace {entry}"))
}

fn mac(number: u8) -> String {
    format!("02:70:00:00:00:{number:02x}")
}

fn offloads_off(host: &Host, device: &str) -> anyhow::Result<()> {
    run_checked(
        host.network_command("ethtool")
            .arg("-K")
            .arg(device)
            .args(OFFLOADS),
    )
    .context("switch offloads off")
}

/// One `ip` command in the host's network.
pub(crate) fn ip(host: &Host, words: &str) -> anyhow::Result<()> {
    run_checked(host.network_command("ip").args(words.split_whitespace()))
        .with_context(|| format!("set up the network of {}", host.name()))
}
