//! A real QEMU that boots nothing (`-S`): what the scripted monitor only claims.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use qemu_glue::memory::{ExpectedBlock, GuestMemory, MemoryError};
use qemu_glue::qmp::commands::CapabilityState;
use qemu_glue::qmp::{
    Capability, Client, CloseReason, EventKind, EventReceiver, MigrationParameters,
    MigrationStatus, Options, ProcessId, QmpError, RunState, Version,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::scratch::Scratch;

const LIMIT: Duration = Duration::from_secs(30);

/// What QEMU says of itself, and which process it is.
#[tokio::test]
async fn identity() {
    let Some(qemu) = Qemu::start(&["-uuid", UUID, "-name", "fridolin"]) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let version = version_of(&client);
    assert!(version.at_least(7, 2), "{version}");
    assert_eq!(client.query_uuid().await.unwrap(), UUID);
    assert_eq!(
        client.query_name().await.unwrap().as_deref(),
        Some("fridolin")
    );
    let expected = format!("pc-q35-{}.{}", version.major, version.minor);
    assert_eq!(client.machine_type().await.unwrap(), expected);
    let status = client.query_status().await.unwrap();
    assert_eq!(
        (status.status, status.running),
        (RunState::PreLaunch, false)
    );
    assert_eq!(client.peer_process(), &qemu.process);
    assert!(client.peer_process().is_alive().unwrap());
    client.announce_self().await.unwrap();
    client.quit().await.unwrap();
    assert!(client.peer_process().wait_dead(LIMIT).await.unwrap());
}

/// A connection that was left with QEMU outlives its client, keeps others out, and goes on where the
/// next client takes it back; released, it ends with that client.
#[tokio::test]
async fn a_connection_outlives_its_client() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let (client, _events) = qemu.connect().await;
    assert!(client.has_oob());
    assert!(!Client::is_kept(&qemu.process, &qemu.monitor).unwrap());
    client.leave_with_qemu().await.unwrap();
    assert_eq!(
        client.query_status().await.unwrap().status,
        RunState::PreLaunch
    );
    drop(client);
    let options = Options {
        greeting_timeout: Duration::from_millis(300),
        ..Options::default()
    };
    let busy = Client::connect_with(&qemu.monitor, options).await;
    assert!(
        matches!(busy, Err(QmpError::MonitorBusy { .. })),
        "{busy:?}"
    );
    for _ in 0..2 {
        let kept = Client::take_back(&qemu.process, &qemu.monitor).unwrap();
        let (client, _events) = kept.expect("QEMU keeps it");
        assert_eq!(
            client.query_status().await.unwrap().status,
            RunState::PreLaunch
        );
        let recovered = client.migrate_recover("unix:/nowhere").await;
        assert!(
            matches!(recovered, Err(QmpError::Refused { .. })),
            "{recovered:?}"
        );
    }
    let kept = Client::take_back(&qemu.process, &qemu.monitor).unwrap();
    let (client, _events) = kept.expect("QEMU keeps it");
    client.release().await.unwrap();
    assert!(!Client::is_kept(&qemu.process, &qemu.monitor).unwrap());
    drop(client);
    let (client, _events) = qemu.connect().await;
    client.quit().await.unwrap();
}

const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

/// Capabilities and parameters that are set are then read; QEMU refuses those that it lacks.
#[tokio::test]
async fn capabilities_and_parameters() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let (client, _events) = qemu.connect().await;
    let set = [(Capability::ReturnPath, true), (Capability::Events, true)];
    client.migrate_set_capabilities(&set).await.unwrap();
    let all = client.query_migrate_capabilities().await.unwrap();
    for (capability, state) in set {
        assert!(all.contains(&CapabilityState { capability, state }));
    }
    assert!(all.contains(&CapabilityState {
        capability: Capability::Xbzrle,
        state: false
    }));
    let unknown = [(Capability::Unknown("warp-drive".to_owned()), true)];
    let error = client.migrate_set_capabilities(&unknown).await.unwrap_err();
    assert!(matches!(error, QmpError::Refused { .. }), "{error:?}");
    let parameters = MigrationParameters {
        downtime_limit_ms: Some(1),
        max_bandwidth_bytes_per_s: Some(50_000),
        cpu_throttle_initial: Some(1),
        ..MigrationParameters::default()
    };
    client.migrate_set_parameters(parameters).await.unwrap();
    let read = client.query_migrate_parameters().await.unwrap();
    assert_eq!(read.downtime_limit_ms, parameters.downtime_limit_ms);
    assert_eq!(
        read.max_bandwidth_bytes_per_s,
        parameters.max_bandwidth_bytes_per_s
    );
    assert_eq!(read.cpu_throttle_initial, parameters.cpu_throttle_initial);
    let has_switchover_bandwidth = version_of(&client).at_least(8, 2);
    assert_eq!(
        read.avail_switchover_bandwidth_bytes_per_s.is_some(),
        has_switchover_bandwidth
    );
}

