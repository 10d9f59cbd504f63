//! Limits and faults of a disk: as keys of `--disk`, as `--fault`, as JSON, and as the monitor writes them.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use block::{Errno, FaultOperation, FaultRule, MAX_RULES, Rate, RuleError, ThrottleLimits};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::flags::{choice, items};
use super::parse_size;

/// The limits, by QEMU's names: bytes and operations per second, in all, read and written. Each has a `_max`, the rate of
/// a burst, and a `_max_length`, its seconds.
pub const LIMITS: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
/// The one that is none of these.
const OPERATION_SIZE: &str = "iops_size";

/// Limits of a disk. In JSON an object of numbers: `{"bps": 1048576, "iops_rd_max": 100}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, u64>", into = "BTreeMap<String, u64>")]
pub struct ThrottleSpec(pub ThrottleLimits);

impl ThrottleSpec {
    /// One of [`LIMITS`].
    pub fn rate(&mut self, name: &str) -> Option<&mut Rate> {
        let Self(ThrottleLimits { bytes, operations, .. }) = self;
        Some(match name {
            "bps" => &mut bytes.total,
            "bps_rd" => &mut bytes.read,
            "bps_wr" => &mut bytes.write,
            "iops" => &mut operations.total,
            "iops_rd" => &mut operations.read,
            "iops_wr" => &mut operations.write,
            _ => return None,
        })
    }

    /// The number of that name.
    pub fn value(&mut self, name: &str) -> Option<&mut u64> {
        if name == OPERATION_SIZE {
            return Some(&mut self.0.operation_size);
        }
        if let Some(base) = name.strip_suffix("_max_length") {
            return self.rate(base).map(|rate| &mut rate.burst_length);
        }
        if let Some(base) = name.strip_suffix("_max") {
            return self.rate(base).map(|rate| &mut rate.burst);
        }
        self.rate(name).map(|rate| &mut rate.average)
    }

    /// Whether there is such a key of a `--disk`; dashes are as good as underscores.
    pub(super) fn knows(&mut self, key: &str) -> bool {
        self.value(&key.replace('-', "_")).is_some()
    }

    /// Takes `KEY=VALUE` of a `--disk`, where it is known; the value may have a unit.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = parse_size(value).map_err(|error| format!("{key}: {error}"))?;
        if let Some(value) = self.value(&key.replace('-', "_")) {
            *value = number;
        }
        Ok(())
    }

    /// What differs from no limits at all, by name.
    pub fn entries(&self) -> BTreeMap<String, u64> {
        let (mut own, mut none) = (*self, Self::default());
        let names =
            LIMITS.iter().flat_map(|base| ["", "_max", "_max_length"].map(|end| format!("{base}{end}")));
        let values = names.chain([OPERATION_SIZE.to_owned()]).filter_map(|name| {
            let value = *own.value(&name)?;
            (Some(value) != none.value(&name).copied()).then_some((name, value))
        });
        values.collect()
    }

    /// Whether there are none.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

impl From<ThrottleSpec> for BTreeMap<String, u64> {
    fn from(spec: ThrottleSpec) -> Self {
        spec.entries()
    }
}

impl TryFrom<BTreeMap<String, u64>> for ThrottleSpec {
    type Error = String;

    fn try_from(entries: BTreeMap<String, u64>) -> Result<Self, String> {
        let mut spec = Self::default();
        for (name, value) in entries {
            *spec.value(&name).ok_or_else(|| format!("{name:?} is no limit of a disk"))? = value;
        }
        Ok(spec)
    }
}

/// Operations that a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FaultOp {
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
    /// Zeroes.
    Zeroes,
    /// What changes the disk, until it is flushed: it is lost when the VM's process is killed.
    VolatileCache,
}

