//! What the guest writes, what it says about it, and what must be found afterwards.
//!
//! ```text
//!   guest ─ writes ─▶ sectors: number, place, checksum ─▶ images ─────────────┐
//!     └── tells ───▶ log: S submitted, A acknowledged, F flushed ─▶ Ledger ───┴─▶ what is lost
//! ```
//!
//! A sector is a record of its own, so that nothing can be torn but between records. At most one write to a sector is
//! under way at a time: so the last acknowledged one, or a later one, has to be there.

use std::collections::{HashMap, HashSet};

use crate::setup::SIZE;

/// Bytes of a record: a sector.
pub(crate) const SECTOR: usize = 512;
/// Sectors of a disk.
pub(crate) const SECTORS: u64 = SIZE / SECTOR as u64;
const MAGIC: &[u8; 8] = b"RECORD01";

/// Which image a disk works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    Source = 0,
    Target = 1,
}

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) disk: u64,
    pub(crate) sector: u64,
    /// Counts the writes of a disk, from 1.
    pub(crate) number: u64,
    /// The image was known to be the target when it was submitted.
    pub(crate) on_target: bool,
}

impl Record {
    pub(crate) fn encode(self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        let words = [self.disk, self.sector, self.number, self.on_target.into()];
        bytes[..8].copy_from_slice(MAGIC);
        for (place, word) in bytes[8..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        for (byte, filler) in bytes[40..SECTOR - 8].iter_mut().zip(self.number.to_le_bytes().iter().cycle()) {
            *byte = *filler ^ 0x5a;
        }
        let sum = checksum(&bytes[..SECTOR - 8]);
        bytes[SECTOR - 8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None`: zeros. An error: none, or a broken one.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Self>, &'static str> {
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
        if bytes[..8] != *MAGIC {
            return Err("no record");
        }
        if word(SECTOR - 8) != checksum(&bytes[..SECTOR - 8]) {
            return Err("a record with a wrong checksum");
        }
        Ok(Some(Self { disk: word(8), sector: word(16), number: word(24), on_target: word(32) == 1 }))
    }
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    /// What was acknowledged: a process has died.
    Acknowledged,
    /// What was flushed: the power has gone.
    Flushed,
}

/// The writes of one disk, from the guest's log.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// By sector: numbers of writes, in order.
    writes: HashMap<u64, Vec<u64>>,
    /// In the order in which the guest heard of it.
    acknowledged: Vec<u64>,
    /// How many of these were flushed.
    flushed: usize,
    /// Images it worked on, one after the other.
    pub(crate) roots: Vec<Root>,
    /// What the guest has read that it had not written.
    pub(crate) misread: Vec<String>,
}

impl Ledger {
    /// Those of `disks` disks. A last line without an end does not count: what it announces was not begun.
    pub(crate) fn parse(log: &str, disks: usize) -> Vec<Self> {
        let mut ledgers: Vec<Self> = (0..disks).map(|_| Self::default()).collect();
        let lines = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            let Some(ledger) = usize::try_from(number(1)).ok().and_then(|disk| ledgers.get_mut(disk)) else {
                continue;
            };
            match words[0] {
                "S" => (number(3)..number(3) + number(4))
                    .for_each(|sector| ledger.writes.entry(sector).or_default().push(number(2))),
                "A" => ledger.acknowledged.push(number(2)),
                "F" => ledger.flushed = ledger.flushed.max(usize::try_from(number(2)).unwrap_or(0)),
                "R" => ledger.roots.push(if number(2) == 1 { Root::Target } else { Root::Source }),
                "X" => ledger.misread.push(line.to_owned()),
                _ => {}
            }
        }
        ledgers
    }

    /// How many writes were acknowledged.
    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// What is missing in the image of disk `disk`.
    pub(crate) fn check(&self, disk: usize, image: &[u8], promise: Promise) -> Vec<String> {
        let kept: HashSet<u64> = match promise {
            Promise::Acknowledged => self.acknowledged.iter().copied().collect(),
            Promise::Flushed => self.acknowledged[..self.flushed].iter().copied().collect(),
        };
        self.compare(disk, image, &kept)
    }

    /// What is missing in a copy of disk `disk` that was begun when the guest had been promised what `early` has.
    pub(crate) fn check_copy(&self, early: &Self, disk: usize, image: &[u8]) -> Vec<String> {
        self.compare(disk, image, &early.acknowledged.iter().copied().collect())
    }

    fn compare(&self, disk: usize, image: &[u8], kept: &HashSet<u64>) -> Vec<String> {
        let mut lost = Vec::new();
        for (sector, bytes) in (0..).zip(image.chunks_exact(SECTOR)) {
            let none = Vec::new();
            let writes = self.writes.get(&sector).unwrap_or(&none);
            let needed = writes.iter().rfind(|number| kept.contains(number)).copied().unwrap_or(0);
            let found = match Record::decode(bytes) {
                Ok(None) => 0,
                Ok(Some(record)) if record.disk == disk as u64 && record.sector == sector => record.number,
                Ok(Some(record)) => {
                    lost.push(format!("disk {disk} sector {sector}: {record:?}"));
                    continue;
                }
                Err(what) => {
                    lost.push(format!("disk {disk} sector {sector}: {what}, not write {needed}"));
                    continue;
                }
            };
            if found < needed || (found > 0 && !writes.contains(&found)) {
                lost.push(format!("disk {disk} sector {sector}: write {found}, not {needed} or later"));
            }
        }
        lost
    }
}

/// Whether anything was written to an image when its disk was known to work on the other one.
pub(crate) fn has_strangers(image: &[u8]) -> bool {
    let records = image.chunks_exact(SECTOR).filter_map(|bytes| Record::decode(bytes).ok().flatten());
    records.into_iter().any(|record| record.on_target)
}
