//! The only source of chance in a machine: SplitMix64 over a seed that was handed in.

use std::time::Duration;

#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between three quarters of `base` and the whole of it, so that rooms do not wake in step.
    pub fn jitter(&mut self, base: Duration) -> Duration {
        let quarter = base / 4;
        let millis = u64::try_from(quarter.as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        base - Duration::from_millis(self.draw() % millis)
    }
}
