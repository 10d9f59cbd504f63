//! How much a disk may do: leaky buckets with QEMU's meaning (its docs/throttle.txt). Pure: the time is passed in.
//!
//! ```text
//!   request of n bytes ─▶ ┌ total ┐  ┌ its direction's ┐     four buckets concern it: bytes and operations,
//!                         │ level │  │      level      │     each total and of its direction
//!                         └──╷╷───┘  └───────╷╷────────┘
//!                            ▼▼ leaks at the average rate
//! ```
//!
//! A request goes through while every level is within its bucket, and is then poured in whole: a level may rise beyond
//! the bucket, and what comes next waits until that has leaked away. So a request larger than the bucket is never stuck.

use std::time::{Duration, Instant};

/// Greatest rate, in bytes or operations per second (QEMU's `THROTTLE_VALUE_MAX`).
pub const MAX_RATE: u64 = 1_000_000_000_000_000;

/// A limit on bytes or operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Per second, in the long run; 0 is unlimited.
    pub average: u64,
    /// Per second, during a burst; 0 lets a tenth of a second's worth through at once.
    pub burst: u64,
    /// Seconds that a burst may last, ≥ 1; 1 lets a whole second's burst through at once.
    pub burst_length: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, burst: 0, burst_length: 1 }
    }
}

/// Limits for both directions together, or for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// Reads and writes together.
    pub total: Rate,
    /// Reads.
    pub read: Rate,
    /// Writes.
    pub write: Rate,
}

impl Rates {
    fn all(&self) -> [&Rate; 3] {
        [&self.total, &self.read, &self.write]
    }
}

/// What a disk may do per second. Flushes and discards are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThrottleLimits {
    /// Bytes.
    pub bytes: Rates,
    /// Operations.
    pub operations: Rates,
    /// A request of more bytes counts as several operations, in proportion; 0 counts each as one.
    pub operation_size: u64,
}

/// Limits that contradict themselves, in QEMU's words (`throttle_is_valid`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// Together and each.
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    TotalAndDirection,
    /// Nothing to measure by.
    #[error("iops size requires an iops value to be set")]
    SizeWithoutRate,
    /// Beyond [`MAX_RATE`].
    #[error("bps/iops/max values must be within [0, {MAX_RATE}]")]
    Range,
    /// No time for a burst.
    #[error("the burst length cannot be 0")]
    NoLength,
    /// A length without a burst.
    #[error("burst length set without burst rate")]
    LengthWithoutBurst,
    /// More than can be counted.
    #[error("burst length too high for this burst rate")]
    Length,
    /// A burst above nothing.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    BurstWithoutRate,
    /// A burst that is slower.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    SlowBurst,
}

impl ThrottleLimits {
    /// Whether they limit anything.
    pub fn is_limited(&self) -> bool {
        self.rates().any(|rate| rate.average > 0)
    }

    /// Whether they make sense.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), LimitsError> {
        let both = |rates: &Rates, value: fn(&Rate) -> u64| {
            value(&rates.total) > 0 && (value(&rates.read) > 0 || value(&rates.write) > 0)
        };
        for rates in [&self.bytes, &self.operations] {
            if both(rates, |rate| rate.average) || both(rates, |rate| rate.burst) {
                return Err(LimitsError::TotalAndDirection);
            }
        }
        if self.operation_size > 0 && self.operations.all().iter().all(|rate| rate.average == 0) {
            return Err(LimitsError::SizeWithoutRate);
        }
        self.rates().try_for_each(Rate::validate)
    }

    fn rates(&self) -> impl Iterator<Item = &Rate> {
        self.bytes.all().into_iter().chain(self.operations.all())
    }
}

impl Rate {
    fn validate(&self) -> Result<(), LimitsError> {
        let Self { average, burst, burst_length } = *self;
        if average > MAX_RATE || burst > MAX_RATE {
            return Err(LimitsError::Range);
        }
        if burst_length == 0 {
            return Err(LimitsError::NoLength);
        }
        if burst_length > 1 && burst == 0 {
            return Err(LimitsError::LengthWithoutBurst);
        }
        if burst > 0 && burst_length > MAX_RATE / burst {
            return Err(LimitsError::Length);
        }
        if burst > 0 && average == 0 {
            return Err(LimitsError::BurstWithoutRate);
        }
        if burst > 0 && burst < average { Err(LimitsError::SlowBurst) } else { Ok(()) }
    }
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    rate: Rate,
    /// Leaks at the average rate.
    level: f64,
    /// Leaks at the burst's rate: spreads a long burst evenly.
    burst_level: f64,
}

#[expect(clippy::cast_precision_loss, reason = "rates are at most MAX_RATE, far below 2⁵³")]
impl Bucket {
    fn new(rate: Rate) -> Self {
        Self { rate, ..Self::default() }
    }

    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.rate.average as f64 * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.rate.burst as f64 * seconds).max(0.0);
    }

    fn pour(&mut self, units: f64) {
        if self.rate.average > 0 {
            self.level += units;
            self.burst_level += units;
        }
    }

    /// Seconds until there is room.
    fn wait(&self) -> f64 {
        let Rate { average, burst, burst_length } = self.rate;
        if average == 0 {
            return 0.0;
        }
        let size = if burst > 0 { burst as f64 * burst_length as f64 } else { average as f64 / 10.0 };
        let long = ((self.level - size) / average as f64).max(0.0);
        if burst > 0 && burst_length > 1 {
            long.max((self.burst_level - burst as f64 / 10.0) / burst as f64)
        } else {
            long
        }
    }
}

/// What was done so far, against limits.
#[derive(Debug)]
pub(super) struct Account {
    limits: ThrottleLimits,
    /// Bytes then operations; total, read, write of each.
    buckets: [[Bucket; 3]; 2],
    leaked: Instant,
}

impl Account {
    pub(super) fn new(limits: ThrottleLimits, now: Instant) -> Self {
        let fill = |rates: &Rates| rates.all().map(|rate| Bucket::new(*rate));
        Self { limits, buckets: [fill(&limits.bytes), fill(&limits.operations)], leaked: now }
    }

    pub(super) fn limits(&self) -> &ThrottleLimits {
        &self.limits
    }

    /// How long the next request has to wait; zero lets it through.
    pub(super) fn wait(&mut self, direction: Direction, now: Instant) -> Duration {
        // Time that goes backwards stands still.
        let passed = now.saturating_duration_since(self.leaked).as_secs_f64();
        self.leaked = self.leaked.max(now);
        self.buckets.iter_mut().flatten().for_each(|bucket| bucket.leak(passed));
        let own = 1 + direction as usize;
        let waits = self.buckets.iter().flat_map(|kind| [kind[0].wait(), kind[own].wait()]);
        let seconds = waits.fold(0.0, f64::max);
        if seconds <= 0.0 {
            return Duration::ZERO;
        }
        // Rounded up, so that whoever waits that long finds room. Nobody counts on more than a century.
        Duration::from_secs_f64(seconds.min(3e9)) + Duration::from_micros(1)
    }

    /// A request goes through.
    #[expect(clippy::cast_precision_loss, reason = "a request is far below 2⁵³ bytes")]
    pub(super) fn pour(&mut self, direction: Direction, bytes: u64) {
        let size = self.limits.operation_size;
        let operations = if size > 0 && bytes > size { bytes as f64 / size as f64 } else { 1.0 };
        let own = 1 + direction as usize;
        for (kind, units) in self.buckets.iter_mut().zip([bytes as f64, operations]) {
            kind[0].pour(units);
            kind[own].pour(units);
        }
    }
}

#[cfg(test)]
mod tests;
