//! The witness: a small file in which the VMM puts down, durably, that it pivoted or that it will not.
//!
//! ```text
//!   coordinator   creates it: two empty slots, synced, its directory synced
//!   VMM           target synced ▶ slot: PIVOTED ▶ fdatasync ═▶ switch          ═ the decision
//!                                        │ fails: nobody can tell what is on the disk
//!                                        ▼
//!                                 the other slot: REVOKED ▶ fdatasync ▶ goes on with the source
//!                                        │ fails, too: guest I/O stays held until somebody else has decided
//!   reader        of the valid slots the one with the higher sequence number counts; an empty witness says "source"
//! ```
//!
//! Linux tells a writeback error once and forgets it; to sync the same slot again proves nothing. So each decision
//! goes into a slot of its own.
//!
//! What a reader finds may not be durable yet (it may sit in the page cache of a machine that is about to lose
//! power), so it acts on it only after it has written its own decision elsewhere, durably.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Damage, Operation, RECORD_MAX, Record, TooLong};
use crate::durable::{self, Durable, DurableError, Role};

const MAGIC: &[u8] = b"TARN";
const SLOTS: u64 = 2;
const SLOT: u64 = RECORD_MAX as u64;

/// What the VMM decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The target holds everything; from here on it is the disk.
    Pivoted,
    /// The source stays the disk, whatever an earlier slot says.
    Revoked,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Pivoted => "pivoted",
            Self::Revoked => "revoked",
        }
    }

    fn kind(self) -> u16 {
        match self {
            Self::Pivoted => 1,
            Self::Revoked => 2,
        }
    }

    fn by_kind(kind: u16) -> Option<Self> {
        [Self::Pivoted, Self::Revoked].into_iter().find(|verdict| verdict.kind() == kind)
    }
}

/// A decision as it stands in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Which.
    pub verdict: Verdict,
    /// About what.
    pub operation: Operation,
    /// The disks, their sources and targets.
    pub details: Value,
}

/// Why a witness is none, or cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// It cannot be created, opened, read or written, or would not survive the machine.
    #[error(transparent)]
    File(#[from] DurableError),
    /// It holds something that is no witness, or one that this program cannot read.
    #[error("{} is no witness", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: Damage,
    },
    /// It has served another operation, which must not be forgotten.
    #[error("The witness {} is that of another operation, {other}", path.display())]
    Used {
        /// The file.
        path: PathBuf,
        /// The operation's id.
        other: uuid::Uuid,
    },
    /// More disks than fit.
    #[error("The witness cannot hold so many disks")]
    TooLong(#[from] TooLong),
}

/// A witness, open.
#[derive(Debug)]
pub struct Witness {
    file: Durable,
    /// Slot and sequence number of what was written last, whether or not it reached the disk.
    last: Option<(u64, u64)>,
}

impl Witness {
    /// Makes an empty witness: on disk, under its name, when this returns.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`], also if the file is there already.
    pub fn create(path: &Path) -> Result<Self, WitnessError> {
        let file = Durable::create(Role::Witness, path, &[0; RECORD_MAX * 2])?;
        Ok(Self { file, last: None })
    }

    /// Opens a witness.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`].
    pub fn open(path: &Path) -> Result<Self, WitnessError> {
        Ok(Self { file: Durable::open(Role::Witness, path)?, last: None })
    }

    /// Takes a witness that somebody else opened; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`].
    pub fn adopt(fd: OwnedFd, name: &str) -> Result<Self, WitnessError> {
        Ok(Self { file: Durable::adopt(Role::Witness, fd, name)?, last: None })
    }

    /// Removes a witness that nobody needs any more: the journal says, durably, how its operation ended.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`]. That there is none is no error.
    pub fn remove(path: &Path) -> Result<(), WitnessError> {
        durable::remove(Role::Witness, path)?;
        Ok(())
    }

    /// The decision that counts, if there is one.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`]: then nobody knows. [`WitnessError::Foreign`]: it is a file of somebody else's, or
    /// from a later version of this program.
    pub fn read(&self) -> Result<Option<Decision>, WitnessError> {
        let newest = self.newest()?;
        let Some((_, record)) = newest else { return Ok(None) };
        let verdict = Verdict::by_kind(record.kind).ok_or_else(|| self.foreign(Damage::Checksum))?;
        Ok(Some(Decision { verdict, operation: record.operation, details: record.payload }))
    }

