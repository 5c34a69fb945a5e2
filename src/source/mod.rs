//! The source of a migration: READ FIRST. [`run`] names the phases in order; [`Driver`] feeds the
//! session machine with what happens and does what it says. `target.rs` is its mirror.
//!
//! ```text
//! QEMU -capture-> dirty set and shadow -lanes-> QUIC       pages
//! peer frames, QEMU events, capture, lanes, timers, operator -> Source (machine) -> actions
//! ```

mod act;
mod budget;
mod driver;
mod left;
mod memory;
mod opening;
mod postcopy;
mod view;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use transport::block::Disable;
use transport::quic::Shaping;
use transport::session::{Outcome, Policy};
use transport::wire::{AttemptId, Purpose, Role};

use crate::control::ControlSocket;
use crate::hook::{Hook, HookPhase};
use crate::journal::{self, Journal};
use crate::mapped::Mapped;
use crate::peer::{Door, Me, Way, random};
use crate::signals::Signals;
use crate::state_dir::StateDir;
use crate::vm::Vm;
pub(crate) use budget::MemoryBudget;
use driver::{Driver, Start};
pub(crate) use postcopy::Urgents;

/// What `send` was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) state: StateDir,
    pub(crate) qmp: PathBuf,
    pub(crate) way: Way,
    pub(crate) peer: Option<String>,
    pub(crate) vm: Option<String>,
    pub(crate) policy: Policy,
    /// What the pages may take of the link.
    pub(crate) shaping: Shaping,
    pub(crate) mapped: Mapped,
    pub(crate) disable: Disable,
    /// A fixed zstd level; `None`: it follows link and processor.
    pub(crate) level: Option<i32>,
    pub(crate) budget: MemoryBudget,
    pub(crate) keep_source: bool,
    pub(crate) report: Option<PathBuf>,
    pub(crate) trace: Option<PathBuf>,
    pub(crate) json: bool,
    pub(crate) hook: Option<PathBuf>,
    pub(crate) hook_limit: Duration,
}

/// Moves the guest: monitor, journal, peer, then the session until its outcome.
pub(crate) async fn run(options: Options) -> anyhow::Result<Outcome> {
    let mut signals = Signals::listen()?;
    let (vm, events) = Vm::connect(&options.qmp).await?;
    let name = vm.name(options.vm.as_deref()).await?;
    let mut journal = Journal::open(&options.state, &name)?;
    journal::refuse_unsettled(&journal)?;
    vm.check_source().await?;
    let (control, requests) = ControlSocket::bind(&options.state, &name)?;

    let me = Me {
        role: Role::Source,
        vm: name.clone(),
        attempt: AttemptId(random()),
        incarnation: u64::from_le_bytes(random()),
    };
    let door = Door::open_shaped(
        options.way.clone(),
        options.peer.as_deref(),
        &options.state,
        &options.shaping,
    )
    .await?;
    if door.listens() {
        crate::progress::say(&format!("listening on {}", door.local_address()?));
    }
    let peer = tokio::select! {
        peer = door.meet(&me, Purpose::Migrate) => peer,
        () = signals.next() => bail!("interrupted before the peer came"),
    };
    let peer = match peer {
        Ok(peer) => peer,
        Err(error) => {
            door.close().await;
            return Err(error);
        }
    };
    // Journalled only once the guest is known to be here and able to leave: an entry says so.
    let prepared = vm.prepare_source().await?;
    let entry = journal::Entry::started(&me, &vm, &peer, !prepared.was_running);
    journal.append(&entry)?;
    let hook = Hook {
        program: options.hook.clone(),
        limit: options.hook_limit,
        vm: name,
        peer: peer.name.clone(),
        role: "source",
    };
    let told = hook.call(HookPhase::Started);
    let start = Start {
        options,
        vm,
        prepared,
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
