//! The phases of `plan`, in order: monitor, peer, then the probe and the looks at memory side by side,
//! costs, prediction.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::sync::mpsc;
use transport::block::Disable;
use transport::quic::{Fingerprint, Shaping};
use transport::session::Policy;
use transport::store::Checkpoints;
use transport::wire::{AttemptId, Purpose, Role};

use super::cost::{self, Costs, Encoding, KeptSample};
use super::dirtying::{self, Dirtying};
use super::history::{self, Learned};
use super::link::{LinkProbe, LinkSeen, TargetSaid, Wanted};
use super::model::{Inputs, predict};
use super::noted;
use super::page::{Document, Facts};
use super::sample::{GROUP_PAGES, Sample};
use crate::estimate::to_f64;
use crate::journal::now_s;
use crate::mapped::Mapped;
use crate::peer::{Door, Me, Way, random};
use crate::shaping::lane_bytes_per_s;
use crate::signals::Signals;
use crate::state_dir::StateDir;
use crate::vm::Vm;
use crate::waiting::now;

/// When the sample is read again.
const LOOKS: [Duration; 3] = [
    Duration::from_millis(400),
    Duration::from_millis(1_000),
    Duration::from_millis(2_000),
];
/// How long QEMU measures by itself.
const QEMU_MEASURES_S: u64 = 1;

/// What `plan` was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) state: StateDir,
    pub(crate) qmp: PathBuf,
    pub(crate) way: Way,
    pub(crate) peer: Option<String>,
    pub(crate) vm: Option<String>,
    pub(crate) policy: Policy,
    pub(crate) shaping: Shaping,
    pub(crate) disable: Disable,
    /// A fixed zstd level.
    pub(crate) level: Option<i32>,
    pub(crate) mapped: Mapped,
}

/// Finds out what a move would be like, and notes it for the `send` that follows.
pub(crate) async fn run(options: Options) -> anyhow::Result<Document> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        planned = plan(options) => planned,
        () = signals.next() => bail!("interrupted"),
    }
}

async fn plan(options: Options) -> anyhow::Result<Document> {
    let (vm, _events) = Vm::connect(&options.qmp).await?;
    let name = vm.name(options.vm.as_deref()).await?;
    let was_running = vm.check_source().await?;
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
        tracing::info!("listening on {}", door.local_address()?);
    }
    let peer = door.meet(&me, Purpose::Probe).await?;
    let (peer_name, fingerprint, key) = (peer.name.clone(), peer.connection.peer(), peer.secret);
    // It measures beside everything else; one that cannot is done without.
    let measures = vm.qmp.calc_dirty_rate(QEMU_MEASURES_S).await;
    let cap = options.shaping.rate_max().map(lane_bytes_per_s);
    let probe = LinkProbe::begin(peer, cap).await?;
    let (wanted, asked) = mpsc::channel(1);
    let whose = Whose {
        state: options.state.clone(),
        name: name.clone(),
        fingerprint,
        key,
        nonce: probe.nonce,
    };
    let looking = look(&vm, options.mapped, &whose, wanted);
    let probing = async {
        let probed = probe.run(asked).await;
        // Nobody shall find this door open who dials for the move.
        door.close().await;
        probed
    };
    let (probed, looked) = tokio::join!(probing, looking);
    let (link, said) = probed?;
    let rate_bytes_per_s = cap.map_or(link.rate.mean, |cap| link.rate.mean.min(to_f64(cap)));
    let qemu_bytes_per_s = match measures {
        Ok(()) => vm.qmp.query_dirty_rate().await.ok().flatten(),
        Err(_) => None,
    };
    let (facts, inputs) = weigh(&options, &vm, &key, looked, said, link, qemu_bytes_per_s).await?;
    let inputs = Inputs {
        rate_bytes_per_s,
        learned: learned(&options.state, fingerprint),
        ..inputs
    };
    let facts = Facts {
        vm: name.clone(),
        peer: peer_name,
        was_running,
        ..facts
    };
    let prediction = predict(&inputs);
    if prediction.ends.arrives()
        && let Err(error) = noted::keep(&options.state, &name, fingerprint, &prediction, now_s())
    {
        tracing::warn!("the plan is not noted for the report of `send`: {error:#}");
    }
    Ok(Document::new(&facts, &inputs, &prediction))
}

fn learned(state: &StateDir, peer: Fingerprint) -> Learned {
    match history::load(state) {
        Ok(records) => history::learn(&records, &peer.to_string()),
        Err(error) => {
            tracing::warn!("nothing is learned from earlier moves: {error:#}");
            Learned::default()
        }
    }
}

