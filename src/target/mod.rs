//! The target of a migration, the mirror of `source`: [`run`] names the phases in the same order.
//!
//! ```text
//! QUIC -lanes-> decode, check -feed-> target QEMU           pages
//! peer frames, QEMU events, feed, lanes, timers, operator -> Target (machine) -> actions
//! ```

mod act;
mod driver;
mod postcopy;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use transport::session::Outcome;
use transport::wire::{AttemptId, Role, Verify};

use crate::control::ControlSocket;
use crate::hook::{Hook, HookPhase};
use crate::journal::{self, Journal};
use crate::mapped::Mapped;
use crate::peer::{Door, Me, Way, random};
use crate::probe::{self, ProbeHost};
use crate::settling;
use crate::signals::Signals;
use crate::state_dir::StateDir;
use crate::vm::Vm;
use driver::{Driver, Start};
pub(crate) use postcopy::{Lacking, PostCopy, sinks, urgent_failed};

/// What `receive` was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) state: StateDir,
    pub(crate) qmp: PathBuf,
    pub(crate) way: Way,
    pub(crate) peer: Option<String>,
    pub(crate) vm: Option<String>,
    pub(crate) stay_paused: bool,
    pub(crate) verify: Verify,
    pub(crate) mapped: Mapped,
    pub(crate) report: Option<PathBuf>,
    pub(crate) json: bool,
    pub(crate) hook: Option<PathBuf>,
    pub(crate) hook_limit: Duration,
}

/// Takes the guest: monitor, journal, peer, then the session until its outcome.
pub(crate) async fn run(options: Options) -> anyhow::Result<Outcome> {
    let mut signals = Signals::listen()?;
    let (vm, events) = Vm::connect(&options.qmp).await?;
    vm.check_target().await?;
    let name = vm.name(options.vm.as_deref()).await?;
    let journal = Journal::open(&options.state, &name)?;
    journal::refuse_unsettled(&journal)?;
    let mut journal = settling::refuse_stale(journal, &options.state).await?;
    let (control, requests) = ControlSocket::bind(&options.state, &name)?;

    let me = Me {
        role: Role::Target,
        vm: name.clone(),
        // The source names the attempt.
        attempt: AttemptId([0; 16]),
        incarnation: u64::from_le_bytes(random()),
    };
    let door = Door::open(options.way.clone(), options.peer.as_deref(), &options.state).await?;
    if door.listens() {
        crate::progress::say(&format!("listening on {}", door.local_address()?));
    }
    let host = ProbeHost {
        state: options.state.clone(),
        verify: options.verify,
        qemu: vm.version().to_string(),
    };
    let peer = tokio::select! {
        peer = probe::meet(&door, &me, &host) => peer,
        () = signals.next() => bail!("interrupted before the peer came"),
    };
    let peer = match peer {
        Ok(peer) => peer,
        Err(error) => {
            door.close().await;
            return Err(error);
        }
    };
    let entry = journal::Entry::started(&me, &vm, &peer, false);
    journal.append(&entry)?;
    let hook = Hook {
        program: options.hook.clone(),
        limit: options.hook_limit,
        vm: name,
        peer: peer.name.clone(),
        role: "target",
    };
    let told = hook.call(HookPhase::Started);
    let start = Start {
        options,
        vm,
        events,
        journal,
        entry,
        requests,
        signals,
        me,
        door,
        peer,
        hook,
    };
    let outcome = Driver::new(start)?.run().await;
    crate::hook::finish(told).await;
    drop(control);
    outcome
}
