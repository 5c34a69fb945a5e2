//! What is wrong with a lane's bytes.

use super::PageAddress;
use crate::wire::limits::{BATCH_MAX_PAGES, BATCH_MAX_RECORDS};

/// Why a lane's bytes were not applied.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The stream was opened for another lane.
    #[error("peer opened lane {found} where lane {expected} belongs")]
    PeerLane {
        /// Lane of this decoder.
        expected: usize,
        /// Lane in the header.
        found: usize,
    },
    /// The stream belongs to another, usually an older, connection.
    #[error("lane of incarnation {found:016x}; this connection is {expected:016x}")]
    PeerIncarnation {
        /// Incarnation of this connection.
        expected: u64,
        /// Incarnation in the header.
        found: u64,
    },
    /// A batch came before the lane's header.
    #[error("peer sent a batch before the lane's header")]
    PeerNoHeader,
    /// A batch is left out or came twice, or has a number that none may have.
    #[error("peer sent batch {found} where batch {expected} belongs")]
    PeerSequence {
        /// Number that was due.
        expected: u32,
        /// Number in the batch.
        found: u32,
    },
    /// The batch ends inside its head or its records.
    #[error("peer sent a batch of {0} bytes that ends too early")]
    PeerTruncated(usize),
    /// No record, or more than the limit.
    #[error("peer sent a batch of {0} records; 1 to {BATCH_MAX_RECORDS} are allowed")]
    PeerRecordCount(u16),
    /// An encoding that this version does not have.
    #[error("peer sent a record of unknown encoding {0}")]
    PeerEncoding(u8),
    /// A run of no page, or one that leaves its range or block, or a page that does not exist.
    #[error(
        "peer sent a run of {count} pages at {first:?} that is not within one range of the image"
    )]
    PeerOutside {
        /// Begin of the run.
        first: PageAddress,
        /// Pages of the run.
        count: u16,
    },
    /// A page that another lane owns.
    #[error("peer sent page {at:?} of lane {owner} on lane {lane}")]
    PeerForeignLane {
        /// The page.
        at: PageAddress,
        /// Lane that owns it.
        owner: usize,
        /// Lane that it came on.
        lane: usize,
    },
    /// Runs overlap or do not ascend.
    #[error("peer sent page {0:?} out of order")]
    PeerOrder(PageAddress),
    /// More pages with content than a batch may have.
    #[error("peer sent {0} pages with content in one batch; the limit is {BATCH_MAX_PAGES}")]
    PeerTooManyPages(usize),
    /// Records and payload do not fit together.
    #[error("peer sent {found} bytes of payload where the records announce {expected}")]
    PeerPayload {
        /// Bytes that the records announce.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// A run copies pages that the image does not have.
    #[error("peer sent a copy of {count} pages from {base:?}, which are not in the image")]
    PeerCopyOutside {
        /// Begin of the run that is copied.
        base: PageAddress,
        /// Pages of the run.
        count: u16,
    },
    /// A run of known pages goes beyond the last number.
    #[error("peer sent a run of {count} known pages from number {first} on")]
    PeerKnownOutside {
        /// First number.
        first: u32,
        /// Pages of the run.
        count: u16,
    },
    /// The changed pages are no frame of the announced size.
    #[error("peer sent changed pages that do not unpack to {0} pages")]
    PeerDelta(usize),
    /// The compressed pages are no frame of the announced size.
    #[error("peer sent compressed pages that do not unpack to {0} pages")]
    PeerLiteral(usize),
    /// The decoded pages are not the ones that the source encoded, and none of them drew on what
    /// this side holds.
    #[error("batch {seq} does not match its digest")]
    PeerDigest {
        /// Number of the batch.
        seq: u32,
    },
    /// The sink failed.
    #[error("a page could not be written")]
    LocalSink(#[source] std::io::Error),
}
