//! The journal of a VM: what was done with its disks, step by step, each durable before the next is taken.
//!
//! ```text
//!   Journal::open ─ lock, read, write the last record again ─▶ EPOCH n+1 ─▶ begin ─▶ append … ─▶ Done
//!        │                                                       │
//!        └ another process has the lock: refused, and told who   └ whoever still writes with an older epoch is refused
//! ```
//!
//! * A step counts once [`append`](Journal::append) has returned. If that fails, nobody can tell whether a crash would
//!   keep it: the journal takes nothing more until it is [reopened](Journal::reopen), which reads what is there and
//!   makes that last.
//! * At most one operation is open at a time; it carries the generation after that of the last one which moved a disk.
//! * What a torn write left at the end does not count; damage anywhere else is an error, never skipped.
//! * A full journal forgets its oldest finished operations.

mod lock;
mod log;
mod operation;
mod plan;
mod stage;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use self::lock::{Lock, lock};
use self::log::Log;
use self::operation::{EPOCH, Folded, Payload};
use crate::disks::{DisksError, DurableDisks};
use crate::durable::{DurableError, Role};
use crate::failpoint;
use crate::record::{Operation, Record, TooLong};
use crate::state_dir::StateDir;

pub(crate) use operation::{AGENT, MONITOR};
pub use operation::{Consistency, Entry, OperationLog, Outcome};
pub use plan::{DiskPlan, Displaced, FileId, ImageId, Plan, PlanFlags};
pub use stage::{Hold, Misplaced, OperationKind, Progress, Protocol, Side, Stage};