    /// Whether nothing was ever written to it, not even a torn decision.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`].
    pub fn is_blank(&self) -> Result<bool, WitnessError> {
        for slot in 0..SLOTS {
            if self.slot(slot)?.iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether this operation may use it: it is empty, or this operation's own.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Used`], and those of [`read`](Self::read).
    pub fn check_operation(&self, operation: &Operation) -> Result<(), WitnessError> {
        match self.read()? {
            Some(decision) if decision.operation.id != operation.id => {
                Err(WitnessError::Used { path: self.file.path().to_owned(), other: decision.operation.id })
            }
            _ => Ok(()),
        }
    }

    /// Puts a decision down, in the slot that does not hold the one that counts so far. When this returns it
    /// is durable.
    ///
    /// # Errors
    ///
    /// [`WitnessError::File`]: nobody can tell whether it is on the disk, and to call this again with the same
    /// verdict proves nothing. [`WitnessError::Foreign`], [`WitnessError::TooLong`]: nothing was written.
    pub fn decide(
        &mut self,
        verdict: Verdict,
        operation: Operation,
        details: Value,
    ) -> Result<(), WitnessError> {
        let written = self.newest()?.map(|(slot, record)| (slot, record.sequence));
        // What was written and cannot be read back counts as well: the next one goes elsewhere, and over it.
        let last = written.into_iter().chain(self.last).max_by_key(|(_, sequence)| *sequence);
        let (slot, sequence) = last.map_or((0, 1), |(slot, sequence)| ((slot + 1) % SLOTS, sequence + 1));
        self.last = Some((slot, sequence));
        let record = Record { kind: verdict.kind(), sequence, operation, payload: details };
        let mut bytes = record.encode()?;
        bytes.resize(RECORD_MAX, 0);
        Ok(self.file.write_at(&bytes, slot * SLOT, verdict.name())?)
    }

    fn newest(&self) -> Result<Option<(u64, Record)>, WitnessError> {
        let mut newest: Option<(u64, Record)> = None;
        for slot in 0..SLOTS {
            match Record::decode(&self.slot(slot)?) {
                Ok((record, _)) => {
                    if newest.as_ref().is_none_or(|(_, known)| known.sequence < record.sequence) {
                        newest = Some((slot, record));
                    }
                }
                // Was being written, or never was.
                Err(Damage::Empty | Damage::Torn) => {}
                Err(Damage::Checksum) if self.has_magic(slot)? => {}
                Err(damage) => return Err(self.foreign(damage)),
            }
        }
        Ok(newest)
    }

    /// Whether the slot begins as a record does, as far as it was written at all.
    fn has_magic(&self, slot: u64) -> Result<bool, WitnessError> {
        let bytes = self.slot(slot)?;
        let begun = bytes[..MAGIC.len()].split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(!begun.is_empty() && MAGIC.starts_with(begun))
    }

    fn slot(&self, slot: u64) -> Result<Vec<u8>, WitnessError> {
        let mut bytes = vec![0; RECORD_MAX];
        self.file.read_at(&mut bytes, slot * SLOT)?;
        Ok(bytes)
    }

    fn foreign(&self, source: Damage) -> WitnessError {
        WitnessError::Foreign { path: self.file.path().to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    fn operation(id: u128) -> Operation {
        Operation { id: Uuid::from_u128(id), generation: 4, epoch: 1 }
    }

    struct Lab {
        directory: tempfile::TempDir,
    }

    impl Lab {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().unwrap() }
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("witness")
        }

        fn verdict(&self) -> Option<Verdict> {
            Witness::open(&self.path()).unwrap().read().unwrap().map(|decision| decision.verdict)
        }
    }

    #[test]
    fn a_new_witness_has_decided_nothing() {
        let lab = Lab::new();
        let witness = Witness::create(&lab.path()).unwrap();
        assert_eq!(witness.read().unwrap(), None);
        assert_eq!(std::fs::metadata(lab.path()).unwrap().len(), 2 * SLOT);
        let again = Witness::create(&lab.path());
        let Err(WitnessError::File(DurableError::Io { action: "create", .. })) = again else {
            panic!("{again:?}");
        };
    }

    #[test]
    fn the_last_decision_counts_and_the_one_before_stays_beside_it() {
        let lab = Lab::new();
        let mut witness = Witness::create(&lab.path()).unwrap();
        let details = json!({"disks": [{"device": "vda", "target": "/d"}]});
        witness.decide(Verdict::Pivoted, operation(1), details.clone()).unwrap();
        let decision = Decision { verdict: Verdict::Pivoted, operation: operation(1), details };
        assert_eq!(witness.read().unwrap(), Some(decision));
        witness.decide(Verdict::Revoked, operation(1), json!(null)).unwrap();
        assert_eq!(lab.verdict(), Some(Verdict::Revoked));
        let bytes = std::fs::read(lab.path()).unwrap();
        assert_eq!(Record::decode(&bytes).unwrap().0.kind, Verdict::Pivoted.kind());
        // An odd number of further ones ends in either slot.
        for verdict in [Verdict::Pivoted, Verdict::Revoked, Verdict::Pivoted] {
            witness.decide(verdict, operation(1), json!(null)).unwrap();
            assert_eq!(lab.verdict(), Some(verdict));
        }
    }

    #[test]
    fn a_decision_torn_anywhere_leaves_the_one_before() {
        let lab = Lab::new();
        let mut witness = Witness::create(&lab.path()).unwrap();
        witness.decide(Verdict::Pivoted, operation(1), json!(null)).unwrap();
        let before = std::fs::read(lab.path()).unwrap();
        witness.decide(Verdict::Revoked, operation(1), json!(null)).unwrap();
        let after = std::fs::read(lab.path()).unwrap();
        let changed = (0..before.len()).filter(|&at| before[at] != after[at]);
        let (first, last) = changed.fold((usize::MAX, 0), |(first, last), at| (first.min(at), last.max(at)));
        assert!(first >= RECORD_MAX, "the slot that counts was written to");
        for end in first..=last {
            let mut torn = before.clone();
            torn[..end].copy_from_slice(&after[..end]);
            std::fs::write(lab.path(), &torn).unwrap();
            assert_eq!(lab.verdict(), Some(Verdict::Pivoted), "torn at {end}");
        }
    }

    #[test]
    fn what_was_written_and_cannot_be_read_back_is_not_written_over() {
        let lab = Lab::new();
        let mut witness = Witness::create(&lab.path()).unwrap();
        witness.decide(Verdict::Pivoted, operation(1), json!(null)).unwrap();
        // The disk lost it and said so; it may come back.
        let lost = std::fs::read(lab.path()).unwrap();
        witness.file.file().write_all_at(&[0; RECORD_MAX], 0).unwrap();
        witness.decide(Verdict::Revoked, operation(1), json!(null)).unwrap();
        assert_eq!(lab.verdict(), Some(Verdict::Revoked));
        witness.file.file().write_all_at(&lost[..RECORD_MAX], 0).unwrap();
        assert_eq!(lab.verdict(), Some(Verdict::Revoked));
    }

    #[test]
    fn a_witness_serves_one_operation() {
        let lab = Lab::new();
        let mut witness = Witness::create(&lab.path()).unwrap();
        witness.check_operation(&operation(1)).unwrap();
        witness.decide(Verdict::Pivoted, operation(1), json!(null)).unwrap();
        witness.check_operation(&operation(1)).unwrap();
        let used = witness.check_operation(&operation(2)).unwrap_err();
        assert!(matches!(used, WitnessError::Used { other, .. } if other == Uuid::from_u128(1)));
    }

    #[test]
    fn a_file_of_somebody_else_is_neither_read_nor_written() {
        let lab = Lab::new();
        std::fs::write(lab.path(), "my only copy").unwrap();
        let mut witness = Witness::open(&lab.path()).unwrap();
        assert!(matches!(witness.read(), Err(WitnessError::Foreign { .. })));
        assert!(witness.decide(Verdict::Pivoted, operation(1), json!(null)).is_err());
        assert_eq!(std::fs::read(lab.path()).unwrap(), b"my only copy");
    }

    #[test]
    fn a_filesystem_in_memory_is_refused() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = Witness::create(&directory.path().join("witness")).unwrap_err();
        assert!(matches!(error, WitnessError::File(DurableError::Volatile { .. })), "{error}");
    }

    #[test]
    fn more_disks_than_fit_are_refused_before_anything_is_written() {
        let lab = Lab::new();
        let mut witness = Witness::create(&lab.path()).unwrap();
        let details = "x".repeat(5000).into();
        let refused = witness.decide(Verdict::Pivoted, operation(1), details);
        assert!(matches!(refused, Err(WitnessError::TooLong(_))));
        assert_eq!(lab.verdict(), None);
    }
}
