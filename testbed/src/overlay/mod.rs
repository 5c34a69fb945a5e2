//! The overlay: one Ethernet segment over the three hosts, on kernel VXLAN, with the guest on it.
//!
//! ```text
//!  host: tap0 (guest) -- br0 -- vxlan7 ==UDP 4789== the other two hosts
//! ```
//!
//! Flood lists are fixed (no multicast), learning is on. Tunnels have addresses of their own on the
//! underlay, so that a client that changes its address moves its migration and not its overlay.
//! The migration's own packets go beside the overlay, on the underlay.
//!
//! Reading order: this file, then `hook` (moves the guest's MAC at STOP).

mod hook;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

pub use hook::{HookCall, HookSettings, run as run_hook};

use crate::host::Host;
use crate::lab::{
    CLIENT_TUNNEL, CLOUD_TUNNEL, Lab, UNDERLAY_DEVICE, USER_TUNNEL, ip, wait_for_ports,
};
use crate::netns::PRIVATE;

/// The tap that a guest's card plugs into, on cloud and client.
pub const TAP: &str = "tap0";
/// The guest's address in the overlay.
pub const GUEST_ADDRESS: &str = "10.10.0.10";
/// The cloud's address in the overlay.
pub const CLOUD_OVERLAY_ADDRESS: &str = "10.10.0.1";
/// The client's address in the overlay.
pub const CLIENT_OVERLAY_ADDRESS: &str = "10.10.0.2";
/// The user's address in the overlay.
pub const USER_OVERLAY_ADDRESS: &str = "10.10.0.3";
/// What fits: 1500 less IPv4 20, UDP 8, VXLAN 8, Ethernet 14. A larger guest MTU is a black hole.
pub const OVERLAY_MTU: u32 = 1450;

const BRIDGE: &str = "br0";
const VXLAN: &str = "vxlan7";
const HOOK: &str = "hook";
const HOOK_LOG: &str = "hook.log";

/// The overlay of a lab.
#[derive(Debug)]
pub struct Overlay {
    guest_mac: String,
    program: PathBuf,
}

impl Overlay {
    /// Joins the three hosts, for a guest of this MAC. `program` is the testbed's.
    ///
    /// # Errors
    /// If the network cannot be set up.
    pub fn join(lab: &Lab, guest_mac: &str, program: &Path) -> anyhow::Result<Self> {
        let hosts = [
            (&lab.cloud, CLOUD_TUNNEL, CLOUD_OVERLAY_ADDRESS),
            (&lab.client, CLIENT_TUNNEL, CLIENT_OVERLAY_ADDRESS),
            (&lab.user, USER_TUNNEL, USER_OVERLAY_ADDRESS),
        ];
        let overlay = Self {
            guest_mac: guest_mac.to_owned(),
            program: program.to_owned(),
        };
        for (number, (host, tunnel, address)) in (1u8..).zip(hosts) {
            bridge(host, number, address)?;
            let peers = hosts
                .iter()
                .map(|(_, peer, _)| *peer)
                .filter(|peer| *peer != tunnel);
            vxlan(host, tunnel, peers)?;
            overlay.write_hook(host)?;
        }
        for host in [&lab.cloud, &lab.client] {
            tap(host)?;
        }
        for (host, _, _) in hosts {
            // The tap forwards only once a guest has opened it.
            wait_for_ports(host, 1)?;
        }
        Ok(overlay)
    }

    /// The program to give to `--hook`, as a host sees it.
    #[must_use]
    pub fn hook(&self) -> PathBuf {
        Path::new(PRIVATE).join(HOOK)
    }

    /// Moves the guest's MAC to this host now, as the hook does.
    ///
    /// # Errors
    /// If the hook's program fails.
    pub fn claim(&self, host: &Host) -> anyhow::Result<()> {
        let mut command = host.command(self.hook());
        command.arg("stopped").env("SCALEAWAY_ROLE", "target");
        host.output(&mut command)?;
        Ok(())
    }

    /// What the hook was called for in this host.
    ///
    /// # Errors
    /// If its log cannot be read.
    pub fn hook_calls(&self, host: &Host) -> anyhow::Result<Vec<HookCall>> {
        let log = host.outside(&Path::new(PRIVATE).join(HOOK_LOG));
        if !log.exists() {
            return Ok(Vec::new());
        }
        let text = fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
        text.lines()
            .map(|line| serde_json::from_str(line).context("read a line of the hook's log"))
            .collect()
    }

    fn write_hook(&self, host: &Host) -> anyhow::Result<()> {
        let path = host.outside(&self.hook());
        let script = format!(
            "#!/bin/sh\nexec '{}' __hook --mac {} --tap {TAP} --tunnel {VXLAN} \
             --log {PRIVATE}/{HOOK_LOG} \"$@\"\n",
            self.program.display(),
            self.guest_mac,
        );
        fs::write(&path, script).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }
}

fn bridge(host: &Host, number: u8, address: &str) -> anyhow::Result<()> {
    let mac = format!("02:10:00:00:00:{number:02x}");
    let quiet = "stp_state 0 forward_delay 0 mcast_snooping 0";
    ip(
        host,
        &format!("link add {BRIDGE} address {mac} mtu {OVERLAY_MTU} type bridge {quiet}"),
    )?;
    ip(host, &format!("addr add {address}/24 dev {BRIDGE}"))?;
    ip(host, &format!("link set {BRIDGE} up"))
}

fn vxlan<'a>(
    host: &Host,
    tunnel: &str,
    peers: impl Iterator<Item = &'a str>,
) -> anyhow::Result<()> {
    let ends = format!("local {tunnel} dev {UNDERLAY_DEVICE} dstport 4789 ttl 64");
    ip(
        host,
        &format!("link add {VXLAN} mtu {OVERLAY_MTU} type vxlan id 7 {ends}"),
    )?;
    ip(host, &format!("link set {VXLAN} master {BRIDGE} up"))?;
    for peer in peers {
        let entry = [
            "fdb",
            "append",
            "00:00:00:00:00:00",
            "dev",
            VXLAN,
            "dst",
            peer,
        ];
        host.output(host.network_command("bridge").args(entry))?;
    }
    Ok(())
}

fn tap(host: &Host) -> anyhow::Result<()> {
    ip(host, &format!("tuntap add {TAP} mode tap"))?;
    ip(
        host,
        &format!("link set {TAP} mtu {OVERLAY_MTU} master {BRIDGE} up"),
    )
}