/// Whose memory, for whom.
struct Whose {
    state: StateDir,
    name: String,
    fingerprint: Fingerprint,
    key: [u8; 32],
    nonce: [u8; 16],
}

/// What the looks at memory brought.
struct Looked {
    sample: Sample,
    kept: Option<KeptSample>,
    wanted: Wanted,
}

/// Looks at memory, tells the probe what to ask, looks again. The probe is told something in any case.
async fn look(
    vm: &Vm,
    mapped: Mapped,
    whose: &Whose,
    asks: mpsc::Sender<Wanted>,
) -> anyhow::Result<Looked> {
    let looked = begin_looking(vm, mapped, whose).await;
    let wanted = looked.as_ref().map(|looked| looked.wanted.clone());
    if asks.send(wanted.unwrap_or_default()).await.is_err() {
        tracing::debug!("the probe has ended");
    }
    let mut looked = looked?;
    let began = now();
    for after in LOOKS {
        tokio::time::sleep_until((began + after).into()).await;
        looked = tokio::task::spawn_blocking(move || {
            looked.sample.look(now)?;
            anyhow::Ok(looked)
        })
        .await??;
    }
    Ok(looked)
}

async fn begin_looking(vm: &Vm, mapped: Mapped, whose: &Whose) -> anyhow::Result<Looked> {
    let seed = u64::from_le_bytes(random());
    let sample = Sample::take(vm, mapped == Mapped::Auto, seed, now).await?;
    let checkpoints = Checkpoints::new(whose.state.path());
    let replica = checkpoints.peek(&whose.name, whose.fingerprint);
    let (nonce, key) = (whose.nonce, whose.key);
    let find = move || {
        let kept = match replica {
            Ok(Some(replica)) => Some(KeptSample::find(replica, &sample)),
            Ok(None) => None,
            Err(error) => {
                tracing::warn!("the checkpoint is left out of the plan: {error}");
                None
            }
        };
        let wanted = cost::wanted(&sample, kept.as_ref(), &nonce, &key)
            .context("the checkpoint cannot be read")?;
        anyhow::Ok(Looked {
            sample,
            kept,
            wanted,
        })
    };
    tokio::task::spawn_blocking(find).await?
}

/// Turns what was seen into what the model wants.
async fn weigh(
    options: &Options,
    vm: &Vm,
    key: &[u8; 32],
    looked: anyhow::Result<Looked>,
    said: TargetSaid,
    link: LinkSeen,
    qemu_bytes_per_s: Option<f64>,
) -> anyhow::Result<(Facts, Inputs)> {
    let (rate, key, target) = (link.rate.mean, *key, said.clone());
    let mut facts = Facts {
        link,
        said,
        max_bandwidth_bps: options.shaping.rate_max(),
        qemu_dirty_bytes_per_s: qemu_bytes_per_s,
        ..Facts::default()
    };
    let (costs, dirtying) = match looked {
        Ok(looked) => {
            facts.is_mapped = looked.sample.is_mapped;
            facts.pages_total = looked.sample.pages_total;
            let how = Encoding {
                disable: options.disable,
                level: options.level,
                link_bytes_per_s: rate,
            };
            let weigh = move || {
                let sample = &looked.sample;
                let asked = (&looked.wanted, &target);
                let costs = cost::costs(sample, looked.kept.as_ref(), asked, &key, &how, now)?;
                let (pages, total) = (to_f64(sample.pages()), to_f64(sample.pages_total));
                let dirtying = dirtying::fit(&sample.looks, pages, total, f64::from(GROUP_PAGES));
                anyhow::Ok((costs, dirtying))
            };
            tokio::task::spawn_blocking(weigh).await??
        }
        Err(error) => {
            facts.unseen = Some(format!("{error:#}"));
            let blocks = vm.qmp.ram_blocks().await?;
            let bytes: u64 = blocks.iter().map(|block| block.used_bytes).sum();
            facts.pages_total = bytes / 4096;
            (Costs::unseen(), Dirtying::of_rate(qemu_bytes_per_s, bytes))
        }
    };
    let cores =
        std::thread::available_parallelism().map_or(2.0, |cores| to_f64(cores.get() as u64));
    let inputs = Inputs {
        pages_total: to_f64(facts.pages_total),
        costs,
        dirtying,
        rate_bytes_per_s: rate,
        rtt_s: facts.link.rtt_min.as_secs_f64(),
        wire_per_byte: facts.link.sent_per_byte + facts.link.back_per_byte,
        cores,
        load: load() / cores,
        policy: options.policy,
        learned: Learned::default(),
    };
    Ok((facts, inputs))
}

/// Programs that wanted a core in the last minute; none where the system does not say.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|load| load.parse().ok()).unwrap_or(0.0)
}
