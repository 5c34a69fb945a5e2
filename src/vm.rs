//! What we ask of a QEMU, at either end, through its monitor. Which command when and why:
//! docs/handover.md and docs/architecture.md; here only how.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use qemu_glue::qmp::{
    Capability, Client, EventReceiver, MigrationParameters, MigrationStatus, QmpError, RunState,
    Version,
};
use transport::block::{BlockSpec, PAGE_SIZE};
use transport::session::Hold;

/// Rate at which a held QEMU idles: empty sections only. Below 10 would mean unlimited.
const HOLD_BYTES_PER_S: u64 = 50_000;
/// First pace of a starved QEMU, before the link's rate is known.
const FIRST_PACE_BYTES_PER_S: u64 = 20_000_000;

/// A QEMU and its monitor.
#[derive(Debug, Clone)]
pub(crate) struct Vm {
    pub(crate) qmp: Client,
    pub(crate) path: PathBuf,
    version: Version,
}

/// What source QEMU is and was before we touched it.
#[derive(Debug)]
pub(crate) struct SourceState {
    pub(crate) hold: Hold,
    pub(crate) was_running: bool,
    capabilities: Vec<(Capability, bool)>,
    parameters: MigrationParameters,
}

impl Vm {
    pub(crate) async fn connect(path: &Path) -> anyhow::Result<(Vm, EventReceiver)> {
        let (qmp, events) = Client::connect(path).await?;
        let greeting = qmp.greeting().context("QEMU's monitor has not greeted")?;
        let vm = Vm {
            version: greeting.version,
            path: path.to_owned(),
            qmp,
        };
        Ok((vm, events))
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The VM's UUID, or the operator's name for a VM that has none.
    pub(crate) async fn name(&self, given: Option<&str>) -> anyhow::Result<String> {
        let uuid = self.qmp.query_uuid().await?;
        let has_uuid = uuid.chars().any(|digit| digit != '0' && digit != '-');
        match (given, has_uuid) {
            (Some(name), true) if name != uuid => {
                bail!("this VM has the UUID {uuid}: leave --vm {name} out on both hosts")
            }
            (_, true) => Ok(uuid),
            (Some(name), false) => Ok(name.to_owned()),
            (None, false) => {
                bail!("this VM has no UUID: give --vm NAME on both hosts, or start QEMU with -uuid")
            }
        }
    }

    /// Checks that the guest can leave, and sets what a migration into our socket needs.
    pub(crate) async fn prepare_source(&self) -> anyhow::Result<SourceState> {
        let was_running = self.check_source().await?;
        let had = self.qmp.query_migrate_capabilities().await?;
        let is_on =
            |wanted: &Capability| had.iter().any(|had| had.capability == *wanted && had.state);
        let has = |wanted: &Capability| had.iter().any(|had| had.capability == *wanted);
        ensure!(
            !is_on(&Capability::IgnoreShared),
            "capability x-ignore-shared is on: QEMU would leave pages out; switch it off"
        );
        ensure!(
            has(&Capability::ReturnPath),
            "this QEMU has no return-path: it is too old"
        );
        let hold = if has(&Capability::SwitchoverAck) {
            Hold::SwitchoverAck
        } else {
            Hold::Starvation
        };
        let wanted: Vec<(Capability, bool)> = [
            (Capability::ReturnPath, true),
            (Capability::SwitchoverAck, true),
            (Capability::Events, true),
            (Capability::Xbzrle, false),
            (Capability::Multifd, false),
            (Capability::PostcopyRam, false),
            // Its knobs throttle the guest; left as set below they do nothing.
            (Capability::AutoConverge, true),
            (Capability::PauseBeforeSwitchover, false),
            (Capability::MappedRam, false),
        ]
        .into_iter()
        .filter(|(capability, _)| has(capability))
        .collect();
        let capabilities = wanted
            .iter()
            .map(|(capability, _)| (capability.clone(), is_on(capability)))
            .collect();
        let all = self.qmp.query_migrate_parameters().await?;
        let parameters = MigrationParameters {
            downtime_limit_ms: all.downtime_limit_ms,
            max_bandwidth_bytes_per_s: all.max_bandwidth_bytes_per_s,
            avail_switchover_bandwidth_bytes_per_s: all.avail_switchover_bandwidth_bytes_per_s,
            cpu_throttle_initial: all.cpu_throttle_initial,
            cpu_throttle_increment: all.cpu_throttle_increment,
            max_cpu_throttle: all.max_cpu_throttle,
            throttle_trigger_threshold: all.throttle_trigger_threshold,
            ..MigrationParameters::default()
        };
        self.qmp.migrate_set_capabilities(&wanted).await?;
        let least = MigrationParameters {
            cpu_throttle_initial: Some(1),
            cpu_throttle_increment: Some(1),
            max_cpu_throttle: Some(1),
            throttle_trigger_threshold: Some(100),
            ..MigrationParameters::default()
        };
        self.qmp.migrate_set_parameters(least).await?;
        Ok(SourceState {
            hold,
            was_running,
            capabilities,
            parameters,
        })
    }

    /// A clear word before anything is changed. Returns whether the guest runs.
    pub(crate) async fn check_source(&self) -> anyhow::Result<bool> {
        let info = self.qmp.query_migrate().await?;
        if let Some(reason) = info.blocked_reasons.first() {
            bail!("QEMU says that this VM cannot migrate: {reason}");
        }
        let idle = info.status.has_ended() || info.status == MigrationStatus::None;
        ensure!(
            idle,
            "a migration of this VM is under way ({}): cancel it first",
            info.status
        );
        let status = self.qmp.query_status().await?;
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "all other states can migrate"
        )]
        match status.status {
            RunState::InMigrate => bail!("this VM waits for a migration itself: use `receive`"),
            RunState::PostMigrate => bail!(
                "this VM has left (postmigrate): `scaleaway status` says where it is; never run this copy while another runs"
            ),
            _ => {}
        }
        Ok(status.running)
    }

    /// Puts back what [`prepare_source`](Self::prepare_source) changed.
    pub(crate) async fn restore_source(&self, state: &SourceState) -> Result<(), QmpError> {
        self.qmp.migrate_set_parameters(state.parameters).await?;
        // Refused while the failed migration is still being wound up.
        for _ in 0..50 {
            if self.qmp.query_migrate().await?.status.has_ended() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.qmp.migrate_set_capabilities(&state.capabilities).await
    }

    /// Starts the migration into our socket, held from the first pass on.
    pub(crate) async fn start_capture(
        &self,
        socket: &Path,
        hold: Hold,
        downtime: Duration,
    ) -> Result<(), QmpError> {
        match hold {
            Hold::SwitchoverAck => self.open_pass().await?,
            Hold::Starvation => {
                self.set(Some(downtime), Some(FIRST_PACE_BYTES_PER_S))
                    .await?;
            }
        }
        self.qmp
            .migrate(&format!("unix:{}", socket.display()))
            .await
    }

    /// One dirty sync starts within QEMU's next 100 ms window.
    pub(crate) async fn trigger_pass(&self) -> Result<(), QmpError> {
        self.set(Some(Duration::from_millis(1)), None).await
    }

    /// The sync has happened: its pass flows, and no second sync follows.
    pub(crate) async fn open_pass(&self) -> Result<(), QmpError> {
        self.set(Some(Duration::ZERO), Some(0)).await
    }

    /// The pass is over: QEMU idles at 2 % of a core until the next one.
    pub(crate) async fn hold_pass(&self) -> Result<(), QmpError> {
        self.set(None, Some(HOLD_BYTES_PER_S)).await
    }

    /// Starvation hold: QEMU writes at this rate.
    pub(crate) async fn pace(&self, bytes_per_s: u64) -> Result<(), QmpError> {
        // 1 to 9 would mean unlimited.
        self.set(None, Some(bytes_per_s.max(10))).await
    }

    /// QEMU stops the guest as soon as it has the acknowledgement, and syncs without a pause until
    /// then: its own threshold must not hold it back, the engine decides.
    pub(crate) async fn release(&self) -> Result<(), QmpError> {
        const ANY: Duration = Duration::from_secs(2000);
        self.set(Some(ANY), Some(0)).await
    }

    /// QEMU decides the stop by itself, from the rate at which the link takes its bytes.
    pub(crate) async fn release_to_qemu(&self, downtime: Duration) -> Result<(), QmpError> {
        self.set(Some(downtime), Some(0)).await
    }

    /// Slows the guest's processors. QEMU takes its knobs at the second sync from now that comes a
    /// second or more after the one before, and takes the throttle off when its migration ends.
    pub(crate) async fn throttle(&self, percent: u8) -> Result<(), QmpError> {
        self.qmp
            .migrate_set_parameters(MigrationParameters {
                cpu_throttle_increment: Some(99),
                max_cpu_throttle: Some(percent.clamp(1, 99)),
                throttle_trigger_threshold: Some(1),
                ..MigrationParameters::default()
            })
            .await
    }

    async fn set(&self, limit: Option<Duration>, rate: Option<u64>) -> Result<(), QmpError> {
        let downtime_limit_ms =
            limit.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(2_000_000));
        self.qmp
            .migrate_set_parameters(MigrationParameters {
                downtime_limit_ms,
                max_bandwidth_bytes_per_s: rate,
                ..MigrationParameters::default()
            })
            .await
    }

    /// Waits for `completed` and `postmigrate`, both read again (S1).
    pub(crate) async fn wait_postmigrate(&self) -> Result<(), String> {
        for _ in 0..500 {
            let info = self
                .qmp
                .query_migrate()
                .await
                .map_err(|error| error.to_string())?;
            let status = self
                .qmp
                .query_status()
                .await
                .map_err(|error| error.to_string())?;
            if info.status == MigrationStatus::Completed && status.status == RunState::PostMigrate {
                return Ok(());
            }
            if matches!(
                info.status,
                MigrationStatus::Failed | MigrationStatus::Cancelled
            ) {
                return Err(info.error_desc.unwrap_or_else(|| info.status.to_string()));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Err("QEMU does not reach postmigrate".into())
    }

    /// Checks that this QEMU waits for a migration.
    pub(crate) async fn check_target(&self) -> anyhow::Result<()> {
        let status = self.qmp.query_status().await?;
        ensure!(
            status.status == RunState::InMigrate,
            "target QEMU does not wait for a migration (it is {}): start it with `-incoming defer` \
             and the source's machine and devices",
            status.status
        );
        let info = self.qmp.query_migrate().await?;
        ensure!(
            matches!(info.status, MigrationStatus::None),
            "target QEMU's incoming side is in use already ({}): start a fresh one",
            info.status
        );
        Ok(())
    }

    /// Stops the target (acts like `-S`, S3), compares machine and memory, opens the incoming side, for
    /// post-copy where that is wished and QEMU can. Returns whether it is.
    pub(crate) async fn prepare_target(
        &self,
        head: &[u8],
        blocks: &[BlockSpec],
        socket: &Path,
        post_copy: bool,
    ) -> anyhow::Result<bool> {
        self.compare(head, blocks).await?;
        self.qmp.stop().await?;
        let post_copy = post_copy && self.allow_post_copy().await?;
        self.open_incoming(socket).await?;
        Ok(post_copy)
    }

    /// Post-copy needs the right to watch QEMU's memory, and pages of one size; QEMU says so itself.
    async fn allow_post_copy(&self) -> anyhow::Result<bool> {
        let blocks = self.qmp.ram_blocks().await?;
        if blocks
            .iter()
            .any(|block| block.page_size_bytes != PAGE_SIZE as u64)
        {
            tracing::warn!("no post-copy: guest RAM has large pages");
            return Ok(false);
        }
        let wanted = [(Capability::PostcopyRam, true)];
        let set = self.qmp.migrate_set_capabilities(&wanted).await;
        if let Err(error) = &set {
            tracing::warn!("no post-copy: {error}");
        }
        Ok(set.is_ok())
    }

    /// QEMU keeps our connection to its monitor, and who comes after us can have it (S11).
    pub(crate) async fn keep_monitor(&self) -> anyhow::Result<()> {
        ensure!(
            self.qmp.has_oob(),
            "QEMU's monitor has no out-of-band commands"
        );
        self.qmp.leave_with_qemu().await?;
        let process = self.qmp.peer_process();
        match Client::is_kept(process, &self.path) {
            Ok(true) => Ok(()),
            not => {
                self.qmp.release().await?;
                not?;
                bail!("QEMU's monitor is not where it could be found again")
            }
        }
    }

    /// Stops the target and opens its incoming side.
    pub(crate) async fn open_incoming(&self, socket: &Path) -> anyhow::Result<()> {
        self.qmp.stop().await?;
        let wanted = [
            (Capability::Events, true),
            (Capability::LateBlockActivate, true),
        ];
        let had = self.qmp.query_migrate_capabilities().await?;
        let wanted: Vec<_> = wanted
            .into_iter()
            .filter(|(wanted, _)| had.iter().any(|had| had.capability == *wanted))
            .collect();
        self.qmp.migrate_set_capabilities(&wanted).await?;
        self.qmp
            .migrate_incoming(&format!("unix:{}", socket.display()))
            .await
            .context("target QEMU cannot open its incoming side")
    }

    /// A clear word before QEMU's own load would fail in the middle.
    async fn compare(&self, head: &[u8], blocks: &[BlockSpec]) -> anyhow::Result<()> {
        let here = self.qmp.machine_type().await?;
        if let Some(there) = machine_of(head) {
            ensure!(
                here == there,
                "machine types differ: {there} at the source, {here} here; start target QEMU with -M {there}"
            );
        }
        let own = self.qmp.ram_blocks().await?;
        for block in blocks {
            let Some(mine) = own.iter().find(|mine| mine.name == block.name) else {
                bail!(
                    "target QEMU lacks the source's memory block {:?}: start it with the same devices and memory backends",
                    block.name
                );
            };
            let wanted = u64::from(block.pages) * PAGE_SIZE as u64;
            ensure!(
                mine.total_bytes >= wanted,
                "memory block {:?} has {} MiB at the source and {} MiB here: start target QEMU with the same -m",
                block.name,
                wanted >> 20,
                mine.total_bytes >> 20
            );
        }
        Ok(())
    }

    /// `paused` and `completed`, read from QEMU (S3); in post-copy pages may be lacking.
    pub(crate) async fn check_loaded(&self, post_copy: bool) -> Result<(), String> {
        let info = self
            .qmp
            .query_migrate()
            .await
            .map_err(|error| error.to_string())?;
        let status = self
            .qmp
            .query_status()
            .await
            .map_err(|error| error.to_string())?;
        let lacks_pages = post_copy && info.status == MigrationStatus::PostcopyActive;
        if info.status != MigrationStatus::Completed && !lacks_pages {
            return Err(format!("target QEMU's load is {}", info.status));
        }
        if status.running || status.status == RunState::InMigrate {
            return Err(format!("target QEMU is {} after its load", status.status));
        }
        Ok(())
    }

    /// Waits until the load is complete and the guest is paused.
    pub(crate) async fn wait_loaded(&self, post_copy: bool) -> Result<(), String> {
        let mut last = String::new();
        for _ in 0..2000 {
            match self.check_loaded(post_copy).await {
                Ok(()) => return Ok(()),
                Err(detail) => last = detail,
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Err(last)
    }

    /// Waits until QEMU says that it has every page.
    pub(crate) async fn wait_filled(&self) -> Result<(), String> {
        let mut last = String::new();
        for _ in 0..2000 {
            match self.qmp.query_migrate().await {
                Ok(info) if info.status == MigrationStatus::Completed => return Ok(()),
                Ok(info) => last = format!("target QEMU's load is {}", info.status),
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Err(last)
    }

    /// Quits QEMU and waits until the process is gone.
    pub(crate) async fn quit(&self) -> anyhow::Result<()> {
        if let Err(error) = self.qmp.quit().await {
            tracing::warn!(%error, "QEMU did not take `quit`");
        }
        let dead = self
            .qmp
            .peer_process()
            .wait_dead(Duration::from_secs(10))
            .await?;
        ensure!(
            dead,
            "QEMU (pid {}) does not end: stop it by hand",
            self.qmp.peer_process().pid
        );
        Ok(())
    }
}

/// Machine type in a stream's head: magic, version, configuration byte, length, name.
fn machine_of(head: &[u8]) -> Option<&str> {
    let length = u32::from_be_bytes(head.get(9..13)?.try_into().ok()?);
    let end = 13_usize.checked_add(usize::try_from(length).ok()?)?;
    std::str::from_utf8(head.get(13..end)?).ok()
}

#[cfg(test)]
mod tests {
    use super::machine_of;

    /// The name is read from a real head, and cut ones give nothing.
    #[test]
    fn machine_type_of_a_head() {
        let head = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0";
        assert_eq!(machine_of(head), Some("pc-q35-10.0"));
        assert_eq!(machine_of(&head[..20]), None);
        assert_eq!(machine_of(b""), None);
    }
}
