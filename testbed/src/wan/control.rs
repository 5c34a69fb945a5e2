//! Requests to the emulator and its counters: one JSON document a datagram, each way.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use testbed_link::{Counters, LinkParams};

use super::LinkJson;

const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A request is a few hundred bytes; an answer about a thousand.
pub(super) const DATAGRAM_BYTES_MAX: usize = 8192;

/// What can be asked of the emulator. Every answer holds the counters.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Counters only.
    Counters,
    /// Change the parameters of both directions.
    Set {
        /// From the cloud's side to the client.
        to_client: LinkJson,
        /// From the client to the cloud's side.
        to_cloud: LinkJson,
    },
    /// Lose all that is on the link and all that comes, until mended.
    Cut,
    /// End the cut.
    Mend,
}

/// Counters of one direction. Bytes are IP bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "named as the link model's own counters, documented there"
)]
pub struct DirectionCounters {
    pub offered_packets: u64,
    pub offered_bytes: u64,
    pub delivered_packets: u64,
    pub delivered_bytes: u64,
    pub queue_drops: u64,
    pub queue_drop_bytes: u64,
    pub losses: u64,
    pub loss_bytes: u64,
    pub cut_drops: u64,
    pub cut_drop_bytes: u64,
    pub queue_bytes_max: u64,
}

impl From<Counters> for DirectionCounters {
    fn from(counters: Counters) -> Self {
        Self {
            offered_packets: counters.offered.packets,
            offered_bytes: counters.offered.bytes,
            delivered_packets: counters.delivered.packets,
            delivered_bytes: counters.delivered.bytes,
            queue_drops: counters.queue_drops.packets,
            queue_drop_bytes: counters.queue_drops.bytes,
            losses: counters.losses.packets,
            loss_bytes: counters.losses.bytes,
            cut_drops: counters.cut_drops.packets,
            cut_drop_bytes: counters.cut_drops.bytes,
            queue_bytes_max: counters.queue_bytes_max,
        }
    }
}

/// Counters of the emulator since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WanCounters {
    /// From the cloud's side to the client.
    pub to_client: DirectionCounters,
    /// From the client to the cloud's side.
    pub to_cloud: DirectionCounters,
    /// Frames that the emulator could not write: not part of the model, should be 0.
    pub send_failures: u64,
    /// Frames above the MTU, dropped: an offload is on; should be 0.
    pub oversize: u64,
    /// Frames that the kernel dropped before the emulator read them; should be 0.
    pub kernel_drops: u64,
    /// CPU time of the emulator.
    pub cpu_s: f64,
    /// Is the link cut?
    pub is_cut: bool,
}

impl WanCounters {
    /// IP bytes offered to the link, both directions (the report's `wire_bytes`).
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.to_client.offered_bytes + self.to_cloud.offered_bytes
    }

    /// IP bytes that left the link, both directions (`wire_bytes_delivered`).
    #[must_use]
    pub fn wire_bytes_delivered(&self) -> u64 {
        self.to_client.delivered_bytes + self.to_cloud.delivered_bytes
    }

    /// Packets dropped by the two queues.
    #[must_use]
    pub fn queue_drops(&self) -> u64 {
        self.to_client.queue_drops + self.to_cloud.queue_drops
    }
}

/// An answer of the emulator.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) error: Option<String>,
    pub(super) counters: WanCounters,
}

/// Client of a running emulator.
#[derive(Debug)]
pub struct Wan {
    server: PathBuf,
    own_paths: AtomicU32,
}

impl Wan {
    /// The emulator that listens at `socket`. Does not talk to it yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            server: socket.to_owned(),
            own_paths: AtomicU32::new(0),
        }
    }

    /// The counters since the start of the lab; take the difference of two calls.
    ///
    /// # Errors
    /// If the emulator does not answer.
    pub fn counters(&self) -> anyhow::Result<WanCounters> {
        self.ask(&Request::Counters)
    }

    /// Gives both directions the parameters `link`.
    ///
    /// # Errors
    /// If a parameter is out of range, or the emulator does not answer.
    pub fn set(&self, link: &LinkParams) -> anyhow::Result<WanCounters> {
        self.set_each(link, link)
    }

    /// Gives each direction its own parameters.
    ///
    /// # Errors
    /// If a parameter is out of range, or the emulator does not answer.
    pub fn set_each(
        &self,
        to_client: &LinkParams,
        to_cloud: &LinkParams,
    ) -> anyhow::Result<WanCounters> {
        self.ask(&Request::Set {
            to_client: to_client.into(),
            to_cloud: to_cloud.into(),
        })
    }

    /// Cuts both directions.
    ///
    /// # Errors
    /// If the emulator does not answer.
    pub fn cut(&self) -> anyhow::Result<WanCounters> {
        self.ask(&Request::Cut)
    }

    /// Ends a cut.
    ///
    /// # Errors
    /// If the emulator does not answer.
    pub fn mend(&self) -> anyhow::Result<WanCounters> {
        self.ask(&Request::Mend)
    }

    fn ask(&self, request: &Request) -> anyhow::Result<WanCounters> {
        let number = self.own_paths.fetch_add(1, Ordering::Relaxed);
        let own = self
            .server
            .with_extension(format!("{}-{number}", std::process::id()));
        let socket = UnixDatagram::bind(&own).context("bind a socket for the answer")?;
        let answer = exchange(&socket, &self.server, request);
        std::fs::remove_file(&own).context("remove the answer's socket")?;
        let answer = answer.context("ask the link emulator")?;
        match answer.error {
            Some(error) => bail!("the link emulator refused: {error}"),
            None => Ok(answer.counters),
        }
    }
}

fn exchange(socket: &UnixDatagram, server: &Path, request: &Request) -> anyhow::Result<Answer> {
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    socket.send_to(&serde_json::to_vec(request)?, server)?;
    let mut answer = vec![0; DATAGRAM_BYTES_MAX];
    let len = socket.recv(&mut answer)?;
    Ok(serde_json::from_slice(&answer[..len])?)
}
