//! TCP's congestion control: what namespaces may use, and what a host does use.
//!
//! A namespace may only take a default from the machine's list of allowed ones. The first run of
//! several notes the machine's own list in the lab's directory, the last one puts it back.

use std::fs;
use std::path::Path;

use anyhow::Context;

use super::{run_checked, run_dir};
use crate::host::Host;

const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
const AVAILABLE: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";
const SAVED: &str = "allowed-congestion-controls";
const WANTED: [&str; 2] = ["bbr", "cubic"];

/// Allows bbr and cubic in namespaces, as far as this kernel has them.
pub(super) fn allow_congestion_controls() -> anyhow::Result<()> {
    let allowed = fs::read_to_string(ALLOWED).with_context(|| format!("read {ALLOWED}"))?;
    let available = fs::read_to_string(AVAILABLE).with_context(|| format!("read {AVAILABLE}"))?;
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    let missing: Vec<_> = WANTED
        .into_iter()
        .filter(|name| has(&available, name) && !has(&allowed, name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let saved = run_dir::base().join(SAVED);
    if !saved.exists() {
        fs::write(&saved, &allowed).context("note the machine's setting")?;
    }
    let wider = format!("{} {}", allowed.trim(), missing.join(" "));
    fs::write(ALLOWED, wider).with_context(|| format!("write {ALLOWED}"))
}

/// Puts the machine's own list back. The caller knows that no other run is alive.
pub(super) fn restore(base: &Path) -> anyhow::Result<()> {
    let saved = base.join(SAVED);
    if let Ok(allowed) = fs::read_to_string(&saved) {
        fs::write(ALLOWED, allowed.trim()).with_context(|| format!("write {ALLOWED}"))?;
        fs::remove_file(&saved).context("remove the note of the machine's setting")?;
    }
    Ok(())
}

/// Makes `name` the host's congestion control for new TCP connections.
///
/// # Errors
/// If the kernel does not have it.
pub fn set_congestion_control(host: &Host, name: &str) -> anyhow::Result<()> {
    let setting = format!("echo {name} > /proc/sys/net/ipv4/tcp_congestion_control");
    run_checked(host.network_command("sh").args(["-c", &setting]))
        .with_context(|| format!("set congestion control {name} in {}", host.name()))
}
