//! QEMU's own migration, driven by its monitor.

use anyhow::ensure;
use serde_json::json;

use crate::guest::Guest;

/// More than any link has.
const BANDWIDTH_MAX: u64 = 1 << 40;
const MULTIFD_CHANNELS: u32 = 4;
const ZSTD_LEVEL: u32 = 1;
/// Larger than the working set of every scenario.
const XBZRLE_CACHE_BYTES: u64 = 512 << 20;

/// How QEMU sends pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Method {
    /// One stream of whole pages.
    Plain,
    /// Four streams, zstd level 1.
    MultifdZstd,
    /// Plain, and QEMU slows the guest while its passes do not shrink.
    AutoConverge,
    /// Differences to the last version of a page.
    Xbzrle,
    /// The guest runs at the target after the first pass, and misses pages until they come.
    PostcopyPreempt,
}

/// Where both QEMUs meet; the two differ when something stands between.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// What target QEMU listens on.
    pub listen: &'a str,
    /// What source QEMU dials.
    pub dial: &'a str,
}

/// Starts a migration.
///
/// # Errors
/// When QEMU refuses.
pub fn start(
    source: &Guest,
    target: &Guest,
    method: Method,
    ends: &Ends<'_>,
    downtime_ms: u64,
) -> anyhow::Result<()> {
    for guest in [source, target] {
        let capabilities = [
            ("multifd", method == Method::MultifdZstd),
            ("xbzrle", method == Method::Xbzrle),
            ("auto-converge", method == Method::AutoConverge),
            ("postcopy-ram", method == Method::PostcopyPreempt),
            ("postcopy-preempt", method == Method::PostcopyPreempt),
        ];
        let mut parameters = json!({
            "max-bandwidth": BANDWIDTH_MAX,
            "downtime-limit": downtime_ms,
        });
        match method {
            Method::Plain | Method::AutoConverge | Method::PostcopyPreempt => {}
            Method::MultifdZstd => {
                parameters["multifd-channels"] = json!(MULTIFD_CHANNELS);
                parameters["multifd-compression"] = json!("zstd");
                parameters["multifd-zstd-level"] = json!(ZSTD_LEVEL);
            }
            Method::Xbzrle => parameters["xbzrle-cache-size"] = json!(XBZRLE_CACHE_BYTES),
        }
        guest.monitor().set_capabilities(&capabilities)?;
        guest
            .monitor()
            .execute("migrate-set-parameters", &parameters)?;
    }
    target
        .monitor()
        .execute("migrate-incoming", &json!({ "uri": ends.listen }))?;
    source
        .monitor()
        .execute("migrate", &json!({ "uri": ends.dial }))?;
    Ok(())
}

/// Whether it still can succeed.
///
/// # Errors
/// QEMU's own reason when it has failed.
pub fn check(source: &Guest) -> anyhow::Result<()> {
    let status = source.monitor().execute("query-migrate", &json!({}))?;
    let word = status["status"].as_str().unwrap_or_default();
    ensure!(
        !matches!(word, "failed" | "cancelled" | "cancelling"),
        "QEMU's migration {word}: {}",
        status["error-desc"].as_str().unwrap_or("no reason given")
    );
    Ok(())
}
