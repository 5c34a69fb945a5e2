//! What the source's tables and buffers may take, out of `--memory-max`.

/// Lanes, workers, QUIC and the program itself: measured at 25 MiB with level 3.
const BASE_MIB: u32 = 32;
/// What eight encoders take at a level, beyond that of level 3: the larger windows of zstd.
const LEVELS_MIB: [(i32, u32); 3] = [(6, 16), (9, 32), (12, 64)];
/// Entries of the table of known pages: 18 bytes each, a third more for free places.
const KNOWN_ENTRY_BYTES: u64 = 27;

/// The parts of one budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryBudget {
    /// The index of content that was sent.
    pub(crate) copies_bytes: usize,
    /// Answers of the target that are kept.
    pub(crate) known_entries: usize,
    /// Bytes under way at most.
    pub(crate) flight_bytes: u64,
    /// Highest zstd level.
    pub(crate) level_max: i32,
}

impl MemoryBudget {
    /// Splits what the base leaves: an eighth for each table, a quarter for the flight, half for the
    /// compressor.
    pub(crate) fn of(memory_max_mib: u32) -> MemoryBudget {
        let left_mib = memory_max_mib.saturating_sub(BASE_MIB);
        let part = |mib: u32| u64::from(mib) << 20;
        let table = part(left_mib / 8);
        let affordable = LEVELS_MIB
            .into_iter()
            .rev()
            .find(|(_, mib)| *mib <= left_mib / 2);
        MemoryBudget {
            copies_bytes: usize::try_from(table).unwrap_or(usize::MAX),
            known_entries: usize::try_from(table / KNOWN_ENTRY_BYTES).unwrap_or(usize::MAX),
            flight_bytes: part(left_mib / 4).max(2 << 20),
            level_max: affordable.map_or(3, |(level, _)| level),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts never exceed the whole, and the default allows every level.
    #[test]
    fn parts_fit_the_whole() {
        for mib in [48, 64, 96, 160, 1024] {
            let budget = MemoryBudget::of(mib);
            let known = budget.known_entries as u64 * KNOWN_ENTRY_BYTES;
            let tables = budget.copies_bytes as u64 + known;
            let level = LEVELS_MIB
                .iter()
                .find(|(level, _)| *level == budget.level_max)
                .map_or(0, |(_, mib)| u64::from(*mib) << 20);
            let all = tables + budget.flight_bytes + level + (u64::from(BASE_MIB) << 20);
            assert!(all <= u64::from(mib) << 20, "{mib} MiB: {budget:?}");
        }
        assert_eq!(MemoryBudget::of(160).level_max, 12);
        assert_eq!(MemoryBudget::of(48).level_max, 3);
    }
}
