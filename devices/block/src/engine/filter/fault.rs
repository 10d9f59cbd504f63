//! What is to go wrong with a disk's operations, by rules: for users who test what their guests and their own programs
//! make of it. Pure.

use std::time::Duration;

use crate::engine::Operation;
use crate::engine::memory;
use crate::errno::Errno;

/// Rules that one disk can have.
pub const MAX_RULES: usize = 64;
/// Longest delay: whoever stops a VM waits for it.
pub const MAX_DELAY: Duration = Duration::from_secs(30);
/// Unit of [`FaultRule::sectors`].
const SECTOR: u64 = 512;

/// Operations that a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOperation {
    /// All of these.
    Any,
    /// Reads.
    Read,
    /// Writes of data.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Zeroes, unmapping or not.
    Zeroes,
    /// What changes the disk: it is kept in memory until it is flushed, and lost with the process when that is killed. A
    /// disk that writes through ([`Cache::Writethrough`](crate::Cache::Writethrough)) loses nothing, and one that knows
    /// no flush ([`Cache::Unsafe`](crate::Cache::Unsafe)) everything. See [`MAX_UNFLUSHED`](crate::MAX_UNFLUSHED).
    VolatileCache,
}

/// When something goes wrong, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultRule {
    /// With which operations.
    pub operation: FaultOperation,
    /// First and last sector of 512 bytes: only operations that touch one of them. Flushes touch none.
    pub sectors: Option<(u64, u64)>,
    /// Lets so many matching operations pass before.
    pub after: u64,
    /// How often; 0 is for ever.
    pub count: u64,
    /// It takes so much longer; at most [`MAX_DELAY`].
    pub delay: Duration,
    /// Only so many bytes of a write land: all that was written when the power went.
    pub torn: Option<u64>,
    /// It fails; without [`Self::torn`] nothing is done.
    pub errno: Option<Errno>,
    /// Of [`FaultOperation::VolatileCache`]: a part of what was not flushed reaches the disk early, in any order and
    /// perhaps torn between sectors. Which part, this decides, as far as timing does not.
    pub seed: Option<u64>,
}

impl FaultRule {
    /// A rule about all such operations that changes nothing yet.
    pub fn new(operation: FaultOperation) -> Self {
        let delay = Duration::ZERO;
        Self { operation, sectors: None, after: 0, count: 0, delay, torn: None, errno: None, seed: None }
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), RuleError> {
        if self.operation == FaultOperation::VolatileCache {
            let plain = Self { seed: self.seed, ..Self::new(self.operation) };
            return if *self == plain { Ok(()) } else { Err(RuleError::Cache) };
        }
        if self.seed.is_some() {
            return Err(RuleError::Seed);
        }
        if self.delay.is_zero() && self.torn.is_none() && self.errno.is_none() {
            return Err(RuleError::NoEffect);
        }
        if self.delay > MAX_DELAY {
            return Err(RuleError::Delay);
        }
        if self.torn.is_some() && self.operation != FaultOperation::Write {
            return Err(RuleError::Torn);
        }
        match self.sectors {
            Some((first, last)) if first > last => Err(RuleError::Sectors),
            Some(_) if self.operation == FaultOperation::Flush => Err(RuleError::FlushSectors),
            _ => Ok(()),
        }
    }

    fn matches(&self, operation: &Operation) -> bool {
        use FaultOperation as F;
        let (kind, range) = match operation {
            Operation::Read { offset, buffers } => (F::Read, Some((*offset, memory::total(buffers)))),
            Operation::Write { offset, buffers } => (F::Write, Some((*offset, memory::total(buffers)))),
            Operation::Flush => (F::Flush, None),
            Operation::Discard { offset, length } => (F::Discard, Some((*offset, Some(*length)))),
            Operation::WriteZeroes { offset, length, .. } => (F::Zeroes, Some((*offset, Some(*length)))),
            // A question.
            Operation::Extent { .. } => return false,
        };
        let touches = |(first, last): (u64, u64)| {
            let Some((offset, length)) = range else { return false };
            let end = offset.saturating_add(length.unwrap_or(u64::MAX));
            offset < end && offset / SECTOR <= last && (end - 1) / SECTOR >= first
        };
        let about = match self.operation {
            F::Any => true,
            F::VolatileCache => matches!(kind, F::Write | F::Discard | F::Zeroes),
            operation => operation == kind,
        };
        about && self.sectors.is_none_or(touches)
    }
}

/// A rule that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// It does nothing.
    #[error("A fault needs an errno, a delay or a torn write")]
    NoEffect,
    /// Too slow.
    #[error("A fault delays by at most {} ms", MAX_DELAY.as_millis())]
    Delay,
    /// Only data can be torn.
    #[error("Only writes can be torn")]
    Torn,
    /// An empty range.
    #[error("The last sector of a fault is before its first")]
    Sectors,
    /// Flushes are about the whole disk.
    #[error("A flush has no sectors")]
    FlushSectors,
    /// It is about all of the disk.
    #[error("A volatile cache takes a seed and nothing else")]
    Cache,
    /// Nothing else is left to chance.
    #[error("Only a volatile cache takes a seed")]
    Seed,
    /// One is enough.
    #[error("There is a volatile cache already")]
    TwoCaches,
    /// Too many.
    #[error("A disk has at most {MAX_RULES} faults")]
    TooMany,
}

/// A rule at work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultStatus {
    /// Names it on this disk; never used again.
    pub id: u64,
    /// What it says.
    pub rule: FaultRule,
    /// Operations it was about, the ones before [`FaultRule::after`] included.
    pub matched: u64,
    /// Operations that suffered it.
    pub hits: u64,
}

impl FaultStatus {
    fn is_spent(&self) -> bool {
        self.rule.count > 0 && self.hits >= self.rule.count
    }
}

/// A disk's rules, in the order they were added.
#[derive(Debug, Default)]
pub(super) struct Rules {
    rules: Vec<FaultStatus>,
    /// The last id given.
    last: u64,
}

impl Rules {
    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub(super) fn list(&self) -> Vec<FaultStatus> {
        self.rules.clone()
    }

    pub(super) fn add(&mut self, rule: FaultRule) -> Result<u64, RuleError> {
        rule.validate()?;
        if self.rules.len() >= MAX_RULES {
            return Err(RuleError::TooMany);
        }
        if rule.operation == FaultOperation::VolatileCache && self.cache().is_some() {
            return Err(RuleError::TwoCaches);
        }
        self.last += 1;
        self.rules.push(FaultStatus { id: self.last, rule, matched: 0, hits: 0 });
        Ok(self.last)
    }

    /// The volatile cache.
    pub(super) fn cache(&self) -> Option<&FaultRule> {
        let mut rules = self.rules.iter().map(|status| &status.rule);
        rules.find(|rule| rule.operation == FaultOperation::VolatileCache)
    }

    pub(super) fn remove(&mut self, id: u64) -> bool {
        let before = self.rules.len();
        self.rules.retain(|status| status.id != id);
        self.rules.len() < before
    }

    /// What an operation suffers: the first rule that is about it, is not spent and has seen enough. Counts. A volatile
    /// cache takes what is left of it.
    pub(super) fn judge(&mut self, operation: &Operation) -> Option<&FaultRule> {
        let concerned = |status: &&mut FaultStatus| !status.is_spent() && status.rule.matches(operation);
        for status in self.rules.iter_mut().filter(concerned) {
            status.matched += 1;
            if status.matched > status.rule.after {
                status.hits += 1;
                if status.rule.operation != FaultOperation::VolatileCache {
                    return Some(&status.rule);
                }
            }
        }
        None
    }
}
