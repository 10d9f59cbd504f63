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

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Damage, Operation, RECORD_MAX, Record, TooLong};

/// tmpfs, ramfs and hugetlbfs (Linux `include/uapi/linux/magic.h`).
const VOLATILE: [u32; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];
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
    /// It cannot be created, opened, read or written.
    #[error("Cannot {action} the witness {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It would not survive the machine.
    #[error("The witness {} is on a filesystem in memory, which does not survive a crash of this machine", path.display())]
    Volatile {
        /// The file.
        path: PathBuf,
    },
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
    path: PathBuf,
    file: File,
    /// Slot and sequence number of what was written last, whether or not it reached the disk.
    last: Option<(u64, u64)>,
}

impl Witness {
    /// Makes an empty witness: on disk, under its name, when this returns.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Io`], also if the file is there already; [`WitnessError::Volatile`].
    pub fn create(path: &Path) -> Result<Self, WitnessError> {
        let fail = |action| move |source| WitnessError::Io { action, path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let witness =
            Self { path: path.to_owned(), file: options.open(path).map_err(fail("create"))?, last: None };
        witness.check_filesystem()?;
        let empty = vec![0; RECORD_MAX * 2];
        witness.file.write_all_at(&empty, 0).map_err(fail("write"))?;
        witness.file.sync_all().map_err(fail("sync"))?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = File::open(directory.unwrap_or(Path::new("."))).map_err(fail("find"))?;
        directory.sync_all().map_err(fail("sync the directory of"))?;
        Ok(witness)
    }

    /// Opens a witness.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Io`], [`WitnessError::Volatile`].
    pub fn open(path: &Path) -> Result<Self, WitnessError> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        let fail = |source| WitnessError::Io { action: "open", path: path.to_owned(), source };
        Self::check(Self { path: path.to_owned(), file: opened.map_err(fail)?, last: None })
    }

    /// Takes a witness that somebody else opened; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Io`], [`WitnessError::Volatile`].
    pub fn adopt(fd: OwnedFd, name: &str) -> Result<Self, WitnessError> {
        Self::check(Self { path: name.into(), file: fd.into(), last: None })
    }

    fn check(self) -> Result<Self, WitnessError> {
        self.check_filesystem()?;
        Ok(self)
    }

    /// Files in memory take every sync and keep nothing.
    fn check_filesystem(&self) -> Result<(), WitnessError> {
        let filesystem =
            rustix::fs::fstatfs(&self.file).map_err(|error| self.failed("look at")(error.into()))?;
        let kind = u32::try_from(filesystem.f_type).unwrap_or_default();
        if VOLATILE.contains(&kind) {
            return Err(WitnessError::Volatile { path: self.path.clone() });
        }
        Ok(())
    }

    /// The decision that counts, if there is one.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Io`]: then nobody knows. [`WitnessError::Foreign`]: it is a file of somebody else's, or
    /// from a later version of this program.
    pub fn read(&self) -> Result<Option<Decision>, WitnessError> {
        let newest = self.newest()?;
        let Some((_, record)) = newest else { return Ok(None) };
        let verdict = Verdict::by_kind(record.kind).ok_or_else(|| self.foreign(Damage::Checksum))?;
        Ok(Some(Decision { verdict, operation: record.operation, details: record.payload }))
    }

    /// Whether this operation may use it: it is empty, or this operation's own.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Used`], and those of [`read`](Self::read).
    pub fn check_operation(&self, operation: &Operation) -> Result<(), WitnessError> {
        match self.read()? {
            Some(decision) if decision.operation.id != operation.id => {
                Err(WitnessError::Used { path: self.path.clone(), other: decision.operation.id })
            }
            _ => Ok(()),
        }
    }

    /// Puts a decision down, in the slot that does not hold the one that counts so far. When this returns it
    /// is durable.
    ///
    /// # Errors
    ///
    /// [`WitnessError::Io`]: nobody can tell whether it is on the disk, and to call this again with the same
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
        self.file.write_all_at(&bytes, slot * SLOT).map_err(self.failed("write"))?;
        self.file.sync_data().map_err(self.failed("sync"))
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
        let mut filled = 0;
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], slot * SLOT + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("read")(error)),
            }
        }
        Ok(bytes)
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> WitnessError {
        let path = self.path.clone();
        move |source| WitnessError::Io { action, path: path.clone(), source }
    }

    fn foreign(&self, source: Damage) -> WitnessError {
        WitnessError::Foreign { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
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
        assert!(matches!(Witness::create(&lab.path()), Err(WitnessError::Io { action: "create", .. })));
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
        witness.file.write_all_at(&[0; RECORD_MAX], 0).unwrap();
        witness.decide(Verdict::Revoked, operation(1), json!(null)).unwrap();
        assert_eq!(lab.verdict(), Some(Verdict::Revoked));
        witness.file.write_all_at(&lost[..RECORD_MAX], 0).unwrap();
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
        assert!(matches!(error, WitnessError::Volatile { .. }), "{error}");
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