/// Records that have to fit when an operation begins, so that it does not have to make room halfway.
const ROOM: usize = 48;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file cannot be read or written durably.
    #[error(transparent)]
    File(#[from] DurableError),
    /// The durable configuration, which has the generation as well, cannot be read.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// Another coordinator is at work.
    #[error("Process {} coordinates VM {vm}", by.map_or("(unknown)".to_owned(), |pid| pid.to_string()))]
    Locked {
        /// The VM.
        vm: String,
        /// The process, as far as the lock says.
        by: Option<i32>,
    },
    /// Another coordinator has taken over.
    #[error("Another coordinator has taken over: {} {}", path.display(), match by {
        Some(by) => format!("has its records, of epoch {by}"),
        None => "was removed or replaced".to_owned(),
    })]
    Fenced {
        /// The journal, or its lock.
        path: PathBuf,
        /// Its epoch, if it shows.
        by: Option<u64>,
    },
    /// A record that was written is not what was written, or makes no sense where it is.
    #[error("{} is damaged at byte {offset}: {what}", path.display())]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Of the first record that is wrong.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// An earlier step failed.
    #[error("What {} holds is in doubt since a write to it failed", path.display())]
    Doubtful {
        /// The journal.
        path: PathBuf,
    },
    /// The open operation alone has filled it.
    #[error("{} is full", path.display())]
    Full {
        /// The journal.
        path: PathBuf,
    },
    /// Too many disks, or too long names.
    #[error("The operation does not fit into a record")]
    TooLong(#[from] TooLong),
    /// A path that is no text.
    #[error("The operation cannot be written down")]
    Text(#[source] serde_json::Error),
    /// The last operation has not ended.
    #[error("Operation {id} is {}", stage.name())]
    Open {
        /// It.
        id: Uuid,
        /// How far it has come.
        stage: Stage,
    },
    /// There is no such operation, or it has ended.
    #[error("Operation {id} is not open")]
    NotOpen {
        /// The one asked for.
        id: Uuid,
    },
    /// The step cannot be taken now.
    #[error("Operation {id} cannot be taken further")]
    Misplaced {
        /// It.
        id: Uuid,
        /// Why.
        source: Misplaced,
    },
}

/// A fresh id for an operation.
///
/// # Errors
/// The kernel has no random numbers.
pub fn new_operation_id() -> io::Result<Uuid> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

/// The operations of a VM, oldest first, read without disturbing who may be writing. No state directory: none.
///
/// # Errors
/// [`JournalError::File`], [`JournalError::Damaged`].
pub fn operations(state: &StateDir) -> Result<Vec<OperationLog>, JournalError> {
    match Log::look(&state.journal()) {
        Ok(records) => Ok(fold(&records, &state.journal())?.operations),
        Err(JournalError::File(error)) if error.is_not_found() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A journal, open for writing: this process alone has it.
#[derive(Debug)]
pub struct Journal {
    state: StateDir,
    log: Log,
    folded: Folded,
    /// Whether this process's epoch is in the journal.
    is_claimed: bool,
    lock: Lock,
}

impl Journal {
    /// Opens the journal of a VM and takes it over; makes it, and the state directory, if there is none.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(state: &StateDir) -> Result<Self, JournalError> {
        state.create()?;
        let lock = lock(state)?;
        let path = state.journal();
        let mut journal = match Self::load(state, lock)? {
            Ok(journal) => journal,
            Err(lock) => {
                let first = epoch_record(1, 1, DurableDisks::load(state)?.generation);
                let log = Log::replace(&path, vec![first], "create")?;
                let folded = fold(log.records(), &path)?;
                return Ok(Self { state: state.clone(), log, folded, is_claimed: true, lock });
            }
        };
        journal.claim()?;
        Ok(journal)
    }

    /// Opens the journal of a VM if it has one, without taking it over yet: the first record does that. What
    /// it holds is durable then.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open_existing(state: &StateDir) -> Result<Option<Self>, JournalError> {
        // A VM that never had an operation costs this much.
        match File::open(state.journal()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Role::Journal.failed("open", &state.journal())(source).into()),
            Ok(_) => {}
        }
        let Ok(mut journal) = Self::load(state, lock(state)?)? else { return Ok(None) };
        journal.log.settle()?;
        Ok(Some(journal))
    }

    fn load(state: &StateDir, lock: Lock) -> Result<Result<Self, Lock>, JournalError> {
        let log = match Log::open(&state.journal()) {
            Ok(log) => log,
            Err(JournalError::File(error)) if error.is_not_found() => return Ok(Err(lock)),
            Err(error) => return Err(error),
        };
        let folded = fold(log.records(), &state.journal())?;
        Ok(Ok(Self { state: state.clone(), log, folded, is_claimed: false, lock }))
    }

    /// After a failure: reads what is there and makes it last. What the failed step wrote may be a part of it.
    ///
    /// # Errors
    /// [`JournalError`]; it can be tried again.
    pub fn reopen(&mut self) -> Result<(), JournalError> {
        self.check_lock()?;
        let path = self.state.journal();
        let mut log = Log::open(&path)?;
        let folded = fold(log.records(), &path)?;
        log.settle()?;
        (self.log, self.folded) = (log, folded);
        Ok(())
    }

    fn claim(&mut self) -> Result<(), JournalError> {
        if self.is_claimed {
            return Ok(());
        }
        self.log.settle()?;
        self.make_room(1)?;
        let (sequence, epoch) = (self.next_sequence(), self.folded.epoch + 1);
        // An old journal that somebody has brought back does not make generations go back.
        let generation = match self.open_operation() {
            Some(_) => self.generation(),
            None => self.generation().max(DurableDisks::load(&self.state)?.generation),
        };
        self.add(epoch_record(sequence, epoch, generation), "epoch")?;
        self.is_claimed = true;
        Ok(())
    }

    /// Where it is.
    pub fn state_dir(&self) -> &StateDir {
        &self.state
    }

    /// This coordinator's: higher than that of any before it.
    pub fn epoch(&self) -> u64 {
        self.folded.epoch
    }

    /// Of the last operation that moved a disk; 0 if none has.
    pub fn generation(&self) -> u64 {
        self.folded.generation
    }

    /// Those that are not forgotten, oldest first.
    pub fn operations(&self) -> &[OperationLog] {
        &self.folded.operations
    }

    /// The last one, open or not.
    pub fn last(&self) -> Option<&OperationLog> {
        self.folded.operations.last()
    }

    /// The one that is open.
    pub fn open_operation(&self) -> Option<&OperationLog> {
        self.last().filter(|last| last.is_open())
    }

    /// Begins an operation: [`Stage::Planned`] is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError::Open`]: another one has not ended. [`JournalError::TooLong`], [`JournalError::Text`]: it
    /// cannot be written down, also not later, with all its targets made. Or the journal cannot be written.
    pub fn begin(
        &mut self,
        id: Uuid,
        plan: &Plan,
        details: Map<String, Value>,
    ) -> Result<Operation, JournalError> {
        if let Some(open) = self.open_operation() {
            return Err(JournalError::Open { id: open.id(), stage: open.stage() });
        }
        self.claim()?;
        self.make_room(ROOM)?;
        let operation = Operation { id, generation: self.generation() + 1, epoch: self.epoch() };
        let longest = payload(Some(&plan.longest()), details.clone())?;
        self.record(Stage::Planned, operation, longest).encode()?;
        self.write(Stage::Planned, operation, payload(Some(plan), details)?)?;
        Ok(operation)
    }

    /// Takes the open operation a step further: that is durable when this returns.
    ///
    /// # Errors
    /// [`JournalError::NotOpen`], [`JournalError::Misplaced`], [`JournalError::TooLong`]: nothing was written.
    /// [`JournalError::Fenced`]: this process is no coordinator any more. Otherwise nobody can tell whether it was
    /// ([`reopen`](Self::reopen)).
    pub fn append(
        &mut self,
        id: Uuid,
        stage: Stage,
        details: Map<String, Value>,
    ) -> Result<Operation, JournalError> {
        self.step(id, stage, None, details)
    }

    /// [`append`](Self::append) with a plan that says more than before: which files the targets are.
    ///
    /// # Errors
    /// The same.
    pub fn append_plan(
        &mut self,
        id: Uuid,
        stage: Stage,
        plan: &Plan,
        details: Map<String, Value>,
    ) -> Result<Operation, JournalError> {
        self.step(id, stage, Some(plan), details)
    }

    fn step(
        &mut self,
        id: Uuid,
        stage: Stage,
        plan: Option<&Plan>,
        details: Map<String, Value>,
    ) -> Result<Operation, JournalError> {
        let open = self.open_operation().filter(|open| open.id() == id);
        let open = open.ok_or(JournalError::NotOpen { id })?;
        open.progress.on(stage).map_err(|source| JournalError::Misplaced { id, source })?;
        let generation = open.operation.generation;
        self.claim()?;
        self.make_room(1)?;
        let operation = Operation { id, generation, epoch: self.epoch() };
        self.write(stage, operation, payload(plan, details)?)?;
        Ok(operation)
    }

    fn write(&mut self, stage: Stage, operation: Operation, payload: Value) -> Result<(), JournalError> {
        let record = self.record(stage, operation, payload);
        self.add(record, stage.name())
    }

    fn record(&self, stage: Stage, operation: Operation, payload: Value) -> Record {
        Record { kind: stage.number(), sequence: self.next_sequence(), operation, payload }
    }

    fn add(&mut self, record: Record, step: &str) -> Result<(), JournalError> {
        self.check_lock()?;
        // Before anything is written.
        let mut folded = self.folded.clone();
        folded.add(&record).map_err(|what| self.damaged(what))?;
        if step != Stage::Commit.name() || !failpoint::mistake("commit-skipped") {
            self.log.append(record, step)?;
        }
        self.folded = folded;
        Ok(())
    }

    fn damaged(&self, what: String) -> JournalError {
        JournalError::Damaged { path: self.state.journal(), offset: 0, what }
    }

    fn next_sequence(&self) -> u64 {
        self.log.records().last().map_or(1, |last| last.sequence + 1)
    }

    /// That this is the VM's coordinator still, as far as anybody can tell: the lock and the journal are the files that
    /// others find under these names, and nobody of a later epoch has written to the journal. To be asked before anything
    /// that others can see.
    ///
    /// # Errors
    /// [`JournalError::Fenced`]; [`JournalError::File`]: the journal cannot be read.
    pub fn confirm_ours(&self) -> Result<(), JournalError> {
        self.check_lock()?;
        match self.log.check_ours() {
            // What a failed step of its own has left there is not somebody else's.
            Err(JournalError::Fenced { by: Some(by), .. }) if by <= self.folded.epoch => Ok(()),
            checked => checked,
        }
    }

    /// The lock is still the one that others look at.
    fn check_lock(&self) -> Result<(), JournalError> {
        let path = self.state.lock();
        if self.lock.is_at(&path) { Ok(()) } else { Err(JournalError::Fenced { path, by: None }) }
    }

    /// Forgets the oldest finished operations until there is room for `count` records, and half of the journal if
    /// anything has to go.
    fn make_room(&mut self, count: usize) -> Result<(), JournalError> {
        if self.log.room() >= count {
            return Ok(());
        }
        self.check_lock()?;
        let kept = kept(self.log.records(), &self.folded, log::CAPACITY / 2);
        if kept.len() < self.log.records().len() {
            let path = self.state.journal();
            let folded = fold(&kept, &path)?;
            let replaced = Log::replace(&path, kept, "compact");
            self.log = replaced.inspect_err(|_| self.log.doubt())?;
            self.folded = folded;
        }
        if self.log.is_full() { Err(JournalError::Full { path: self.state.journal() }) } else { Ok(()) }
    }
}