/// Events of `cont` and `stop` are in the queue when their replies are.
#[tokio::test]
async fn events_come_before_the_reply() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let (client, mut events) = qemu.connect().await;
    client.cont().await.unwrap();
    assert_eq!(next_kinds(&mut events), [EventKind::Resume]);
    assert!(client.query_status().await.unwrap().running);
    client.stop().await.unwrap();
    assert_eq!(next_kinds(&mut events), [EventKind::Stop]);
    assert_eq!(
        client.query_status().await.unwrap().status,
        RunState::Paused
    );
}

/// A whole migration into nothing: its events, its numbers.
#[tokio::test]
async fn migration_out() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let (client, mut events) = qemu.connect().await;
    assert_eq!(
        client.query_migrate().await.unwrap().status,
        MigrationStatus::None
    );
    client
        .migrate_set_capabilities(&[(Capability::Events, true)])
        .await
        .unwrap();
    client.migrate("exec:cat >/dev/null").await.unwrap();
    let mut kinds = Vec::new();
    let last = EventKind::Migration {
        status: MigrationStatus::Completed,
    };
    while kinds.last() != Some(&last) {
        kinds.push(events.next().await.unwrap().kind);
    }
    assert_eq!(
        kinds[0],
        EventKind::Migration {
            status: MigrationStatus::Setup
        }
    );
    assert!(
        kinds.contains(&EventKind::MigrationPass { pass: 1 }),
        "{kinds:?}"
    );
    let info = client.query_migrate().await.unwrap();
    assert_eq!(info.status, MigrationStatus::Completed);
    let ram = info.ram.unwrap();
    assert_eq!((ram.remaining_bytes, ram.page_size_bytes), (0, 4096));
    assert!(ram.total_bytes >= 64 << 20 && ram.zero_pages > 0 && ram.dirty_sync_count > 1);
    // The run state follows the migration's status; that is why S1 reads both.
    let mut status = client.query_status().await.unwrap().status;
    while status == RunState::FinishMigrate {
        status = client.query_status().await.unwrap().status;
    }
    assert_eq!(status, RunState::PostMigrate);
}

/// A target whose load fails tells why and lives on, where QEMU can be asked to (9.1 and later).
#[tokio::test]
async fn migration_in_that_fails() {
    let Some(qemu) = Qemu::start(&["-incoming", "defer"]) else {
        return;
    };
    let (client, mut events) = qemu.connect().await;
    assert_eq!(
        client.query_status().await.unwrap().status,
        RunState::InMigrate
    );
    client
        .migrate_set_capabilities(&[(Capability::Events, true)])
        .await
        .unwrap();
    client.stop().await.unwrap();
    let path = qemu.scratch.path().join("in");
    client
        .migrate_incoming(&format!("unix:{}", path.display()))
        .await
        .unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"no stream at all").unwrap();
    let failed = EventKind::Migration {
        status: MigrationStatus::Failed,
    };
    loop {
        let kind = events.next().await.unwrap().kind;
        if kind == failed || matches!(kind, EventKind::MonitorClosed { .. }) {
            break;
        }
    }
    if version_of(&client).at_least(9, 1) {
        let info = client.query_migrate().await.unwrap();
        assert_eq!(info.status, MigrationStatus::Failed);
        assert!(info.error_desc.is_some());
    } else {
        assert!(client.peer_process().wait_dead(LIMIT).await.unwrap());
    }
}

/// A monitor serves one client at a time, and the next one when that has gone.
#[tokio::test]
async fn busy_monitor() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let first = qemu.connect().await;
    let greeting_timeout = Duration::from_millis(300);
    let options = Options {
        greeting_timeout,
        ..Options::default()
    };
    for _ in 0..3 {
        let error = Client::connect_with(&qemu.monitor, options)
            .await
            .unwrap_err();
        assert!(matches!(error, QmpError::MonitorBusy { .. }), "{error:?}");
    }
    drop(first);
    let (client, _events) = qemu.connect().await;
    client.query_status().await.unwrap();
}

/// S3: a `cont` that QEMU did not answer runs later all the same.
#[tokio::test]
async fn s3_a_timed_out_cont_runs_later() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let (client, mut events) = qemu.connect().await;
    qemu.signal(Signal::STOP);
    let error = client
        .with_timeout(Duration::from_millis(300))
        .cont()
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            QmpError::Timeout {
                may_still_run: true,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.may_have_run());
    qemu.signal(Signal::CONT);
    assert_eq!(events.next().await.unwrap().kind, EventKind::Resume);
    assert!(client.query_status().await.unwrap().running);
}

/// `kill -9` of a QEMU that hangs, with a call pending: an error, a last event, a dead process.
#[tokio::test]
async fn killed_with_a_call_pending() {
    let Some(qemu) = Qemu::start(&[]) else { return };
    let (client, mut events) = qemu.connect().await;
    qemu.signal(Signal::STOP);
    let pending = client.clone();
    let call = tokio::spawn(async move { pending.cont().await });
    let error = client
        .with_timeout(Duration::from_millis(200))
        .stop()
        .await
        .unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    qemu.signal(Signal::KILL);
    for result in [call.await.unwrap(), client.stop().await] {
        assert!(matches!(
            result,
            Err(QmpError::MonitorClosed {
                reason: CloseReason::EndOfFile
            })
        ));
    }
    let reason = CloseReason::EndOfFile;
    assert_eq!(
        events.next().await.unwrap().kind,
        EventKind::MonitorClosed { reason }
    );
    assert_eq!(events.next().await, None);
    assert!(client.peer_process().wait_dead(LIMIT).await.unwrap());
}