impl FaultOp {
    /// Each, with what the disk calls it.
    pub const ALL: [(Self, FaultOperation); 7] = [
        (Self::Any, FaultOperation::Any),
        (Self::Read, FaultOperation::Read),
        (Self::Write, FaultOperation::Write),
        (Self::Flush, FaultOperation::Flush),
        (Self::Discard, FaultOperation::Discard),
        (Self::Zeroes, FaultOperation::Zeroes),
        (Self::VolatileCache, FaultOperation::VolatileCache),
    ];
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A fault to inject, for tests of what guests and clients make of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FaultSpec {
    /// With which operations.
    pub op: FaultOp,
    /// Only with those that touch sectors (of 512 bytes) from this one on. Anywhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sector: Option<u64>,
    /// How many sectors; one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sectors: Option<u64>,
    /// Lets so many matching operations pass before.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after: u64,
    /// How often; 0 is for ever.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub count: u64,
    /// They fail: `EIO`, `ENOSPC`, …, or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    /// They take so many milliseconds longer, up to 30000.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub delay_ms: u64,
    /// Only so many bytes of a write land.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torn: Option<u64>,
    /// A part of what was not flushed reaches the disk early, by chance, which this decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl FaultSpec {
    /// A fault without any effect yet.
    pub fn new(op: FaultOp) -> Self {
        let (sector, sectors, errno, torn, seed) = (None, None, None, None, None);
        Self { op, sector, sectors, after: 0, count: 0, errno, delay_ms: 0, torn, seed }
    }

    /// Whether one disk can have all of these.
    ///
    /// # Errors
    /// The first that makes no sense; there are too many, or two volatile caches.
    pub fn check_all(faults: &[Self]) -> Result<(), FaultError> {
        if faults.len() > MAX_RULES {
            return Err(RuleError::TooMany.into());
        }
        let rules = faults.iter().map(Self::rule).collect::<Result<Vec<_>, _>>()?;
        let caches = rules.iter().filter(|rule| rule.operation == FaultOperation::VolatileCache);
        if caches.count() > 1 { Err(RuleError::TwoCaches.into()) } else { Ok(()) }
    }

    /// The rule it stands for.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn rule(&self) -> Result<FaultRule, FaultError> {
        let errno = |text: &String| text.parse().map_err(|_| FaultError::Errno { text: text.clone() });
        let sectors = match (self.sector, self.sectors) {
            (_, Some(0)) => return Err(FaultError::NoSector),
            (None, None) => None,
            (first, count) => {
                let first = first.unwrap_or(0);
                Some((first, first.saturating_add(count.unwrap_or(1) - 1)))
            }
        };
        let known = FaultOp::ALL.iter().find(|(op, _)| *op == self.op);
        let rule = FaultRule {
            sectors,
            after: self.after,
            count: self.count,
            delay: Duration::from_millis(self.delay_ms),
            torn: self.torn,
            seed: self.seed,
            errno: self.errno.as_ref().map(errno).transpose()?,
            ..FaultRule::new(known.map_or(FaultOperation::Any, |(_, operation)| *operation))
        };
        rule.validate()?;
        Ok(rule)
    }
}

impl From<&FaultRule> for FaultSpec {
    fn from(rule: &FaultRule) -> Self {
        let known = FaultOp::ALL.iter().find(|(_, operation)| *operation == rule.operation);
        Self {
            op: known.map_or(FaultOp::Any, |(op, _)| *op),
            sector: rule.sectors.map(|(first, _)| first),
            sectors: rule.sectors.map(|(first, last)| (last - first).saturating_add(1)),
            after: rule.after,
            count: rule.count,
            errno: rule.errno.map(Errno::symbol),
            delay_ms: u64::try_from(rule.delay.as_millis()).unwrap_or(u64::MAX),
            torn: rule.torn,
            seed: rule.seed,
        }
    }
}

/// Why a fault is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// No error number.
    #[error("{text:?} is no errno, as in EIO")]
    Errno {
        /// As given.
        text: String,
    },
    /// An empty range.
    #[error("A fault is about one sector at least")]
    NoSector,
    /// It contradicts itself.
    #[error(transparent)]
    Rule(#[from] RuleError),
}

/// `--fault DISK:KEY=VALUE,…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultFlag {
    /// The disk's id.
    pub disk: String,
    /// What is to go wrong.
    pub fault: FaultSpec,
}

impl FromStr for FaultFlag {
    type Err = String;

    /// `DISK:op=OP`, then any of `sector=`, `sectors=`, `after=`, `count=`, `errno=`, `delay-ms=`, `torn=`; or
    /// `DISK:op=volatile-cache` and perhaps `seed=`.
    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "a fault is DISK:op=OP,KEY=VALUE…, as in disk0:op=write,errno=EIO,sector=2048";
        let (disk, keys) = text.split_once(':').ok_or(FORM)?;
        let mut op = None;
        let mut fault = FaultSpec::new(FaultOp::Any);
        for (key, value) in items(keys) {
            let value = value.ok_or_else(|| format!("{key:?} needs a value; {FORM}"))?;
            let number = || value.parse().map_err(|_| format!("{key}={value} is no number"));
            match key.as_str() {
                "op" => op = Some(choice("op", &value)?),
                "sector" => fault.sector = Some(number()?),
                "sectors" => fault.sectors = Some(number()?),
                "after" => fault.after = number()?,
                "count" => fault.count = number()?,
                "errno" => fault.errno = Some(value),
                "delay-ms" => fault.delay_ms = number()?,
                "torn" => fault.torn = Some(number()?),
                "seed" => fault.seed = Some(number()?),
                _ => {
                    return Err(format!(
                        "{key:?} is none of op, sector, sectors, after, count, errno, delay-ms, torn, seed"
                    ));
                }
            }
        }
        fault.op = op.ok_or(FORM)?;
        fault.rule().map_err(|error| error.to_string())?;
        Ok(Self { disk: disk.to_owned(), fault })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskSpec;

