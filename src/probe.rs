//! The target's side of a probe: answers what `plan` wants to know and goes on waiting.
//!
//! ```text
//! Ready ->  <- Probe: what both hold, what can be named -> LayoutTaken
//!           <- lanes: filler, counted and dropped       -> Progress
//!           <- Query: pages of disk images              -> Known
//! ```
//! Limits are those of [`ProbeGuard`]; a probe takes nothing up and leaves nothing behind.

use std::future::pending;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use tokio::sync::mpsc;
use transport::quic::probe::Drain;
use transport::quic::{CloseCode, Fingerprint};
use transport::session::probe::{Answer, ProbeGuard};
use transport::store::{BasisKey, Checkpoints};
use transport::wire::limits::PROBE_MAX_QUESTIONS;
use transport::wire::{AbortCode, AttemptId, Frame, Offer, Purpose, Role, Verify};

use crate::peer::{Door, Me, Peer, Way, random, send_frame};
use crate::shared::{Answering, Shared};
use crate::signals::Signals;
use crate::state_dir::StateDir;
use crate::waiting::{next, now};

/// How often the source hears how much has come.
const COUNT_INTERVAL: Duration = Duration::from_millis(20);
/// How long a dialer that was probed goes on looking for the real move.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two tries of it.
const DIAL_INTERVAL: Duration = Duration::from_millis(500);
/// The last words may take this long to be acknowledged.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

/// What a target says of itself in a probe.
#[derive(Debug, Clone)]
pub(crate) struct ProbeHost {
    pub(crate) state: StateDir,
    pub(crate) verify: Verify,
    /// Version of its QEMU; empty when there is none.
    pub(crate) qemu: String,
}

/// The peer that comes to move its guest; probes are answered until then.
pub(crate) async fn meet(door: &Door, me: &Me, host: &ProbeHost) -> anyhow::Result<Peer> {
    let mut peer = door.meet(me, Purpose::Migrate).await?;
    while peer.agreed.purpose == Purpose::Probe {
        answer_one(peer, host).await;
        peer = meet_next(door, me, Purpose::Migrate).await?;
    }
    Ok(peer)
}

/// The next peer. A dialer tries for long: who planned may take his time, and his program is still about
/// to end.
async fn meet_next(door: &Door, me: &Me, purpose: Purpose) -> anyhow::Result<Peer> {
    let deadline = now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(now());
        match door.meet_within(me, purpose, left).await {
            Err(error) if !door.listens() && !left.is_zero() => {
                tracing::debug!("the source is not there: {error:#}");
                tokio::time::sleep(DIAL_INTERVAL).await;
            }
            met => return met,
        }
    }
}

/// `receive --probe`: answers probes until it is interrupted.
pub(crate) async fn answer_all(
    way: Way,
    peer: Option<&str>,
    vm: Option<String>,
    host: &ProbeHost,
) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let me = Me {
        role: Role::Target,
        vm: vm.unwrap_or_default(),
        attempt: AttemptId([0; 16]),
        incarnation: u64::from_le_bytes(random()),
    };
    let door = Door::open(way, peer, &host.state).await?;
    if door.listens() {
        crate::progress::say(&format!("listening on {}", door.local_address()?));
    }
    let answering = async {
        loop {
            let peer = meet_next(&door, &me, Purpose::Probe).await?;
            answer_one(peer, host).await;
        }
    };
    let ended = tokio::select! {
        ended = answering => ended,
        () = signals.next() => Ok(()),
    };
    door.close().await;
    ended
}

async fn answer_one(peer: Peer, host: &ProbeHost) {
    let name = peer.name.clone();
    match Probe::new(peer, host).run().await {
        Ok(bytes) => tracing::info!(peer = name, bytes, "answered a probe; waiting on"),
        Err(error) => tracing::warn!(peer = name, "a probe failed, waiting on: {error:#}"),
    }
}

/// What is found out beside the loop for the source's first frame.
#[derive(Debug)]
struct Found {
    basis: Bytes,
    shared: Option<Shared>,
}

