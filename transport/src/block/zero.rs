//! Pages of zeros: one record for a run, no payload.

use std::io;

use super::{PAGE_SIZE, PageAddress, Sink};

/// Whether a page holds nothing but zeros.
pub(super) fn is_zero(content: &[u8; PAGE_SIZE]) -> bool {
    // Groups of 64 bytes compile to a few wide ORs, and most other pages end at the first group.
    content
        .chunks_exact(64)
        .all(|group| group.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Writes a run of zero pages.
pub(super) fn restore(first: PageAddress, count: u32, sink: &mut dyn Sink) -> io::Result<()> {
    sink.zero(first, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any single bit makes a page something else.
    #[test]
    fn one_bit_is_seen() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for place in [0, 1, 63, 64, 2048, PAGE_SIZE - 1] {
            let mut page = [0; PAGE_SIZE];
            page[place] = 0x80;
            assert!(!is_zero(&page), "bit at {place}");
        }
    }
}
