//! Control frames. Sequence of one migration (`->` source to target):
//!
//! ```text
//! Hello <-> Hello            dialer first; versions, VM, attempt, roles, pair secret
//!  <- Ready                  target QEMU waits; how to verify; nonce
//!  -> Layout, Basis..        block list, stream head, what the source still holds of an earlier trip
//!  <- LayoutTaken            what both hold; lanes open
//!  -> Query                  <- Known: hashes of pages that the target may hold elsewhere
//!  -> (lanes) batches, Mark  <- Progress (applied), Applied (barrier), Missing (send these again)
//!  -> Stopped, Tail.. Final  after STOP (post-copy: Absent.. before Final)
//!  <- Loaded                 root of real memory; guest paused
//!  -> Commit                 point of no return
//!  <- Running | Refused | NeverRan
//!  <- Wanted  -> Urgent      post-copy: from Final on, pages that the guest waits for
//!  <- AllPages               post-copy: the source is needed no more
//!  -> Settled  <- Settled    both journals closed
//! ```
//!
//! A probe (`Purpose::Probe`) has a short one: Hello <-> Hello, <- Ready, -> Probe, <- LayoutTaken,
//! -> filler on the lanes, <- Progress, -> Query, <- Known; the source closes.

use std::fmt;

use bytes::Bytes;

use crate::block::{AbsentRange, BlockSpec, PageRun, Root};

/// Names one try to move one VM: 128 random bits made by the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub [u8; 16]);

/// Which end of the migration speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Has the guest.
    Source,
    /// Gets the guest.
    Target,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A new attempt.
    Migrate,
    /// Only to settle an attempt after Commit (`resolve`, or a waiting `send`/`receive`).
    Settle,
    /// The source measures before a move; nothing is moved, and the target goes on waiting.
    Probe,
}

/// First frame of each side.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version, [`PROTOCOL_VERSION`].
    pub version: u16,
    /// Feature bits that the speaker has; both use the intersection.
    pub features: u64,
    /// Who speaks.
    pub role: Role,
    /// What the connection is for.
    pub purpose: Purpose,
    /// UUID or name of the VM, same on both sides.
    pub vm: String,
    /// The attempt; set by the source, zero from a target that dials first.
    pub attempt: AttemptId,
    /// Process incarnation of the speaker, random; frames of an older one are dropped.
    pub incarnation: u64,
    /// The pair's secret that the speaker holds, identified by its hash (None = has none).
    pub secret_id: Option<[u8; 16]>,
    /// Listener only: the secret when the two sides do not hold the same one.
    pub secret: Option<[u8; 32]>,
    /// Program and version, for the log.
    pub software: String,
}

impl fmt::Debug for Hello {
    /// The secret stays out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("version", &self.version)
            .field("features", &self.features)
            .field("role", &self.role)
            .field("purpose", &self.purpose)
            .field("vm", &self.vm)
            .field("attempt", &self.attempt)
            .field("incarnation", &self.incarnation)
            .field("has_secret", &self.secret_id.is_some())
            .field("gives_secret", &self.secret.is_some())
            .field("software", &self.software)
            .finish()
    }
}

/// Version of this protocol.
pub const PROTOCOL_VERSION: u16 = 3;

/// How the target wants memory to be proved (S10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Only the ledger roots are compared.
    Off,
    /// A sample of pages is read from real memory on both sides.
    Sample,
    /// Every announced page is read from real memory on both sides.
    Full,
}

/// What the target can do for the source's references.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offer {
    /// Its image can be read while pages arrive: copies and deltas resolve.
    pub readable: bool,
    /// Pages of disk images that it may name to this peer, 0 for none.
    pub known_pages: u32,
    /// Its QEMU can run before all pages are there, as Layout wished.
    pub post_copy: bool,
}

/// The guest's run state before the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// It runs, and shall run at the target.
    Running,
    /// It was paused, and stays paused at the target.
    Paused,
}

