//! Pages whose content the target has already: nothing is sent. QEMU announces many pages again
//! that did not change.

use super::{LedgerPart, PageAddress, PageHash};

/// Whether the page's last announced content is this one. The target needs no counterpart: its
/// ledger and memory keep what they have.
pub(super) fn is_same(ledger: &LedgerPart, at: PageAddress, hash: PageHash) -> bool {
    ledger.get(at).is_some_and(|(known, _)| known == hash)
}
