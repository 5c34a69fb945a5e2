//! The commands that we use, typed. Names are QEMU's, units are in the field names.
//! //= qemu docs/interop/qemu-qmp-ref

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::Client;
use super::error::QmpError;
use super::names::{Capability, MigrationStatus, RunState};
use crate::memory::flat_view;
use crate::memory::ramblock::{self, RamBlock};

/// Reply of `query-status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VmStatus {
    /// The run state.
    pub status: RunState,
    /// Do the vCPUs run?
    pub running: bool,
}

/// Reply of `query-migrate`. What QEMU leaves out is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Where the migration is; [`MigrationStatus::None`] when there was none.
    #[serde(default = "no_migration")]
    pub status: MigrationStatus,
    /// Why it failed, in QEMU's words.
    pub error_desc: Option<String>,
    /// Black-out in ms, once completed. 7.2's is nonsense when the target's word came late.
    #[serde(rename = "downtime")]
    pub downtime_ms: Option<u64>,
    /// QEMU's guess of the black-out in ms, while active.
    #[serde(rename = "expected-downtime")]
    pub expected_downtime_ms: Option<u64>,
    /// Duration so far in ms.
    #[serde(rename = "total-time")]
    pub total_time_ms: Option<u64>,
    /// Duration of the set-up in ms.
    #[serde(rename = "setup-time")]
    pub setup_time_ms: Option<u64>,
    /// How far RAM is.
    pub ram: Option<RamStatistics>,
    /// How much the vCPUs are throttled.
    pub cpu_throttle_percentage: Option<u64>,
    /// What forbids a migration of this VM.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
}

/// RAM part of [`MigrationInfo`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamStatistics {
    /// Bytes that were sent.
    #[serde(rename = "transferred")]
    pub transferred_bytes: u64,
    /// Bytes that are dirty as of the last sync; stale between syncs, 0 when completed.
    #[serde(rename = "remaining")]
    pub remaining_bytes: u64,
    /// Bytes of all blocks.
    #[serde(rename = "total")]
    pub total_bytes: u64,
    /// Zero pages that were sent.
    #[serde(rename = "duplicate", default)]
    pub zero_pages: u64,
    /// Other pages that were sent.
    #[serde(rename = "normal", default)]
    pub normal_pages: u64,
    /// Pages per second; updated at a sync that is more than 1 s after the one before.
    #[serde(rename = "dirty-pages-rate", default)]
    pub dirty_pages_per_s: u64,
    /// Dirty bitmap syncs so far; 1 after set-up.
    #[serde(default)]
    pub dirty_sync_count: u64,
    /// Bytes of a guest page.
    #[serde(rename = "page-size", default)]
    pub page_size_bytes: u64,
}

/// Migration parameters; as an argument `None` leaves a parameter as it is, in a reply it means
/// that this QEMU does not have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Black-out in ms that QEMU aims at, 0 to 2 000 000; default 300.
    #[serde(rename = "downtime-limit", skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// Rate limit in bytes/s, 0 for none; 1 to 9 mean none too. Default 128 MiB/s.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none")]
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Rate in bytes/s that the switch-over is reckoned with, 0 for the measured one (8.2 and
    /// later).
    #[serde(
        rename = "avail-switchover-bandwidth",
        skip_serializing_if = "Option::is_none"
    )]
    pub avail_switchover_bandwidth_bytes_per_s: Option<u64>,
    /// First throttle of auto-converge in percent, 1 to 99.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_initial: Option<u8>,
    /// Step of auto-converge in percent, 1 to 99.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_increment: Option<u8>,
    /// Highest throttle of auto-converge in percent, 1 to 99.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_cpu_throttle: Option<u8>,
    /// Share of the bytes sent that must have been dirtied, in percent, before auto-converge
    /// throttles; 1 to 100, default 50.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle_trigger_threshold: Option<u8>,
    /// Connections of multifd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd_channels: Option<u8>,
}

/// One line of `query-migrate-capabilities`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CapabilityState {
    /// Which.
    pub capability: Capability,
    /// Is it on?
    pub state: bool,
}

fn no_migration() -> MigrationStatus {
    MigrationStatus::None
}

/// Errors of every command are those of [`Client::execute`] and [`QmpError::BadReply`].
impl Client {
    /// Run state of the guest.
    pub async fn query_status(&self) -> Result<VmStatus, QmpError> {
        self.execute_as("query-status", json!({})).await
    }

    /// The VM's UUID; all zeros when it was given none.
    pub async fn query_uuid(&self) -> Result<String, QmpError> {
        #[derive(Deserialize)]
        struct Uuid {
            #[serde(rename = "UUID")]
            uuid: String,
        }
        Ok(self.execute_as::<Uuid>("query-uuid", json!({})).await?.uuid)
    }

    /// The VM's name, if it was given one.
    pub async fn query_name(&self) -> Result<Option<String>, QmpError> {
        #[derive(Deserialize)]
        struct Name {
            name: Option<String>,
        }
        Ok(self.execute_as::<Name>("query-name", json!({})).await?.name)
    }

    /// The versioned machine type, as `-machine` takes it: `pc-q35-10.0`.
    pub async fn machine_type(&self) -> Result<String, QmpError> {
        let arguments = json!({ "path": "/machine", "property": "type" });
        let class: String = self.execute_as("qom-get", arguments).await?;
        Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
    }