    #[test]
    fn a_disk_takes_limits_by_qemus_names() {
        let disk: DiskSpec =
            "a.img,bps=10M,iops-rd=100,iops_rd_max=200,iops_rd_max_length=5,iops-size=4K".parse().unwrap();
        let limits = disk.throttle.0;
        assert_eq!(limits.bytes.total.average, 10 << 20);
        assert_eq!(limits.operations.read, Rate { average: 100, burst: 200, burst_length: 5 });
        assert_eq!((limits.operation_size, limits.operations.write), (4096, Rate::default()));
        assert_eq!(limits.validate(), Ok(()));
        let json = serde_json::to_value(disk.throttle).unwrap();
        let expected = serde_json::json!({"bps": 10 << 20, "iops_rd": 100, "iops_rd_max": 200, "iops_rd_max_length": 5,
            "iops_size": 4096});
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<ThrottleSpec>(json).unwrap(), disk.throttle);
        assert!(ThrottleSpec::default().entries().is_empty());
        assert!("a.img,bps=fast".parse::<DiskSpec>().unwrap_err().contains("bps"));
        assert!("a.img,bps".parse::<DiskSpec>().unwrap_err().contains("bps needs a value"));
        assert!("a.img,bpm=1".parse::<DiskSpec>().unwrap_err().contains("\"bpm\""));
        assert!(serde_json::from_str::<ThrottleSpec>(r#"{"bpm": 1}"#).is_err());
    }

    #[test]
    fn a_fault_is_read_and_written_as_its_rule() {
        let flag: FaultFlag =
            "disk0:op=write,sector=8,sectors=2,after=1,count=3,errno=ENOSPC,delay-ms=20,torn=512"
                .parse()
                .unwrap();
        let rule = FaultRule {
            operation: FaultOperation::Write,
            sectors: Some((8, 9)),
            after: 1,
            count: 3,
            delay: Duration::from_millis(20),
            torn: Some(512),
            errno: Some(Errno::new(28)),
            seed: None,
        };
        assert_eq!((flag.disk.as_str(), flag.fault.rule()), ("disk0", Ok(rule.clone())));
        assert_eq!(FaultSpec::from(&rule), flag.fault);
        let text = serde_json::to_string(&flag.fault).unwrap();
        assert_eq!(serde_json::from_str::<FaultSpec>(&text).unwrap(), flag.fault);
        let one: FaultFlag = "d:op=any,errno=5,sector=7".parse().unwrap();
        assert_eq!(one.fault.rule().unwrap().sectors, Some((7, 7)));
        assert_eq!(FaultSpec::from(&one.fault.rule().unwrap()).errno.as_deref(), Some("EIO"));
        let cache: FaultFlag = "d:op=volatile-cache,seed=9".parse().unwrap();
        let rule = FaultRule { seed: Some(9), ..FaultRule::new(FaultOperation::VolatileCache) };
        assert_eq!(cache.fault.rule(), Ok(rule));
        assert_eq!(serde_json::to_string(&cache.fault).unwrap(), r#"{"op":"volatile-cache","seed":9}"#);
    }

    #[test]
    fn a_disk_has_one_volatile_cache_at_most() {
        let cache = FaultSpec::new(FaultOp::VolatileCache);
        assert_eq!(FaultSpec::check_all(std::slice::from_ref(&cache)), Ok(()));
        let two = FaultSpec::check_all(&[cache.clone(), cache.clone()]);
        assert_eq!(two, Err(RuleError::TwoCaches.into()));
        assert_eq!(FaultSpec::check_all(&vec![cache; MAX_RULES + 1]), Err(RuleError::TooMany.into()));
    }

    #[test]
    fn wrong_faults_are_refused_with_what_is_wrong() {
        for (text, part) in [
            ("disk0", "DISK:op=OP"),
            ("disk0:errno=EIO", "DISK:op=OP"),
            ("disk0:op=write", "needs an errno, a delay or a torn write"),
            ("disk0:op=seek,errno=EIO", "op=seek is none of any, read, write"),
            ("disk0:op=read,errno=EWHAT", "\"EWHAT\" is no errno"),
            ("disk0:op=read,errno=0", "\"0\" is no errno"),
            ("disk0:op=read,torn=5", "Only writes"),
            ("disk0:op=read,errno=EIO,sectors=0", "one sector at least"),
            ("disk0:op=flush,errno=EIO,sector=1", "A flush has no sectors"),
            ("disk0:op=read,delay-ms=30001", "30000 ms"),
            ("disk0:op=read,count=-1", "count=-1"),
            ("disk0:op=read,when=now", "\"when\""),
            ("disk0:op=volatile-cache,errno=EIO", "takes a seed and nothing else"),
            ("disk0:op=write,errno=EIO,seed=1", "Only a volatile cache takes a seed"),
        ] {
            let error = text.parse::<FaultFlag>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