/// What a side durably knows of an attempt after Commit may have been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The journal has no such attempt.
    Unknown,
    /// Durable: this attempt will never run at the target.
    Refused,
    /// Durable: target QEMU is dead and `cont` was never sent.
    NeverRan,
    /// The target has accepted Commit; `cont` may have been sent.
    Committed,
    /// The guest runs at the target (or is there, paused, as asked).
    Running,
    /// The source has the guest and keeps it: intent was never written or the doubt was settled.
    Stayed,
}

/// Reason class of an [`Frame::Abort`]; the detail is text for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortCode {
    /// The link was lost or silent for too long.
    Link,
    /// The operator asked for it.
    Operator,
    /// Versions, machine types, VM names or layouts do not fit.
    Incompatible,
    /// The speaker's own QEMU failed.
    Qemu,
    /// The speaker found the other's bytes wrong.
    Protocol,
    /// Memory differs (ledger or real memory).
    Memory,
    /// The speaker's disk or memory budget is exhausted.
    Resources,
    /// An attempt of this VM is unsettled on the speaker's side.
    Unsettled,
}

/// One control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// First frame of each side.
    Hello(Hello),
    /// Target: its QEMU waits for a migration.
    Ready {
        /// How memory shall be proved.
        verify: Verify,
        /// QEMU version text, for the log and for checks.
        qemu: String,
        /// Fresh in this attempt: the source's proof of what it holds is keyed with it (S14).
        nonce: [u8; 16],
    },
    /// Source: the guest's memory layout and the head of QEMU's stream.
    Layout {
        /// Header and configuration section as captured.
        head: Bytes,
        /// RAM blocks in QEMU's order.
        blocks: Vec<BlockSpec>,
        /// Digests that follow in Basis frames: every range of the image, or 0 for none.
        basis_ranges: u32,
        /// The source may leave pages for after the stop: the target prepares its QEMU for that.
        post_copy: bool,
    },
    /// Source: digests of the next ranges of its replica, keyed with the nonce.
    Basis {
        /// One for each range.
        digests: Vec<[u8; 16]>,
    },
    /// Source, in place of Layout: QEMU's stream has something unknown before its first page; its bytes
    /// come as they are on lane 0, from the first to the last.
    Relay,
    /// Target: layout (or relay) accepted; lanes may flow.
    LayoutTaken {
        /// One bit for each range, least significant first: both replicas are equal there. Empty for none.
        basis: Bytes,
        /// What the source may refer to.
        offer: Offer,
    },
    /// Source of a probe: digests of some ranges of its replica, keyed with the nonce. The answer is a
    /// LayoutTaken with a bit for each of them.
    Probe {
        /// Number of a range and its digest, at most
        /// [`limits::PROBE_MAX_RANGES`](super::limits::PROBE_MAX_RANGES).
        ranges: Vec<(u32, [u8; 16])>,
    },
    /// Source: does the target hold pages with these hashes elsewhere?
    Query {
        /// Number of the first question, counted from 0.
        first: u32,
        /// First bytes of the page hashes.
        prefixes: Vec<[u8; 8]>,
    },
    /// Target: the answers to one Query, in its order.
    Known {
        /// Number of the first question.
        first: u32,
        /// By which number the page can be named; `None` when it is not held.
        numbers: Vec<Option<u32>>,
    },
    /// Target: references of a batch did not resolve; nothing of it is applied.
    Missing {
        /// Pages to send again, at most [`limits::MISSING_MAX_RUNS`](super::limits::MISSING_MAX_RUNS) runs.
        runs: Vec<PageRun>,
    },
    /// Target: lane bytes applied so far, per lane, since the connection began.
    Progress {
        /// Applied bytes of each lane, batch frames included.
        applied_bytes: [u64; crate::block::LANES],
    },
    /// Target: everything before barrier `barrier` on all lanes is applied.
    Applied {
        /// Number of the barrier, counted from 1.
        barrier: u32,
    },
    /// Source: its guest is stopped; what is outside the data path (the overlay) may move.
    Stopped,
    /// Source: a piece of device state, in order, zstd-compressed as one frame per piece.
    Tail {
        /// Compressed bytes.
        data: Bytes,
        /// Bytes after decompression, at most [`limits::FRAME_MAX_BYTES`](super::limits::FRAME_MAX_BYTES).
        raw_len: u32,
    },
    /// Source: all pages and all device state are out.
    Final {
        /// Root over the source's ledger.
        root: Root,
        /// Barrier that closes the last round.
        barrier: u32,
        /// Total bytes of device state.
        tail_bytes: u64,
        /// Missing frames that this side has taken: while the target has sent more, another Final
        /// follows.
        missing_taken: u32,
        /// Pages that the Absent frames have named; 0 when nothing is left for post-copy.
        absent_pages: u64,
    },
    /// Pages that the target does not hold, in post-copy. Source: before Final. Target: on a new
    /// connection, once for all.
    Absent {
        /// Ranges with such pages, ascending; at most
        /// [`limits::ABSENT_MAX_RANGES`](super::limits::ABSENT_MAX_RANGES).
        ranges: Vec<AbsentRange>,
        /// Another Absent follows.
        more: bool,
    },
    /// Target: its guest waits for these pages. In the order of the faults.
    Wanted {
        /// At most [`limits::MISSING_MAX_RUNS`](super::limits::MISSING_MAX_RUNS) runs.
        runs: Vec<PageRun>,
    },
    /// Source: wanted pages and their neighbours, outside of the lanes.
    Urgent {
        /// Over the runs and the pages' hashes.
        digest: [u8; 16],
        /// At most [`limits::URGENT_MAX_PAGES`](super::limits::URGENT_MAX_PAGES) pages in all.
        runs: Vec<PageRun>,
        /// Their content in order, one zstd frame.
        data: Bytes,
    },
    /// Target: its QEMU has every page.
    AllPages,
    /// Target: device state loaded, guest paused, memory proved, mapping closed.
    Loaded {
        /// Root over the target's ledger.
        root: Root,
    },
    /// Source: the point of no return.
    Commit {
        /// The attempt.
        attempt: AttemptId,
        /// The target process that said Loaded.
        target_incarnation: u64,
        /// Root that both sides agreed on.
        root: Root,
        /// What the guest did before the move.
        run_state: RunState,
    },
    /// Target: the guest is there.
    Running,
    /// Target's durable answer, and the reply to `Ask`.
    Answer {
        /// The attempt.
        attempt: AttemptId,
        /// What the speaker durably knows.
        verdict: Verdict,
        /// Epoch of the VM at the speaker.
        epoch: u64,
    },
    /// What do you know of this attempt? (status dialogue)
    Ask {
        /// The attempt.
        attempt: AttemptId,
        /// The speaker's own verdict.
        verdict: Verdict,
        /// Epoch of the VM at the speaker.
        epoch: u64,
    },
    /// The speaker's journal has closed the attempt.
    Settled {
        /// The attempt.
        attempt: AttemptId,
    },
    /// The attempt ends here; the guest stays at (or goes back to) the source.
    Abort {
        /// Reason class.
        code: AbortCode,
        /// Text for the operator, at most `TEXT_MAX_BYTES`.
        detail: String,
    },
}

