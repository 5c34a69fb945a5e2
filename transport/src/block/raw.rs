//! Pages that do not shrink: sent as they are.

use super::PAGE_SIZE;

/// Bytes looked at first.
const GLANCE: usize = 256;
/// 256 random bytes hold 162 +- 6 different values; text and heap pages stay far below.
const GLANCE_DISTINCT_MIN: u32 = 138;
/// Chi-square of 1024 bytes against an even distribution is 255 +- 23 for random bytes.
const CHI_SQUARE_MAX: u32 = 370;
/// Pairs among the 512 words of a page that meet in a table of 8192 bits: 16 +- 4 by chance.
const REPEATED_WORDS_MAX: u32 = 48;

/// Whether compression is not worth a try: bytes evenly spread and no word repeated. About a
/// microsecond, where zstd would take ten; pages like these beside compressible ones would also
/// spoil the entropy tables of the whole frame.
pub(super) fn looks_random(page: &[u8; PAGE_SIZE]) -> bool {
    distinct_values(&page[PAGE_SIZE / 2..PAGE_SIZE / 2 + GLANCE]) >= GLANCE_DISTINCT_MIN
        && is_evenly_spread(page)
        && repeated_words(page) <= REPEATED_WORDS_MAX
}

fn distinct_values(bytes: &[u8]) -> u32 {
    let mut seen = [0_u64; 4];
    for byte in bytes {
        seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }
    seen.iter().map(|word| word.count_ones()).sum()
}

/// Chi-square test over four groups of 256 bytes from all over the page.
fn is_evenly_spread(page: &[u8; PAGE_SIZE]) -> bool {
    let mut counts = [0_u32; 256];
    for group in page.chunks_exact(PAGE_SIZE / 4) {
        for byte in &group[..256] {
            counts[usize::from(*byte)] += 1;
        }
    }
    // sum((count - 4)^2 / 4) = sum(count^2) / 4 - 1024
    let squares: u32 = counts.iter().map(|count| count * count).sum();
    squares / 4 <= CHI_SQUARE_MAX + 1024
}

/// Words of eight bytes that meet an earlier one of the page in a small table.
fn repeated_words(page: &[u8; PAGE_SIZE]) -> u32 {
    let mut table = [0_u64; 128];
    let mut repeated = 0;
    for word in page.chunks_exact(8) {
        let word = u64::from_le_bytes(*word.first_chunk().expect("a chunk of eight"));
        let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 51;
        let bit = 1 << (mixed & 63);
        let cell = &mut table[usize::try_from(mixed >> 6).expect("seven bits")];
        repeated += u32::from(*cell & bit != 0);
        *cell |= bit;
    }
    repeated
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random_page(mut state: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        for word in page.chunks_exact_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let mixed = (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.copy_from_slice(&(mixed ^ (mixed >> 32)).to_le_bytes());
        }
        page
    }

    /// Random pages are seen as such, nearly all of them.
    #[test]
    fn random_pages_go_raw() {
        let raw = (0..1000)
            .filter(|seed| looks_random(&random_page(seed * 77 + 5)))
            .count();
        assert!(raw >= 990, "{raw} of 1000");
    }

    /// Pages that zstd can shrink are left to zstd.
    #[test]
    fn compressible_pages_do_not() {
        let mut text = [0; PAGE_SIZE];
        for (place, byte) in text.iter_mut().enumerate() {
            *byte = b"the quick brown fox jumps over the lazy dog"[place * 7 % 43];
        }
        assert!(!looks_random(&text));
        // Half random, half zero.
        let mut half = random_page(1);
        half[..PAGE_SIZE / 2].fill(0);
        assert!(!looks_random(&half));
        // High entropy, but the same KiB four times.
        let mut repeated = random_page(2);
        repeated.copy_within(..1024, 1024);
        repeated.copy_within(..2048, 2048);
        assert!(!looks_random(&repeated));
    }
}