    /// RAM blocks by name, size and place in QEMU's memory (`info ramblock`). Up to 7.2 only the
    /// places of blocks that the guest's address space shows are known, such as `pc.ram`.
    pub async fn ram_blocks(&self) -> Result<Vec<RamBlock>, QmpError> {
        let text = self.human_monitor_command("info ramblock").await?;
        let mut blocks = ramblock::parse(&text).map_err(|error| QmpError::BadReply {
            command: "info ramblock".to_owned(),
            detail: error.to_string(),
        })?;
        if blocks.iter().any(|block| block.host_address.is_none()) {
            let ranges = flat_view::parse(&self.human_monitor_command("info mtree -f").await?);
            let mut answers = Vec::with_capacity(ranges.len());
            for range in ranges {
                let line = format!("gpa2hva {:#x}", range.guest_address);
                answers.push((range, self.human_monitor_command(&line).await?));
            }
            flat_view::place(&mut blocks, &answers);
        }
        Ok(blocks)
    }

    /// A command of the human monitor; its output, errors included, is text.
    pub async fn human_monitor_command(&self, line: &str) -> Result<String, QmpError> {
        self.execute_as("human-monitor-command", json!({ "command-line": line }))
            .await
    }

    /// State of the current or last migration, on either side.
    pub async fn query_migrate(&self) -> Result<MigrationInfo, QmpError> {
        self.execute_as("query-migrate", json!({})).await
    }

    /// All capabilities that this QEMU knows.
    pub async fn query_migrate_capabilities(&self) -> Result<Vec<CapabilityState>, QmpError> {
        self.execute_as("query-migrate-capabilities", json!({}))
            .await
    }

    /// Sets capabilities; refused while a migration runs.
    pub async fn migrate_set_capabilities(
        &self,
        capabilities: &[(Capability, bool)],
    ) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(capability, state)| json!({ "capability": capability, "state": state }))
            .collect();
        self.perform("migrate-set-capabilities", json!({ "capabilities": list }))
            .await
    }

    /// The parameters.
    pub async fn query_migrate_parameters(&self) -> Result<MigrationParameters, QmpError> {
        self.execute_as("query-migrate-parameters", json!({})).await
    }

    /// Sets those parameters that are `Some`; allowed at any time.
    pub async fn migrate_set_parameters(
        &self,
        parameters: MigrationParameters,
    ) -> Result<(), QmpError> {
        self.perform("migrate-set-parameters", json!(parameters))
            .await
    }

    /// Starts a migration to `uri`, such as `unix:/path`; returns once it is started.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.perform("migrate", json!({ "uri": uri })).await
    }

    /// Makes a QEMU that was started with `-incoming defer` listen at `uri`. A failed load leaves
    /// the process where that can be asked for (9.1 and later), so that its error can be read.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        let is_new = self
            .greeting()
            .is_some_and(|greeting| greeting.version.at_least(9, 1));
        let arguments = if is_new {
            json!({ "uri": uri, "exit-on-error": false })
        } else {
            json!({ "uri": uri })
        };
        self.perform("migrate-incoming", arguments).await
    }

    /// Makes a target whose post-copy stream broke (`postcopy-paused`) listen at `uri` for another,
    /// even while its main loop waits for a page.
    pub async fn migrate_recover(&self, uri: &str) -> Result<(), QmpError> {
        let arguments = json!({ "uri": uri });
        let recovered = self.execute_oob("migrate-recover", arguments).await;
        recovered.map(drop)
    }

    /// Cancels a migration that goes out; without one it does nothing. Returns before it is done.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.perform("migrate_cancel", json!({})).await
    }

    /// Stops the guest.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.perform("stop", json!({})).await
    }

    /// Runs the guest. An error whose [`QmpError::may_have_run`] is true counts as executed until
    /// the process is proven dead (S3).
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.perform("cont", json!({})).await
    }

    /// Ends QEMU. Its monitor may close before the reply; the process ends some time later
    /// ([`wait_dead`](super::ProcessId::wait_dead)).
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.perform("quit", json!({})).await {
            Err(QmpError::MonitorClosed { .. }) => Ok(()),
            result => result,
        }
    }

    /// Makes the NICs announce their addresses (RARP), with QEMU's own default timing.
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        let timing = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        self.perform("announce-self", timing).await
    }

    /// Begins to measure how fast the guest dirties memory, by a sample of pages, for whole seconds.
    pub async fn calc_dirty_rate(&self, seconds: u64) -> Result<(), QmpError> {
        self.perform("calc-dirty-rate", json!({ "calc-time": seconds }))
            .await
    }

    /// Bytes per second that the guest dirties, as measured last; `None` while it is not measured.
    pub async fn query_dirty_rate(&self) -> Result<Option<f64>, QmpError> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Measured {
            status: String,
            dirty_rate: Option<f64>,
        }
        let measured: Measured = self.execute_as("query-dirty-rate", json!({})).await?;
        // QEMU counts in MiB, and gives -1 while it has nothing.
        let mib = measured.dirty_rate.filter(|rate| *rate >= 0.0);
        Ok(mib
            .filter(|_| measured.status == "measured")
            .map(|mib| mib * f64::from(1 << 20)))
    }

    /// A command whose result says nothing.
    async fn perform(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute(command, arguments).await.map(drop)
    }
}
