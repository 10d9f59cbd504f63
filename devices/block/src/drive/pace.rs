//! How fast copies may go, and how fast they do. Nobody asks a clock here: the time is passed in.

use std::time::{Duration, Instant};

/// How much may be copied in one go before a limit is felt.
const BURST: Duration = Duration::from_millis(100);
/// How long a rate is measured for one sample, and how much of the older ones is kept.
const SAMPLE: Duration = Duration::from_millis(100);
const KEPT: f64 = 0.7;

/// A limit in bytes per second; zero is none.
#[derive(Debug, Default)]
pub(super) struct SpeedLimit {
    speed: u64,
    /// When what was spent is paid for.
    paid: Option<Instant>,
}

impl SpeedLimit {
    /// Changes the limit; what was spent under the old one is forgotten.
    pub(super) fn set(&mut self, speed: u64) {
        (self.speed, self.paid) = (speed, None);
    }

    /// Bytes per second, zero for no limit.
    pub(super) fn speed(&self) -> u64 {
        self.speed
    }

    /// The most that one copy should be, so that a slow job goes in small steps.
    pub(super) fn step(&self) -> u64 {
        if self.speed == 0 { u64::MAX } else { (self.speed / 10).max(1) }
    }

    /// When the next copy may begin; `None`: at once.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        self.paid.filter(|paid| self.speed > 0 && *paid > now)
    }

    /// A copy of so many bytes begins.
    pub(super) fn spend(&mut self, bytes: u64, now: Instant) {
        if self.speed == 0 {
            return;
        }
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = self.paid.map_or(now, |paid| paid.max(earliest));
        // A day of waiting is as good as a century: `set` ends it.
        let price = Duration::try_from_secs_f64(ratio(bytes, self.speed)).unwrap_or(Duration::MAX);
        self.paid = from.checked_add(price.min(Duration::from_secs(86_400)));
    }
}

/// A moving average of bytes per second, from a number that only grows.
#[derive(Debug, Default)]
pub(super) struct Meter {
    since: Option<(Instant, u64)>,
    rate: Option<f64>,
}

impl Meter {
    /// What the number is now.
    pub(super) fn sample(&mut self, now: Instant, total: u64) {
        let Some((start, before)) = self.since else {
            self.since = Some((now, total));
            return;
        };
        let elapsed = now.saturating_duration_since(start);
        if elapsed < SAMPLE {
            return;
        }
        let rate = ratio(total.saturating_sub(before), 1) / elapsed.as_secs_f64();
        self.rate = Some(self.rate.map_or(rate, |old| old * KEPT + rate * (1.0 - KEPT)));
        self.since = Some((now, total));
    }

    /// Time in which nothing can happen does not count.
    pub(super) fn rest(&mut self) {
        self.since = None;
    }

    /// Bytes per second, once there is an idea of it.
    pub(super) fn rate(&self) -> Option<f64> {
        self.rate
    }
}

/// How long so many bytes take at a rate, if they ever end.
pub(super) fn duration(bytes: u64, rate: f64) -> Option<Duration> {
    if bytes == 0 {
        return Some(Duration::ZERO);
    }
    if rate > 0.0 { Duration::try_from_secs_f64(ratio(bytes, 1) / rate).ok() } else { None }
}

/// A rate as a number.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of floats saturates")]
pub(super) fn whole(rate: f64) -> u64 {
    rate as u64
}

#[expect(clippy::cast_precision_loss, reason = "rates are estimates")]
fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// How much goes through in five seconds, asked every so often.
    fn copied(limit: &mut SpeedLimit, step: u64, every: Duration) -> u64 {
        let start = Instant::now();
        let (mut now, mut total) = (start, 0);
        while now < start + Duration::from_secs(5) {
            while limit.wait(now).is_none() && total < 1 << 40 {
                limit.spend(step, now);
                total += step;
            }
            now += every;
        }
        total
    }

    #[test]
    fn a_limit_is_kept_however_often_it_is_asked() {
        for every in [1, 10, 99] {
            for step in [65_536, MIB] {
                let mut limit = SpeedLimit::default();
                limit.set(MIB);
                let total = copied(&mut limit, step, Duration::from_millis(every));
                assert!((9 * MIB / 2..=6 * MIB + step).contains(&total), "{total} bytes at 1 MiB/s in 5 s");
            }
        }
    }

    #[test]
    fn no_limit_is_no_limit_and_a_new_one_forgets_the_old() {
        let mut limit = SpeedLimit::default();
        assert!(copied(&mut limit, MIB, Duration::from_secs(1)) >= 1 << 40);
        limit.set(1);
        let now = Instant::now();
        limit.spend(u64::MAX, now);
        assert!(limit.wait(now + Duration::from_secs(3600)).is_some());
        limit.set(MIB);
        assert_eq!(limit.wait(now), None);
    }

    #[test]
    fn a_rate_is_an_average_of_samples() {
        let mut meter = Meter::default();
        let start = Instant::now();
        for tenths in 0..100_u32 {
            meter.sample(start + tenths * SAMPLE, u64::from(tenths) * 1000);
        }
        let rate = meter.rate().unwrap();
        assert!((9_999.0..10_001.0).contains(&rate), "{rate}");
        assert_eq!(duration(20_000, 10_000.0), Some(Duration::from_secs(2)));
        assert_eq!((duration(1, 0.0), duration(0, 0.0)), (None, Some(Duration::ZERO)));
    }
}
