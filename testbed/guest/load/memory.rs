//! Pages whose whole content follows from (seed, page, version), so that each can be recomputed.

const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// Which pages are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Pattern {
    /// Every page with equal chance.
    Random,
    /// Nine writes of ten go to the first tenth of the pages.
    Hot,
    /// One after the other, round and round.
    Sequential,
}

/// A working set, its version table, and the choice of the next page.
#[derive(Debug)]
pub(crate) struct Memory {
    words: Vec<u64>,
    /// Words before the first aligned page.
    skip: usize,
    versions: Vec<u32>,
    seed: u64,
    random_words: usize,
    pattern: Pattern,
    choice: u64,
    next_written: usize,
    next_checked: usize,
}

impl Memory {
    /// Takes the memory; no page is filled yet.
    pub(crate) fn new(pages: usize, seed: u64, entropy_percent: usize, pattern: Pattern) -> Self {
        // One page more than asked, so that the pages proper can start on a page boundary.
        let words = vec![0_u64; (pages + 1) * PAGE_WORDS];
        let skip = words.as_ptr().align_offset(PAGE_BYTES);
        Self {
            words,
            skip,
            versions: vec![0; pages],
            seed,
            random_words: PAGE_WORDS * entropy_percent / 100,
            pattern,
            choice: mix(seed ^ 0x5eed),
            next_written: 0,
            next_checked: 0,
        }
    }

    /// Number of pages in the working set.
    pub(crate) fn pages(&self) -> usize {
        self.versions.len()
    }

    /// Gives one page its next version and content.
    pub(crate) fn write(&mut self, page: usize) {
        self.versions[page] = self.versions[page].wrapping_add(1);
        let content = Content::new(self.seed, page, self.versions[page], self.random_words);
        for (word, value) in self.page_mut(page).iter_mut().zip(content) {
            *word = value;
        }
    }

    /// Writes the page that the pattern says is next.
    pub(crate) fn write_next(&mut self) {
        let pages = self.pages();
        self.choice = mix(self.choice);
        let page = match self.pattern {
            Pattern::Random => below(self.choice, pages),
            Pattern::Hot if self.choice % 10 < 9 => below(self.choice, pages.div_ceil(10)),
            Pattern::Hot => below(self.choice, pages),
            Pattern::Sequential => self.next_written,
        };
        self.next_written = (self.next_written + 1) % pages;
        self.write(page);
    }

    /// Whether a page holds exactly what its version says.
    pub(crate) fn is_right(&self, page: usize) -> bool {
        let content = Content::new(self.seed, page, self.versions[page], self.random_words);
        let start = self.skip + page * PAGE_WORDS;
        self.words[start..start + PAGE_WORDS]
            .iter()
            .zip(content)
            .all(|(word, value)| *word == value)
    }

    /// Checks the next page of the endless sweep: (right, this ended a sweep).
    pub(crate) fn check_next(&mut self) -> (bool, bool) {
        let right = self.is_right(self.next_checked);
        self.next_checked = (self.next_checked + 1) % self.pages();
        (right, self.next_checked == 0)
    }

    fn page_mut(&mut self, page: usize) -> &mut [u64] {
        let start = self.skip + page * PAGE_WORDS;
        &mut self.words[start..start + PAGE_WORDS]
    }
}

/// The words of one page: random ones first, then one word repeated (the compressible share).
#[derive(Debug)]
struct Content {
    state: u64,
    random_left: usize,
    repeated: u64,
}

impl Content {
    fn new(seed: u64, page: usize, version: u32, random_words: usize) -> Self {
        let page = u64::try_from(page).unwrap_or(u64::MAX);
        let state = mix(mix(seed ^ (page << 1)) ^ u64::from(version));
        Self {
            state,
            random_left: random_words,
            repeated: mix(state),
        }
    }
}

impl Iterator for Content {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.random_left == 0 {
            return Some(self.repeated);
        }
        self.random_left -= 1;
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        Some(mix(self.state))
    }
}

/// The finaliser of splitmix64: a bijection that spreads every bit.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30))
        .wrapping_mul(0xbf58_476d_1ce4_e5b9)
        .wrapping_add(1);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A number below `limit`.
fn below(random: u64, limit: usize) -> usize {
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    usize::try_from((random >> 16) % limit).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every written page checks right; one changed bit is found; no two pages are equal.
    #[test]
    fn pages_check_themselves() {
        for pattern in [Pattern::Random, Pattern::Hot, Pattern::Sequential] {
            let mut memory = Memory::new(64, 7, 50, pattern);
            (0..64).for_each(|page| memory.write(page));
            (0..1000).for_each(|_| memory.write_next());
            assert!((0..64).all(|page| memory.is_right(page)));
            let first = memory.page_mut(1).to_vec();
            assert_ne!(first, memory.page_mut(2).to_vec());
            memory.page_mut(5)[511] ^= 1;
            assert_eq!((0..64).filter(|page| !memory.is_right(*page)).count(), 1);
        }
    }

    /// A page with no entropy still differs from its neighbours and from its other versions.
    #[test]
    fn compressible_pages_differ() {
        let mut memory = Memory::new(2, 1, 0, Pattern::Sequential);
        memory.write(0);
        memory.write(1);
        let old = memory.page_mut(0).to_vec();
        assert_ne!(old, memory.page_mut(1).to_vec());
        memory.write(0);
        assert_ne!(old, memory.page_mut(0).to_vec());
    }
}