/// S9, S10: the BIOS read from the process's memory is the BIOS that the guest sees, byte by byte;
/// after the process's death there is nothing to read.
#[tokio::test]
async fn s10_memory_read_from_outside_is_the_guests() {
    let Some(qemu) = Qemu::start(&["-device", "VGA"]) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let blocks = client.ram_blocks().await.unwrap();
    let expected: Vec<_> = blocks
        .iter()
        .map(|block| ExpectedBlock {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
        })
        .collect();
    let process = client.peer_process();
    let memory = GuestMemory::open_known(process, &blocks, &expected).unwrap();
    let result = GuestMemory::open(process, &blocks, &expected);
    if version_of(&client).at_least(8, 0) {
        assert!((0..blocks.len()).all(|block| memory.is_open(block)));
        result.unwrap();
    } else {
        assert!(
            matches!(result, Err(MemoryError::NoHostAddress { .. })),
            "{result:?}"
        );
    }
    let ram = blocks
        .iter()
        .position(|block| block.name == "pc.ram")
        .unwrap();
    assert!(memory.is_open(ram));
    let bios = blocks
        .iter()
        .position(|block| block.name == "pc.bios")
        .unwrap();
    let bytes = usize::try_from(blocks[bios].used_bytes).unwrap();
    let path = qemu.scratch.path().join("bios");
    let below_4_gib = (1_u64 << 32) - blocks[bios].used_bytes;
    let arguments = json!({ "val": below_4_gib, "size": bytes, "filename": path });
    client.execute("pmemsave", arguments).await.unwrap();
    let seen = fs::read(path).unwrap();
    assert!(seen.iter().any(|&byte| byte != 0));
    let mut read = vec![0; bytes];
    memory.read_pages(bios, 0, &mut read).unwrap();
    assert_eq!(read, seen);
    let mut page = [0; 4096];
    memory.read_page(bios, 63, &mut page).unwrap();
    assert_eq!(page, seen[63 * 4096..64 * 4096]);

    qemu.signal(Signal::KILL);
    assert!(process.wait_dead(LIMIT).await.unwrap());
    let result = memory.read_page(bios, 63, &mut page);
    assert!(matches!(result, Err(MemoryError::ProcessGone { pid }) if pid == qemu.pid));
    let result = GuestMemory::open(process, &blocks, &expected);
    assert!(
        matches!(result, Err(MemoryError::ProcessGone { .. })),
        "{result:?}"
    );
}

fn next_kinds(events: &mut EventReceiver) -> Vec<EventKind> {
    std::iter::from_fn(|| events.try_next())
        .map(|event| event.kind)
        .collect()
}

/// A QEMU that is killed at the end of its test.
struct Qemu {
    pid: u32,
    process: ProcessId,
    monitor: PathBuf,
    scratch: Scratch,
}

impl Qemu {
    /// Returns when the monitor listens. `None`, with the reason printed, when there is no QEMU on
    /// this machine; that is a failure where all tests are required to run.
    fn start(more: &[&str]) -> Option<Self> {
        let program = std::env::var_os("QEMU").unwrap_or(OsString::from("qemu-system-x86_64"));
        let scratch = Scratch::new();
        let monitor = scratch.path().join("q");
        let pid_file = scratch.path().join("pid");
        let result = Command::new(&program)
            .args([
                "-M",
                "q35",
                "-m",
                "64",
                "-nodefaults",
                "-display",
                "none",
                "-accel",
                "tcg",
            ])
            .args(["-S", "-daemonize", "-pidfile"])
            .arg(&pid_file)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .args(more)
            .status();
        let status = match result {
            Ok(status) => status,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                assert!(
                    std::env::var_os("REQUIRE_ALL").is_none(),
                    "no {}",
                    program.display()
                );
                eprintln!("Skipped: no {} on this machine", program.display());
                return None;
            }
            Err(error) => panic!("{}: {error}", program.display()),
        };
        assert!(status.success(), "QEMU ended with {status}");
        let pid = fs::read_to_string(pid_file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let process = ProcessId::of(pid).unwrap();
        Some(Self {
            pid,
            process,
            monitor,
            scratch,
        })
    }

    async fn connect(&self) -> (Client, EventReceiver) {
        // Many QEMUs start at once on a small machine.
        let options = Options {
            greeting_timeout: LIMIT,
            ..Options::default()
        };
        Client::connect_with(&self.monitor, options).await.unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.process.is_alive().unwrap() {
            self.signal(Signal::KILL);
        }
    }
}

fn version_of(client: &Client) -> Version {
    client.greeting().expect("a new connection").version
}
