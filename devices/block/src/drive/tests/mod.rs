//! Tests of drives: random schedules against devices that are made up, and real files.

mod device;
mod files;
mod model;
mod schedule;

pub(in crate::drive) struct Random(u64);

impl Random {
    /// From `SEED`, or the clock. The seed is printed.
    pub(in crate::drive) fn new() -> Self {
        Self::of(seed())
    }

    pub(in crate::drive) fn of(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            random.below(2);
        }
        random
    }

    /// 0 to `limit` - 1.
    pub(in crate::drive) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20) % limit.max(1)
    }

    pub(in crate::drive) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    pub(in crate::drive) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub(in crate::drive) fn among<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }
}

/// `SEED`, or something new, printed.
pub(in crate::drive) fn seed() -> u64 {
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_micros();
    let seed = std::env::var("SEED").map_or(u64::try_from(clock).unwrap(), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    seed
}