impl Frame {
    /// Name of the frame, for logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Frame::Hello(_) => "Hello",
            Frame::Ready { .. } => "Ready",
            Frame::Layout { .. } => "Layout",
            Frame::Relay => "Relay",
            Frame::Basis { .. } => "Basis",
            Frame::LayoutTaken { .. } => "LayoutTaken",
            Frame::Probe { .. } => "Probe",
            Frame::Query { .. } => "Query",
            Frame::Known { .. } => "Known",
            Frame::Missing { .. } => "Missing",
            Frame::Progress { .. } => "Progress",
            Frame::Applied { .. } => "Applied",
            Frame::Stopped => "Stopped",
            Frame::Tail { .. } => "Tail",
            Frame::Final { .. } => "Final",
            Frame::Loaded { .. } => "Loaded",
            Frame::Commit { .. } => "Commit",
            Frame::Running => "Running",
            Frame::Answer { .. } => "Answer",
            Frame::Ask { .. } => "Ask",
            Frame::Settled { .. } => "Settled",
            Frame::Abort { .. } => "Abort",
            Frame::Absent { .. } => "Absent",
            Frame::Wanted { .. } => "Wanted",
            Frame::Urgent { .. } => "Urgent",
            Frame::AllPages => "AllPages",
        }
    }
}
