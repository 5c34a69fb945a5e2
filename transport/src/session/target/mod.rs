//! The target's side of a session: what it is told, what it does; the machine is in `machine`.

mod handover;
mod machine;
mod postcopy;

use bytes::Bytes;

pub use self::machine::Target;
use super::Outcome;
use crate::block::{BlockSpec, PageRun, Root};
use crate::wire::{AttemptId, Frame, Offer, RunState, Verify};

/// What the machine is told.
#[derive(Debug)]
pub enum Input {
    /// A control frame of the peer.
    Frame(Frame),
    /// The connection is gone.
    PeerLost(String),
    /// Target QEMU is stopped, incoming, and has the head and the block list.
    VmPrepared {
        /// What the source may refer to.
        offer: Offer,
    },
    /// The source's digests are compared with this side's replica.
    BasisAgreed {
        /// Equal ranges, one bit each, least significant first; empty for none.
        basis: Bytes,
    },
    /// References of a batch did not resolve: these pages must come again.
    Missing(Vec<PageRun>),
    /// A monitor command failed, the load failed, or QEMU is gone.
    VmFailed(String),
    /// Everything before the barrier is applied: consumed by target QEMU.
    Applied {
        /// The barrier.
        barrier: u32,
        /// Root over the ledger as applied.
        root: Root,
        /// Pages that were asked for again and have not come.
        missing_pages: u64,
    },
    /// A lane carried something that cannot be applied.
    LaneFailed(String),
    /// Target QEMU has loaded everything: `completed`, and paused. In post-copy: the devices, and it is
    /// paused.
    VmLoaded,
    /// Post-copy: what the source named is left out; the root over the rest.
    LeftOut(Result<Root, String>),
    /// Post-copy: QEMU has every page, `completed`.
    AllPages,
    /// QEMU emitted RESUME, or says that it runs.
    VmResumed,
    /// `paused` and `completed` were read again, just before Commit is accepted.
    Rechecked(Result<(), String>),
    /// Real memory compared with the ledger.
    Proved(Result<(), String>),
    /// The journal entry asked for is durable, or is not.
    Journaled(Result<(), String>),
    /// `cont` failed, and QEMU is proven dead without having run the guest.
    NeverRan(String),
    /// The operator wants to stop waiting.
    Abort(String),
    /// The time of `poll_timeout` has come.
    Timer,
}

/// What the driver does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send a control frame.
    Send(Frame),
    /// Stop QEMU, start its incoming side, feed head and block list.
    PrepareVm {
        /// Header and configuration as captured.
        head: Bytes,
        /// RAM blocks.
        blocks: Vec<BlockSpec>,
        /// Prepare for post-copy, where QEMU can.
        post_copy: bool,
    },
    /// Stop QEMU and start its incoming side; a relayed stream brings all bytes itself.
    PrepareRelay,
    /// Compare the source's digests with this side's replica.
    AgreeBasis {
        /// One for each range of the image.
        digests: Vec<[u8; 16]>,
    },
    /// Lanes may be read.
    AcceptLanes {
        /// Ranges that both sides hold: they are in the guest before a lane's first page.
        basis: Bytes,
    },
    /// Lane 0 brings the stream's own bytes.
    AcceptRelay,
    /// All pages are in: feed the device state.
    FeedTail(Vec<(Bytes, u32)>),
    /// Post-copy: the source has named all pages that it keeps back, so many.
    LeaveOut {
        /// Number of pages.
        pages: u64,
    },
    /// Post-copy: what QEMU has of the absent pages is thrown away, then it gets the device state.
    FeedPackage(Vec<(Bytes, u32)>),
    /// Post-copy: tell the source on this connection what is lacking, and take its lanes.
    TellAbsent,
    /// Compare real memory with the ledger.
    Prove(Verify),
    /// Read `paused` and `completed` again.
    Recheck,
    /// Journal, durable before the answer.
    Journal(Mark),
    /// Run the guest: `cont`, once.
    Continue,
    /// Stop the guest that runs here: the source's operator has given it to the source.
    Pause,
    /// End target QEMU: no loaded, paused copy survives an abort (S3).
    Quit,
    /// Wait for the source to come back (it settles).
    AwaitPeer,
    /// For progress, report and hooks.
    Phase(Phase),
    /// The end.
    Done(Outcome),
}

/// Durable steps of the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// Commit is accepted; `cont` may follow.
    Committed {
        /// Agreed root.
        root: Root,
        /// Run state before the move.
        run_state: RunState,
    },
    /// This attempt will never run here.
    Refused(String),
    /// Target QEMU is dead and the guest never ran in it.
    NeverRan(String),
    /// The guest runs here, and lacks pages that the source holds.
    Filling,
    /// The guest runs here (or is here, paused as asked).
    Running,
    /// Both sides have closed the attempt.
    Settled,
}

/// Names of the phases, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// QEMU opens its incoming side.
    Prepare,
    /// Pages arrive.
    Precopy,
    /// Last pages are in; device state loads.
    Load,
    /// Loaded was said; Commit is awaited.
    Complete,
    /// Commit came; the guest starts.
    Commit,
    /// The guest runs; pages that it lacks come.
    PostCopy,
    /// Both journals close.
    Settle,
}

/// What the machine must know before it starts.
#[derive(Debug, Clone)]
pub struct Config {
    /// The attempt.
    pub attempt: AttemptId,
    /// This process's incarnation.
    pub incarnation: u64,
    /// How memory shall be proved.
    pub verify: Verify,
    /// QEMU's version, for the source's log.
    pub qemu: String,
    /// `--paused`: leave the guest stopped.
    pub stay_paused: bool,
    /// Epoch of the VM in our journal.
    pub epoch: u64,
    /// Random in this attempt: the source's digests are keyed with it (S14).
    pub nonce: [u8; 16],
}
