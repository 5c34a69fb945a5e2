//! A small seeded generator, so that a run can be repeated from its seed alone.

/// SplitMix64: eight bytes of state, passes the usual test batteries, not for secrets.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// A generator whose whole sequence follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// True with a probability of `share` (0 never, 1 always).
    ///
    /// A share of 0 draws nothing, so that a link without loss spends no randomness on it.
    pub fn chance(&mut self, share: f64) -> bool {
        if share <= 0.0 {
            return false;
        }
        // 53 bits fill the mantissa: the value is uniform in [0, 1).
        let uniform = (self.bits() >> 11) as f64 / (1u64 << 53) as f64;
        uniform < share
    }

    /// A uniform number from 0 to `max`, both included.
    pub fn up_to(&mut self, max: u64) -> u64 {
        let wide = u128::from(self.bits()) * (u128::from(max) + 1);
        u64::try_from(wide >> 64).expect("bits * (max + 1) is below 2^64 * (max + 1)")
    }
}
