//! What an encoder draws on.

use super::{Contents, CopyIndex, KnownTable, Replica};

/// What an encoder may draw on for one call.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The pages as they are.
    pub contents: &'a dyn Contents,
    /// The pages as last sent: bases of deltas. What is sent is written there.
    pub replica: Option<&'a dyn Replica>,
    /// Content that the target has in the image; `None` in the last round (S10). Every lane adds
    /// to it what it sends.
    pub copies: Option<&'a CopyIndex>,
    /// Content that the target has outside the image; `None` in the last round (S10).
    pub known: Option<&'a KnownTable>,
}

impl<'a> Sources<'a> {
    /// Nothing but the pages themselves.
    pub fn of(contents: &'a dyn Contents) -> Self {
        Self {
            contents,
            replica: None,
            copies: None,
            known: None,
        }
    }
}

impl std::fmt::Debug for Sources<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources")
            .field("replica", &self.replica.is_some())
            .field("copies", &self.copies.is_some())
            .field("known", &self.known.is_some())
            .finish_non_exhaustive()
    }
}
