//! The hook program: moves the guest's MAC in the overlay when the guest moves (`testbed __hook`).
//!
//! It is what an operator of such an overlay would give to the product's `--hook`. A host claims the
//! MAC by one RARP of its own on the tunnel, from which all others learn, and one entry in its own
//! bridge. Done at STOP, packets then wait in the tap and are answered late, not lost; done only at
//! RUN, all of a downtime's packets are lost. A failed move claims it back for the source's host.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::wan::Port;

/// What the hook is installed with.
#[derive(Clone, Debug)]
pub struct HookSettings {
    /// The guest's MAC.
    pub mac: String,
    /// Its tap on this host.
    pub tap: String,
    /// This host's tunnel device.
    pub tunnel: String,
    /// A line of JSON is added for each call.
    pub log: PathBuf,
}

/// One call, as logged.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HookCall {
    /// Microseconds since 1970, when the hook had started.
    pub at_us: u64,
    /// How long it took until the MAC had moved.
    pub took_us: u64,
    /// `source` or `target`.
    pub role: String,
    /// `started`, `stopped`, `running` or `failed`.
    pub phase: String,
    /// What it did.
    pub action: Action,
}

/// What a call does to the MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing.
    None,
    /// This host takes the MAC.
    Claim,
    /// This host lets go of it.
    Release,
}

/// Gaps before the second and third RARP, for a link that loses the first. They end soon, so that
/// none comes after a claim by the other side.
const RARP_GAPS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(20)];

/// Runs the hook for a phase.
///
/// # Errors
/// If role or phase are not known, or the network refuses.
pub fn run(settings: &HookSettings, role: &str, phase: &str) -> anyhow::Result<()> {
    let at_us = clock::epoch_us();
    let action = decide(role, phase)?;
    // Closing a packet socket takes the kernel longer than all the rest: it is left to the end.
    let port = match action {
        Action::None => None,
        Action::Claim => Some(claim(settings)?),
        Action::Release => {
            release(settings)?;
            None
        }
    };
    let took_us = clock::epoch_us().saturating_sub(at_us);
    let call = HookCall {
        at_us,
        took_us,
        role: role.into(),
        phase: phase.into(),
        action,
    };
    let mut line = serde_json::to_vec(&call)?;
    line.push(b'\n');
    let mut log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(&settings.log)?;
    log.write_all(&line).context("write the hook's log")?;
    if let Some(mut port) = port {
        for gap in RARP_GAPS {
            clock::pause(gap);
            announce(&mut port, settings)?;
        }
    }
    Ok(())
}

fn decide(role: &str, phase: &str) -> anyhow::Result<Action> {
    ensure!(
        matches!(role, "source" | "target"),
        "SCALEAWAY_ROLE is {role:?}"
    );
    match (phase, role) {
        ("stopped" | "running", "target") | ("failed", "source") => Ok(Action::Claim),
        ("failed", _) => Ok(Action::Release),
        ("started" | "stopped" | "running", _) => Ok(Action::None),
        _ => anyhow::bail!("unknown phase {phase:?}"),
    }
}

fn claim(settings: &HookSettings) -> anyhow::Result<Port> {
    // The announcement first: it has the longer way.
    let mut port = Port::open(&settings.tunnel)?;
    announce(&mut port, settings)?;
    // Without this entry the frames that come would die here: this bridge has learned the MAC
    // behind its tunnel. `dynamic`, or it would never learn again.
    let entry = [
        "fdb",
        "replace",
        &settings.mac,
        "dev",
        &settings.tap,
        "master",
        "dynamic",
    ];
    let status = Command::new("bridge")
        .args(entry)
        .stdin(Stdio::null())
        .status();
    ensure!(
        status.context("run bridge")?.success(),
        "bridge fdb replace failed"
    );
    Ok(port)
}

fn release(settings: &HookSettings) -> anyhow::Result<()> {
    let entry = ["fdb", "del", &settings.mac, "dev", &settings.tap, "master"];
    // It fails where this host never had the MAC, which is as well.
    let quiet = Command::new("bridge")
        .args(entry)
        .stderr(Stdio::null())
        .status();
    quiet.context("run bridge")?;
    Ok(())
}

fn announce(port: &mut Port, settings: &HookSettings) -> anyhow::Result<()> {
    let frame = rarp(parse_mac(&settings.mac)?);
    ensure!(
        port.send(&frame).context("send a RARP")?,
        "the tunnel took no RARP"
    );
    Ok(())
}

/// A RARP request as QEMU's own announcement makes it.
//= qemu net/announce.c, announce_self_create
fn rarp(mac: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&[0x80, 0x35]); // RARP
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]); // Ethernet, IPv4, lengths, request
    frame[22..28].copy_from_slice(&mac); // and four zero bytes: its IP address is not known
    frame[32..38].copy_from_slice(&mac);
    frame
}

fn parse_mac(text: &str) -> anyhow::Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .with_context(|| format!("{text:?} is no MAC"))?;
        *byte = u8::from_str_radix(part, 16).with_context(|| format!("{text:?} is no MAC"))?;
    }
    ensure!(parts.next().is_none(), "{text:?} is no MAC");
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every phase on both sides.
    #[test]
    fn decisions() {
        let phases = ["started", "stopped", "running", "failed"];
        let of = |role| phases.map(|phase| decide(role, phase).unwrap());
        assert_eq!(
            of("target"),
            [Action::None, Action::Claim, Action::Claim, Action::Release]
        );
        assert_eq!(
            of("source"),
            [Action::None, Action::None, Action::None, Action::Claim]
        );
        assert_eq!(
            decide("peer", "failed").unwrap_err().to_string(),
            "SCALEAWAY_ROLE is \"peer\""
        );
        assert_eq!(
            decide("target", "x").unwrap_err().to_string(),
            "unknown phase \"x\""
        );
    }

    /// The frame, byte for byte.
    #[test]
    fn rarp_frame() {
        let frame = rarp(parse_mac("52:54:00:12:34:56").unwrap());
        let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "ffffffffffff 525400123456 8035 0001 0800 06 04 0003 \
                        525400123456 00000000 525400123456 00000000"
            .replace(' ', "");
        assert_eq!(hex[..expected.len()], expected);
        assert!(frame[expected.len() / 2..].iter().all(|byte| *byte == 0));
    }

    /// Text that is no MAC is refused.
    #[test]
    fn not_a_mac() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:xx",
        ] {
            assert!(
                parse_mac(text)
                    .unwrap_err()
                    .to_string()
                    .contains("is no MAC"),
                "{text}"
            );
        }
    }
}
