//! The journal's file: records in slots of their own, none of which is ever written again once a later one is there.
//!
//! ```text
//!   slot 0        epoch: also the base, after those before it were dropped
//!   slot 1, 2, …  one record each, sequence numbers without a gap
//!   slot n        being written when the machine died: does not count, unless it was written completely
//!   slot n+1, …   zeros, up to the end: the size of the file never changes
//! ```
//!
//! A record has a block to itself, so that a torn write of one cannot damage another.
//!
//! A record whose sync failed may be readable now and gone after a power loss. Only the last one can be such: after a
//! failure nothing more is written until the file is read again. So whoever opens the journal to write writes the last
//! record again before it acts on it, and syncs the directory: the file may have got its name just before a crash.

use std::path::{Path, PathBuf};

use super::JournalError;
use crate::durable::{self, Durable, Role};
use crate::record::{Damage, RECORD_MAX, Record};

/// Records that fit.
pub(super) const CAPACITY: usize = 128;
const SLOT: usize = RECORD_MAX;
/// What a disk writes at once, at least.
const SECTOR: usize = 512;

/// The file, and what it holds.
#[derive(Debug)]
pub(super) struct Log {
    file: Durable,
    records: Vec<Record>,
    /// A write has failed: what the file holds is not known.
    is_doubtful: bool,
}

impl Log {
    /// Makes a file that holds these records, in place of what there is.
    pub(super) fn replace(path: &Path, records: Vec<Record>, step: &str) -> Result<Self, JournalError> {
        let mut content = vec![0; CAPACITY * SLOT];
        for (slot, record) in content.chunks_exact_mut(SLOT).zip(&records) {
            let bytes = record.encode()?;
            slot[..bytes.len()].copy_from_slice(&bytes);
        }
        durable::replace(Role::Journal, path, &content, step)?;
        Ok(Self { file: Durable::open(Role::Journal, path)?, records, is_doubtful: false })
    }

    /// Opens a file to write; its last record may not last yet ([`settle`](Self::settle)).
    pub(super) fn open(path: &Path) -> Result<Self, JournalError> {
        let file = Durable::open(Role::Journal, path)?;
        let records = read(&file)?;
        Ok(Self { file, records, is_doubtful: false })
    }

    /// Only looks.
    pub(super) fn look(path: &Path) -> Result<Vec<Record>, JournalError> {
        read(&Durable::open_to_read(Role::Journal, path)?)
    }

    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(super) fn is_full(&self) -> bool {
        self.records.len() >= CAPACITY
    }

    pub(super) fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.records.len())
    }

    /// Makes the last record last, and the file's name.
    pub(super) fn settle(&mut self) -> Result<(), JournalError> {
        if let Some(last) = self.records.last() {
            let (bytes, slot) = (encode(last)?, self.records.len() - 1);
            self.write(&bytes, slot, "settle")?;
        }
        Ok(self.file.sync_name()?)
    }

    /// Takes nothing more: another file may have its name by now.
    pub(super) fn doubt(&mut self) {
        self.is_doubtful = true;
    }

    /// Adds a record, which lasts when this returns.
    pub(super) fn append(&mut self, record: Record, step: &str) -> Result<(), JournalError> {
        if self.is_doubtful {
            return Err(JournalError::Doubtful { path: self.path().to_owned() });
        }
        self.check_ours()?;
        let bytes = encode(&record)?;
        self.write(&bytes, self.records.len(), step)?;
        self.records.push(record);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], slot: usize, step: &str) -> Result<(), JournalError> {
        let written = self.file.write_at(bytes, (slot * SLOT) as u64, step);
        self.is_doubtful = written.is_err();
        Ok(written?)
    }

    /// Nobody has written behind our back: neither where the next record goes nor another file in place of this one.
    pub(super) fn check_ours(&self) -> Result<(), JournalError> {
        let mut next = vec![0; SLOT];
        self.file.read_at(&mut next, (self.records.len() * SLOT) as u64)?;
        let other = Record::decode(&next).ok().map(|(record, _)| record.operation.epoch);
        let is_same = is_same_file(self.file.file(), self.path());
        if other.is_some() || !is_same {
            return Err(JournalError::Fenced { path: self.path().to_owned(), by: other });
        }
        Ok(())
    }
}

pub(super) fn is_same_file(file: &std::fs::File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn encode(record: &Record) -> Result<Vec<u8>, JournalError> {
    let mut bytes = record.encode()?;
    // What a torn record may have left there goes, too.
    bytes.resize(SLOT, 0);
    Ok(bytes)
}

fn read(file: &Durable) -> Result<Vec<Record>, JournalError> {
    let mut content = vec![0; CAPACITY * SLOT];
    file.read_at(&mut content, 0)?;
    parse(&content, file.path())
}

/// The records of a file.
pub(super) fn parse(content: &[u8], path: &Path) -> Result<Vec<Record>, JournalError> {
    let mut records: Vec<Record> = Vec::new();
    let mut slots = content.chunks(SLOT).enumerate();
    for (index, slot) in slots.by_ref() {
        let damaged = |what| damaged(path, index, what);
        let record = match Record::decode(slot) {
            Ok((record, _)) => record,
            // It cannot be what a crash left: this program did not begin to write it.
            Err(damage @ Damage::Version(_)) => return Err(damaged(damage.to_string())),
            Err(damage) if is_torn(slot) => {
                return match slots.find(|(_, slot)| slot.iter().any(|&byte| byte != 0)) {
                    // The first one is there before the file has its name.
                    None if !records.is_empty() => Ok(records),
                    _ => Err(damaged(damage.to_string())),
                };
            }
            Err(damage) => return Err(damaged(damage.to_string())),
        };
        if let Some(last) = records.last() {
            if record.sequence != last.sequence.wrapping_add(1) {
                return Err(damaged(format!("Record {} after {}", record.sequence, last.sequence)));
            }
            if record.operation.epoch < last.operation.epoch {
                let (epoch, known) = (record.operation.epoch, last.operation.epoch);
                return Err(damaged(format!("Record of epoch {epoch} after one of {known}")));
            }
        }
        records.push(record);
    }
    Ok(records)
}

fn damaged(path: &Path, slot: usize, what: String) -> JournalError {
    JournalError::Damaged { path: PathBuf::from(path), offset: (slot * SLOT) as u64, what }
}

/// Whether a slot that holds no record may be one that was being written: a part of it is still as it was before.
///
/// A record that was written completely and is wrong has been damaged later. To take it for torn would be to forget
/// what it said.
fn is_torn(slot: &[u8]) -> bool {
    let Some(last) = slot.iter().rposition(|&byte| byte != 0) else { return true };
    match Record::stated_length(slot) {
        None => true,
        Some(length) if last + 1 < length => true,
        Some(length) => {
            slot[..length.min(slot.len())].chunks(SECTOR).any(|s| s.iter().all(|&byte| byte == 0))
        }
    }
}
