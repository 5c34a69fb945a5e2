//! `scaleaway resolve`: settles a doubt that a dead agent or a dead link left behind.

use std::net::SocketAddr;
use std::process::ExitCode;

use transport::wire::{AttemptId, Purpose, Role as WireRole};

use crate::cli::listen_address;
use crate::journal::{self, Entry, Journal, Role};
use crate::peer::{Door, Me, Way, random};
use crate::progress::say;
use crate::settling::{Settling, Word};
use crate::signals::Signals;
use crate::state_dir::{StateDir, StateDirArgs};

/// Settle where a VM is after a move was cut short; refuses what the journal proves wrong.
#[derive(Debug, clap::Args)]
pub(crate) struct ResolveArgs {
    /// UUID or name of the VM, as `scaleaway status` shows it.
    vm: String,
    /// The guest is (or shall run) here.
    #[arg(long, conflicts_with = "there")]
    here: bool,
    /// The guest is at the peer.
    #[arg(long)]
    there: bool,
    /// Decide without the other host: only when its copy can never run again.
    #[arg(long)]
    i_know_the_other_is_dead: bool,
    /// Wait for the other host's `resolve`, `send` or `receive` to dial.
    #[arg(long, value_name = "ADDR:PORT", value_parser = listen_address, conflicts_with = "to")]
    listen: Option<SocketAddr>,
    /// Dial the other host's `resolve`, `send` or `receive`.
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<String>,
    /// Only this trusted peer.
    #[arg(long, value_name = "NAME|FINGERPRINT")]
    peer: Option<String>,
    #[command(flatten)]
    state: StateDirArgs,
}

/// Exit code: 0 settled, 1 refused, 3 still in doubt.
pub(crate) async fn run(args: ResolveArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::open(&args.state)?;
    let unknown = || {
        anyhow::anyhow!(
            "this state dir knows no VM {:?}: see `scaleaway status`",
            args.vm
        )
    };
    if !journal::knows(&state, &args.vm)? {
        return Err(unknown());
    }
    let journal = Journal::open(&state, &args.vm)?;
    let Some(entry) = journal.latest().cloned() else {
        return Err(unknown());
    };
    let mut settling = Settling::new(journal, entry.clone(), state.clone());
    let done = match settle(&mut settling, &args, &entry, &state).await {
        Ok(done) => done,
        Err(error) => {
            tracing::error!("{}: not settled: {error:#}", entry.vm);
            return Ok(ExitCode::from(1));
        }
    };
    Ok(match done {
        Some(place) => {
            say(&format!("{}: settled, the guest is {place}", entry.vm));
            ExitCode::SUCCESS
        }
        None => {
            say(&format!(
                "{}: still in doubt; see `scaleaway status`",
                entry.vm
            ));
            ExitCode::from(3)
        }
    })
}

async fn settle(
    settling: &mut Settling,
    args: &ResolveArgs,
    entry: &Entry,
    state: &StateDir,
) -> anyhow::Result<Option<&'static str>> {
    let word = match (args.here, args.there) {
        (true, _) => Some(Word::Here),
        (_, true) => Some(Word::There),
        (false, false) => None,
    };
    let way = match (&args.to, args.listen) {
        (Some(host), _) => Some(Way::Dial(host.clone())),
        (None, Some(address)) => Some(Way::Listen(address)),
        (None, None) => None,
    };
    match (way, word) {
        (Some(way), _) => {
            let me = Me {
                role: match entry.role {
                    Role::Source => WireRole::Source,
                    Role::Target => WireRole::Target,
                },
                vm: entry.vm.clone(),
                attempt: attempt_id(&entry.attempt)?,
                incarnation: u64::from_le_bytes(random()),
            };
            let mut signals = Signals::listen()?;
            let door = Door::open(way, args.peer.as_deref().or(Some(&entry.peer)), state).await?;
            if door.listens() {
                say(&format!("listening on {}", door.local_address()?));
            }
            let done = tokio::select! {
                done = settling.with_peer(&door, &me, Purpose::Settle) => done,
                () = signals.next() => Ok(None),
            };
            // The other side must hear that this caller is gone, or it would go on with it.
            door.close().await;
            done
        }
        (None, word) => settling.alone(word, args.i_know_the_other_is_dead).await,
    }
}

fn attempt_id(hex: &str) -> anyhow::Result<AttemptId> {
    let mut id = [0; 16];
    anyhow::ensure!(
        hex.len() == 32 && hex.is_ascii(),
        "the journal's attempt is malformed"
    );
    for (place, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * place..2 * place + 2], 16)?;
    }
    Ok(AttemptId(id))
}