/// One probe.
struct Probe<'a> {
    peer: Peer,
    host: &'a ProbeHost,
    guard: ProbeGuard,
    nonce: [u8; 16],
    drain: Option<Drain>,
    told: [u64; transport::block::LANES],
    found: Option<mpsc::Receiver<Found>>,
    answering: Option<Answering>,
    answers: Option<mpsc::Receiver<Frame>>,
}

impl<'a> Probe<'a> {
    fn new(peer: Peer, host: &'a ProbeHost) -> Probe<'a> {
        Probe {
            peer,
            host,
            guard: ProbeGuard::new(now()),
            nonce: random(),
            drain: None,
            told: Default::default(),
            found: None,
            answering: None,
            answers: None,
        }
    }

    /// Answers until the source closes. Returns how much filler came.
    async fn run(mut self) -> anyhow::Result<u64> {
        let answered = self.answer().await;
        let bytes = self.filler_bytes();
        match answered {
            Ok(()) => {
                self.peer.connection.close(CloseCode::Done, "probed");
                Ok(bytes)
            }
            Err((code, error)) => {
                let abort = Frame::Abort {
                    code,
                    detail: format!("{error:#}"),
                };
                let mut sender = self.peer.sender;
                let farewell = async {
                    send_frame(&mut sender, &abort).await?;
                    anyhow::Ok(sender.finish().await?)
                };
                if tokio::time::timeout(FAREWELL_MAX, farewell).await.is_err() {
                    tracing::debug!("the source does not hear why its probe ends");
                }
                self.peer.connection.close(CloseCode::Abort, "probe");
                Err(error)
            }
        }
    }

    async fn answer(&mut self) -> Result<(), (AbortCode, anyhow::Error)> {
        let link = |error: anyhow::Error| (AbortCode::Link, error);
        let ready = Frame::Ready {
            verify: self.host.verify,
            qemu: self.host.qemu.clone(),
            nonce: self.nonce,
        };
        send_frame(&mut self.peer.sender, &ready)
            .await
            .map_err(link)?;
        let connection = self.peer.connection.clone();
        let mut accepting = Box::pin(connection.accept_lanes());
        let mut ticks = tokio::time::interval(COUNT_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            let is_open = self.drain.is_some();
            tokio::select! {
                frame = self.peer.inbox.next() => match frame {
                    Ok(frame) => self.frame(frame)?,
                    Err(detail) => return self.ended(anyhow::anyhow!(detail)).await,
                },
                lanes = async {
                    if is_open { pending().await } else { accepting.as_mut().await }
                } => match lanes {
                    Ok(lanes) => self.drain = Some(Drain::start(lanes)),
                    Err(error) => return self.ended(error.into()).await,
                },
                found = next(&mut self.found) => self.compared(found).await.map_err(link)?,
                answer = next(&mut self.answers) => {
                    send_frame(&mut self.peer.sender, &answer).await.map_err(link)?;
                }
                _ = ticks.tick() => self.count().await?,
            }
        }
    }

    /// A source that has closed has what it wanted; one that has not said something wrong.
    async fn ended(&self, error: anyhow::Error) -> Result<(), (AbortCode, anyhow::Error)> {
        let closed = self.peer.connection.closed();
        match tokio::time::timeout(Duration::ZERO, closed).await {
            Ok(_) => Ok(()),
            Err(_) => Err((AbortCode::Protocol, error)),
        }
    }

    fn frame(&mut self, frame: Frame) -> Result<(), (AbortCode, anyhow::Error)> {
        let answer = match self.guard.frame(frame) {
            Ok(answer) => answer,
            Err(error) => return Err((error.code(), error.into())),
        };
        match answer {
            Answer::Compare(ranges) => self.found = Some(self.find(ranges)),
            Answer::Look { first, prefixes } => {
                let answering = self.answering.as_mut();
                if !answering.is_some_and(|answering| answering.ask(first, &prefixes)) {
                    let error = anyhow::anyhow!("a question before the offer, or too many at once");
                    return Err((AbortCode::Protocol, error));
                }
            }
        }
        Ok(())
    }

    /// Opens what may be named, and compares ranges, beside the loop.
    fn find(&self, ranges: Vec<(u32, [u8; 16])>) -> mpsc::Receiver<Found> {
        let (found, receiver) = mpsc::channel(1);
        let (state, vm) = (self.host.state.clone(), self.peer.agreed.vm.clone());
        let (peer, key, nonce) = (self.peer.connection.peer(), self.peer.secret, self.nonce);
        tokio::spawn(async move {
            let shared = Shared::open(state.clone(), peer, key).await;
            let compare = move || held_ranges(&state, &vm, peer, &key, &nonce, &ranges);
            let basis = match tokio::task::spawn_blocking(compare).await {
                Ok(Ok(basis)) => basis,
                Ok(Err(error)) => {
                    tracing::debug!("no checkpoint for this probe: {error:#}");
                    Bytes::new()
                }
                Err(_) => Bytes::new(),
            };
            if found.send(Found { basis, shared }).await.is_err() {
                tracing::debug!("the probe has ended");
            }
        });
        receiver
    }

    async fn compared(&mut self, found: Found) -> anyhow::Result<()> {
        self.found = None;
        let known_pages = found.shared.as_ref().map_or(0, Shared::known_pages);
        if let Some(shared) = &found.shared {
            let (answering, answers) = Answering::start(shared, PROBE_MAX_QUESTIONS)
                .context("no thread for the probe's questions")?;
            (self.answering, self.answers) = (Some(answering), Some(answers));
        }
        let offer = Offer {
            post_copy: false,
            readable: true,
            known_pages,
        };
        let taken = Frame::LayoutTaken {
            basis: found.basis,
            offer,
        };
        send_frame(&mut self.peer.sender, &taken).await
    }

    /// Tells the source how much has come, and looks at the limits.
    async fn count(&mut self) -> Result<(), (AbortCode, anyhow::Error)> {
        if let Err(error) = self.guard.check(now(), self.filler_bytes()) {
            return Err((error.code(), error.into()));
        }
        let Some(drain) = &self.drain else {
            return Ok(());
        };
        let applied_bytes = drain.counts();
        if applied_bytes == self.told {
            return Ok(());
        }
        self.told = applied_bytes;
        let progress = Frame::Progress { applied_bytes };
        let sent = send_frame(&mut self.peer.sender, &progress).await;
        sent.map_err(|error| (AbortCode::Link, error))
    }

    fn filler_bytes(&self) -> u64 {
        let counts = self.drain.as_ref().map(Drain::counts);
        counts.map_or(0, |counts| counts.iter().sum())
    }
}

/// A bit for each range that this host's checkpoint has as well.
fn held_ranges(
    state: &StateDir,
    vm: &str,
    peer: Fingerprint,
    key: &[u8; 32],
    nonce: &[u8; 16],
    asked: &[(u32, [u8; 16])],
) -> anyhow::Result<Bytes> {
    if asked.is_empty() {
        return Ok(Bytes::new());
    }
    let Some(replica) = Checkpoints::new(state.path()).peek(vm, peer)? else {
        bail!("none is kept");
    };
    let total = replica.layout().ranges_total();
    let mine: Vec<u32> = asked
        .iter()
        .map(|(range, _)| *range)
        .filter(|range| *range < total)
        .collect();
    let hashes = replica.hash_some(key, &mine)?;
    let key = BasisKey::new(key);
    let mut bits = vec![0_u8; asked.len().div_ceil(8)];
    for (place, (range, theirs)) in asked.iter().enumerate() {
        let is_held = *range < total && hashes.digest(*range, nonce, &key) == *theirs;
        bits[place / 8] |= u8::from(is_held) << (place % 8);
    }
    Ok(bits.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::link::{LinkProbe, Wanted};
    use crate::state_dir::tests::Scratch;
    use transport::wire::limits::QUERY_MAX_PAGES;

    struct Pair {
        _here: Scratch,
        source: StateDir,
        target: StateDir,
    }

    impl Pair {
        fn new(name: &str) -> Pair {
            let here = Scratch::new(name);
            let source = StateDir::at(&here.0.join("source")).unwrap();
            let target = StateDir::at(&here.0.join("target")).unwrap();
            Pair {
                _here: here,
                source,
                target,
            }
        }

        fn host(&self) -> ProbeHost {
            ProbeHost {
                state: self.target.clone(),
                verify: Verify::Sample,
                qemu: "10.0.2".into(),
            }
        }

        /// A target that waits for VM "vm", and where.
        async fn waiting(&self) -> (Door, Me, std::net::SocketAddr) {
            let peer = self.source.identity().unwrap().fingerprint().to_string();
            let way = Way::Listen("127.0.0.1:0".parse().unwrap());
            let door = Door::open(way, Some(&peer), &self.target).await.unwrap();
            let address = door.local_address().unwrap();
            (door, me(Role::Target), address)
        }

        async fn come(&self, to: std::net::SocketAddr, purpose: Purpose) -> (Door, Peer) {
            let peer = self.target.identity().unwrap().fingerprint().to_string();
            let way = Way::Dial(to.to_string());
            let door = Door::open(way, Some(&peer), &self.source).await.unwrap();
            let peer = door.meet(&me(Role::Source), purpose).await.unwrap();
            (door, peer)
        }
    }

    fn me(role: Role) -> Me {
        Me {
            role,
            vm: "vm".into(),
            attempt: AttemptId(match role {
                Role::Source => [1; 16],
                Role::Target => [0; 16],
            }),
            incarnation: 1,
        }
    }

    /// A probe measures the link and is answered; the target then takes the real caller.
    #[tokio::test]
    async fn a_waiting_target_answers_and_goes_on_waiting() {
        let pair = Pair::new("probe");
        let (door, waiting, address) = pair.waiting().await;
        let host = pair.host();
        let target = meet(&door, &waiting, &host);
        let source = async {
            let (_door, peer) = pair.come(address, Purpose::Probe).await;
            let probe = LinkProbe::begin(peer, Some(4_000_000)).await.unwrap();
            assert_ne!(probe.nonce, [0; 16]);
            let (wanted, asked) = mpsc::channel(1);
            let wants = Wanted {
                ranges: vec![(0, [0; 16]), (9, [1; 16])],
                prefixes: vec![[0; 8]],
            };
            wanted.send(wants).await.unwrap();
            let (link, said) = probe.run(asked).await.unwrap();
            assert!(
                (2e6..5e6).contains(&link.rate.mean),
                "capped to 4 MB/s: {link:?}"
            );
            assert_eq!(said.qemu, "10.0.2");
            assert_eq!((said.held, said.known), (vec![false; 2], vec![false]));
            pair.come(address, Purpose::Migrate).await
        };
        let (met, (_door, peer)) = tokio::join!(target, source);
        assert_eq!(met.unwrap().agreed.purpose, Purpose::Migrate);
        assert_eq!(peer.agreed.purpose, Purpose::Migrate);
    }

    /// What has no place in a probe, or asks too much, ends it with its reason; the target waits on.
    #[tokio::test]
    async fn wrong_probes_are_refused_and_the_target_goes_on_waiting() {
        let pair = Pair::new("probe-wrong");
        let (door, waiting, address) = pair.waiting().await;
        let host = pair.host();
        let target = meet(&door, &waiting, &host);
        let probe = || Frame::Probe { ranges: vec![] };
        let query = Frame::Query {
            first: 0,
            prefixes: vec![[0; 8]; QUERY_MAX_PAGES],
        };
        let wrong = [
            (vec![Frame::Stopped], "Stopped has no place in a probe"),
            (vec![probe(), probe()], "Probe has no place in a probe"),
            (vec![query; 9], "question"),
        ];
        let source = async {
            for (frames, reason) in wrong {
                let (_door, mut peer) = pair.come(address, Purpose::Probe).await;
                for frame in frames {
                    // The target may have closed by then.
                    drop(send_frame(&mut peer.sender, &frame).await);
                }
                let said = loop {
                    if let Frame::Abort { detail, .. } = peer.inbox.next().await.unwrap() {
                        break detail;
                    }
                };
                assert!(said.contains(reason), "{said}");
            }
            pair.come(address, Purpose::Migrate).await
        };
        let (met, _) = tokio::join!(target, source);
        assert_eq!(met.unwrap().agreed.purpose, Purpose::Migrate);
    }
}
