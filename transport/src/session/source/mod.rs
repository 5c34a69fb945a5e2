//! The source's side of a session: what it is told, what it does; the machine is in `machine`, how
//! it leads pre-copy in `steering`, what it measures in `rounds`.

mod handover;
mod machine;
mod opening;
mod postcopy;
mod rounds;
mod steering;

use std::time::Duration;

use bytes::Bytes;

pub use self::machine::Source;
use super::precopy::{Policy, WhenStuck};
use super::{Hold, Outcome, VmMigration};
use crate::block::{BlockSpec, Root};
use crate::wire::{AttemptId, Frame, Offer, RunState, Verify};

/// What the machine is told.
#[derive(Debug)]
pub enum Input {
    /// A control frame of the peer.
    Frame(Frame),
    /// The connection is gone.
    PeerLost(String),
    /// A new connection for the status dialogue is up.
    Reconnected,
    /// QEMU emitted STOP.
    VmStopped,
    /// QEMU emitted RESUME.
    VmResumed,
    /// QEMU's migration status changed.
    VmMigration(VmMigration),
    /// QEMU reported the start of a pass (one dirty sync).
    PassStarted,
    /// The monitor or the process is gone.
    VmGone(String),
    /// Capture: head of the stream and RAM blocks.
    Head {
        /// Header and configuration.
        head: Bytes,
        /// RAM blocks in QEMU's order.
        blocks: Vec<BlockSpec>,
        /// Digest of every range of the replica, keyed with the nonce; empty for no replica.
        basis: Vec<[u8; 16]>,
    },
    /// Capture: the stream cannot be parsed; its bytes are relayed.
    Relay,
    /// Capture: every byte of the relayed stream is sent.
    Relayed {
        /// Their number.
        bytes: u64,
    },
    /// Capture: a pass has no more pages.
    PassDrained {
        /// Pages that it announced.
        pages: u64,
    },
    /// Capture: all pages are in, device state begins.
    RamEnd,
    /// Capture: device state, whole.
    Tail {
        /// Compressed pieces in order.
        pieces: Vec<(Bytes, u32)>,
        /// Bytes before compression.
        total_bytes: u64,
    },
    /// Capture failed; QEMU resumes by itself.
    CaptureFailed(String),
    /// What the driver sees of backlog and lanes.
    Sample(Sample),
    /// Every lane has written the barrier's mark, and everything before it.
    Marked {
        /// The barrier.
        barrier: u32,
        /// Root over the ledger as sent.
        root: Root,
        /// Pages that stay behind for post-copy: told to the target, not in the root.
        absent_pages: u64,
    },
    /// Real memory compared with the ledger.
    Proved(Result<(), String>),
    /// The journal entry asked for is durable, or is not.
    Journaled(Result<(), String>),
    /// A monitor command failed (success is seen by events).
    VmCommandFailed(String),
    /// The operator wants the guest to stay.
    Abort(String),
    /// The operator changed the wanted downtime.
    Downtime(Duration),
    /// The operator changed what is done when pre-copy does not get on.
    WhenStuck(WhenStuck),
    /// The time of `poll_timeout` has come.
    Timer,
}

/// Counters that the driver reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    /// Pages announced and not sent.
    pub backlog_pages: u64,
    /// Pages announced since the start, every announcement counted.
    pub announced_pages: u64,
    /// Pages sent with content since the start.
    pub content_pages: u64,
    /// Bytes written to lanes since the start.
    pub sent_bytes: u64,
    /// Least RTT.
    pub rtt: Duration,
    /// The congestion controller's estimate of the link, 0 before its first.
    pub link_bytes_per_s: u64,
}

/// What the driver does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send a control frame.
    Send(Frame),
    /// Start QEMU's migration into the capture socket, held.
    StartCapture {
        /// Keys the digests of the replica (S14).
        nonce: [u8; 16],
    },
    /// Open the lanes and let pages flow.
    OpenLanes {
        /// Ranges that both sides hold, one bit each, least significant first.
        basis: Bytes,
        /// What the target can resolve.
        offer: Offer,
    },
    /// Send the stream's bytes as they are.
    OpenRelay,
    /// Ask QEMU for one dirty sync and its pass.
    TriggerPass,
    /// Let the pass flow (the sync has happened).
    OpenPass,
    /// Keep QEMU quiet until the next pass.
    HoldPass,
    /// Starvation hold: let QEMU run at this rate of raw page bytes per second.
    Pace(u64),
    /// QEMU syncs without a pause and stops the guest when it has the acknowledgement.
    Arm,
    /// Back to single syncs: the pass that is under way flows.
    Disarm,
    /// The acknowledgement, for an armed QEMU.
    Acknowledge,
    /// Slow the guest's processors by so many percent.
    Throttle(u8),
    /// Let QEMU stop the guest.
    Release,
    /// Let QEMU stop the guest when its own arithmetic says that what is left fits.
    ReleaseToQemu,
    /// Flush every lane and write the barrier's mark.
    FlushLanes {
        /// Number of the barrier.
        barrier: u32,
    },
    /// Post-copy: lanes take no more pages; what is dirty at their marks stays behind.
    HoldLanes,
    /// Post-copy: lanes go on with what stayed behind.
    Push,
    /// Compare real memory with the ledger.
    Prove(Verify),
    /// Give QEMU SHUT(0).
    Shut,
    /// Close the capture socket without SHUT(0): QEMU resumes by itself.
    CloseCapture,
    /// Run the guest again at the source (only from `postmigrate`).
    Continue,
    /// Journal, durable before the answer.
    Journal(Mark),
    /// Connect again for the status dialogue.
    Reconnect,
    /// The guest is the target's: quit QEMU (or keep it, as asked).
    Retire,
    /// For progress, report and hooks.
    Phase(Phase),
    /// A round ended.
    Round(Round),
    /// The end.
    Done(Outcome),
}

/// Durable steps of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// Commit will be sent.
    Intent {
        /// The target process that said Loaded.
        target_incarnation: u64,
        /// Agreed root.
        root: Root,
        /// Run state before the move.
        run_state: RunState,
    },
    /// Post-copy: the guest is the target's; pages that it lacks are held here.
    Holding,
    /// Closed.
    Settled(Outcome),
}

/// Names of the phases, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// QEMU opens its stream.
    Prepare,
    /// Pages flow, the guest runs.
    Precopy,
    /// The guest is stopped; last pages and device state flow.
    Stop,
    /// Target loads and proves.
    Load,
    /// Source QEMU completes, intent is written.
    Complete,
    /// Commit is out.
    Commit,
    /// The guest runs at the target; pages that it lacks flow.
    PostCopy,
    /// Both journals close.
    Settle,
}

/// One round: from one empty backlog to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Pages announced during the round.
    pub dirty_pages: u64,
    /// Lane bytes of the round.
    pub sent_bytes: u64,
    /// Its length.
    pub length: Duration,
}

/// What the machine must know before it starts.
#[derive(Debug, Clone)]
pub struct Config {
    /// The attempt.
    pub attempt: AttemptId,
    /// The target's process, from its hello.
    pub target_incarnation: u64,
    /// How QEMU can be held.
    pub hold: Hold,
    /// The guest's run state before the move.
    pub run_state: RunState,
    /// The stop rule.
    pub policy: Policy,
    /// A guest that does not converge may be moved by post-copy, if the target can.
    pub post_copy: bool,
    /// Epoch of the VM in our journal.
    pub epoch: u64,
}
