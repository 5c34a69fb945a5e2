//! Every limit of the protocol, in one place.

/// Largest control frame, header included, in bytes.
pub const FRAME_MAX_BYTES: usize = 1 << 20;
/// Largest batch on a lane, header included, in bytes (256 KiB of raw pages and their records).
pub const BATCH_MAX_BYTES: usize = 320 * 1024;
/// Most pages that one batch may carry as literal or raw.
pub const BATCH_MAX_PAGES: usize = 64;
/// Most records of one batch, and most zero pages that an encoder puts into one.
pub const BATCH_MAX_RECORDS: usize = 1024;
/// Most RAM blocks of a guest.
pub const BLOCKS_MAX: usize = 1024;
/// Most bytes of device state and of stream head.
pub const TAIL_MAX_BYTES: u64 = 256 << 20;
/// Most bytes of the stream's head (header and configuration).
pub const HEAD_MAX_BYTES: usize = 64 * 1024;
/// Longest VM name, machine type, detail text, in bytes.
pub const TEXT_MAX_BYTES: usize = 1024;
/// Most ranges that a basis may have (8 TiB of guest memory).
pub const BASIS_MAX_RANGES: u32 = 1 << 22;
/// Most digests of one Basis frame.
pub const BASIS_MAX_DIGESTS: usize = 1 << 15;
/// Most questions of one Query frame.
pub const QUERY_MAX_PAGES: usize = 1 << 13;
/// Most runs of one Missing frame.
pub const MISSING_MAX_RUNS: usize = 1 << 10;
/// Most ranges of one Probe frame.
pub const PROBE_MAX_RANGES: usize = 1 << 12;
/// Most bytes of filler that a target takes on the lanes of one probe.
pub const PROBE_MAX_BYTES: u64 = 1 << 30;
/// Most questions that a target answers in one probe.
pub const PROBE_MAX_QUESTIONS: u64 = 1 << 16;
/// Longest probe that a target answers, in milliseconds.
pub const PROBE_MAX_MS: u64 = 8_000;
/// Most ranges of one Absent frame.
pub const ABSENT_MAX_RANGES: usize = 1 << 13;
/// Most pages of one Urgent frame.
pub const URGENT_MAX_PAGES: usize = 64;