/// The records of the open operation and of as many finished ones before it as fit into `limit`, behind one that carries
/// the generation and the epoch.
fn kept(records: &[Record], folded: &Folded, limit: usize) -> Vec<Record> {
    let is_epoch = |record: &&Record| record.kind == EPOCH;
    let last_epoch = records.iter().rfind(is_epoch);
    let mut kept: Vec<Record> = Vec::new();
    let mut generation = folded.generation;
    for operation in folded.operations.iter().rev() {
        let fits = kept.len() + operation.entries.len() + 2 <= limit;
        // Without what is between them an operation has to lead to the next one.
        let leads = operation.generation_after() == generation;
        if !(fits && leads || operation.is_open()) {
            break;
        }
        let of_it =
            records.iter().filter(|record| record.kind != EPOCH && record.operation.id == operation.id());
        kept.splice(0..0, of_it.cloned());
        generation = operation.operation.generation - 1;
    }
    if let Some(last) = last_epoch {
        let place = kept.partition_point(|record| record.operation.epoch < last.operation.epoch);
        let mut last = last.clone();
        if place == 0 {
            last.operation.generation = generation;
        } else {
            let first = kept[0].operation.epoch;
            last.operation.generation = 0;
            kept.insert(place, last);
            last = epoch_record(0, first, generation);
        }
        kept.insert(0, last);
    }
    let first = records.last().map_or(0, |last| last.sequence + 1).saturating_sub(kept.len() as u64);
    for (record, sequence) in kept.iter_mut().zip(first..) {
        record.sequence = sequence;
    }
    kept
}

fn epoch_record(sequence: u64, epoch: u64, generation: u64) -> Record {
    let operation = Operation { id: Uuid::nil(), generation, epoch };
    Record { kind: EPOCH, sequence, operation, payload: json!({"at": now(), "pid": std::process::id()}) }
}

fn payload(plan: Option<&Plan>, details: Map<String, Value>) -> Result<Value, JournalError> {
    let payload = Payload { at: now(), plan: plan.cloned(), details };
    serde_json::to_value(payload).map_err(JournalError::Text)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or_default()
}

fn fold(records: &[Record], path: &Path) -> Result<Folded, JournalError> {
    Folded::of(records).map_err(|(index, what)| {
        let offset = (index * crate::record::RECORD_MAX) as u64;
        JournalError::Damaged { path: path.to_owned(), offset, what }
    })
}
