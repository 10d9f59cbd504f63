//! After the end of a VM: which images are its disks? Decided without a guess, written down, and carried out.
//!
//! ```text
//!   journal ─┐
//!            ├─▶ decide ─▶ RESOLVED in the journal ─▶ disks.json ─▶ stamps ─▶ DONE
//!   witness ─┘     │             ═ from here on a crash changes nothing
//!                  └ undecidable: an error with the command by which its user decides
//! ```
//!
//! What counts, first to last: a decision in the journal; the witness, if it is of this operation; and without either
//! the source, as then no guest has written to a target. Only where the witness itself cannot be read, or has gone, is
//! there nothing to go by.
//!
//! | last step | witness | the disk |
//! |---|---|---|
//! | none, done | | as the durable configuration has it |
//! | pivoted, config-committed, resolved-target, commit (B), … | | target |
//! | aborted, resolved-source | | source |
//! | any before the decision (A) | pivoted | target |
//! | pivot-intent (A) | empty, torn, revoked, of another operation | source |
//! | pivot-intent (A) | unreadable, gone, never made | undecidable |
//! | any before pivot-intent (A), before commit (B) | | source |
//! | any, of a mirror or backup | | source; the targets are copies after copied |
//!
//! The VM has to be dead, and has to stay so until this is over: the caller has its run-time directory's lock.

use std::path::Path;

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::disks::{DisksError, DurableDisks};
use crate::journal::{Journal, JournalError, OperationKind, OperationLog, Progress, Protocol, Side, Stage};
use crate::record::Operation;
use crate::record::witness::{Verdict, Witness, WitnessError};
use crate::stamp::{Stamp, StampKind};
use crate::state_dir::StateDir;

/// What the witness of an operation says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reading {
    /// The operation has none.
    Unplanned,
    /// It is not there.
    Absent,
    /// It is there, and nothing was written to it.
    Empty,
    /// The VMM pivoted.
    Pivoted,
    /// The VMM has taken it back.
    Revoked,
    /// It is that of another operation, or of another attempt at this one.
    Other,
    /// Something was being written, and no decision can be read.
    Damaged,
    /// The disk does not give it away, or it is no witness that this program knows.
    Unreadable,
}

impl Reading {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Unplanned,
        Self::Absent,
        Self::Empty,
        Self::Pivoted,
        Self::Revoked,
        Self::Other,
        Self::Damaged,
        Self::Unreadable,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unplanned => "unplanned",
            Self::Absent => "absent",
            Self::Empty => "empty",
            Self::Pivoted => "pivoted",
            Self::Revoked => "revoked",
            Self::Other => "other",
            Self::Damaged => "damaged",
            Self::Unreadable => "unreadable",
        }
    }

    /// Reads the witness of an operation; also why it cannot be read.
    pub fn of(path: Option<&Path>, operation: &Operation) -> (Self, Option<WitnessError>) {
        let Some(path) = path else { return (Self::Unplanned, None) };
        match Witness::open(path).and_then(|witness| Self::of_open(&witness, operation)) {
            Ok(reading) => (reading, None),
            Err(WitnessError::File(error)) if error.is_not_found() => (Self::Absent, None),
            Err(error) => (Self::Unreadable, Some(error)),
        }
    }

    fn of_open(witness: &Witness, operation: &Operation) -> Result<Self, WitnessError> {
        let Some(decision) = witness.read()? else {
            return Ok(if witness.is_blank()? { Self::Empty } else { Self::Damaged });
        };
        let Operation { id, generation, .. } = decision.operation;
        if (id, generation) != (operation.id, operation.generation) {
            return Ok(Self::Other);
        }
        Ok(match decision.verdict {
            Verdict::Pivoted => Self::Pivoted,
            Verdict::Revoked => Self::Revoked,
        })
    }
}

/// Why nobody can tell which image is the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undecidable {
    /// The operation had no witness.
    #[error("the VMM may have pivoted, and the operation has no witness that would say so")]
    Unplanned,
    /// Somebody has removed it.
    #[error("the VMM may have pivoted, and the witness that would say so has been removed")]
    Absent,
    /// It cannot be read.
    #[error("the VMM may have pivoted, and the witness that would say so cannot be read")]
    Unreadable,
}

/// Which images are the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Those of the durable configuration: no operation is open.
    Nothing,
    /// The operation's sources.
    Source,
    /// Its targets.
    Target,
    /// Nobody can tell.
    Undecidable(Undecidable),
}

/// Which images are the disks, by the last operation of the journal and its witness, when the VM is dead.
pub fn decide(progress: Progress, kind: OperationKind, protocol: Protocol, reading: Reading) -> Decision {
    if progress.is_done() {
        return Decision::Nothing;
    }
    match (progress.decision(), kind, protocol) {
        (Some(Side::Target), ..) => Decision::Target,
        (Some(Side::Source), ..) | (None, OperationKind::Mirror | OperationKind::Backup, _) => {
            Decision::Source
        }
        // No commit: nobody has told the VMM to finalize.
        (None, OperationKind::Pivot, Protocol::B) => Decision::Source,
        (None, OperationKind::Pivot, Protocol::A) => by_witness(progress.is_intended(), reading),
    }
}

fn by_witness(is_intended: bool, reading: Reading) -> Decision {
    match (reading, is_intended) {
        (Reading::Pivoted, _) => Decision::Target,
        (_, false) => Decision::Source,
        (Reading::Empty | Reading::Revoked | Reading::Other | Reading::Damaged, true) => Decision::Source,
        (Reading::Unplanned, true) => Decision::Undecidable(Undecidable::Unplanned),
        // It was there, durably, before the journal had the intent.
        (Reading::Absent, true) => Decision::Undecidable(Undecidable::Absent),
        (Reading::Unreadable, true) => Decision::Undecidable(Undecidable::Unreadable),
    }
}

/// Why an operation is not resolved.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The durable configuration.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// Nobody can tell; its user has to.
    #[error(
        "It cannot be told whether operation {id} has moved the disks of VM {vm}: {why}. Both images are as they were \
         left; look at them, then run `{}` to go on with {sources}, or `{}` to go on with {targets}",
        command(vm, Side::Source),
        command(vm, Side::Target)
    )]
    Undecidable {
        /// The VM.
        vm: String,
        /// The operation.
        id: Uuid,
        /// Why.
        why: Undecidable,
        /// Its sources, by path.
        sources: String,
        /// Its targets, by path.
        targets: String,
        /// Why the witness cannot be read.
        source: Option<Box<WitnessError>>,
    },
    /// A lock says nothing about a VM of another VMM.
    #[error(
        "Operation {id} is about a VM of another VMM, which may run: `tarn recover {vm}` asks it. Once it has ended for \
         certain, the same with --dead settles the operation"
    )]
    Foreign {
        /// The VM, as commands name it.
        vm: String,
        /// The operation.
        id: Uuid,
    },
    /// The user's choice is not what is written down.
    #[error("Operation {id} is decided: the {} is the disk", decided.name())]
    Decided {
        /// The operation.
        id: Uuid,
        /// How.
        decided: Side,
    },
}

/// The command by which a user decides what cannot be told.
pub fn command(vm: &str, side: Side) -> String {
    format!("tarn recover {vm} --use {}", side.name())
}

/// What was resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The operation as it is in the journal now.
    pub operation: OperationLog,
    /// Which images are the disks.
    pub side: Side,
    /// What the witness said.
    pub witness: Reading,
    /// What of the rest could not be done; the disks are safe without it.
    pub warnings: Vec<String>,
}

/// Which images are the disks, and what was done to be able to say so.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolution {
    /// The operation that was open; `None`: there was none, and nothing has changed.
    pub resolved: Option<Resolved>,
    /// The durable configuration.
    pub disks: DurableDisks,
}

/// Resolves what a VM that is dead has left open.
#[derive(Clone, Copy, Debug)]
pub struct Resolver {
    choice: Option<Side>,
    foreign_too: bool,
}

impl Resolver {
    /// One that decides what can be decided.
    pub fn new() -> Self {
        Self { choice: None, foreign_too: false }
    }

    /// One that does so with its user's choice where it cannot.
    pub fn choosing(side: Side) -> Self {
        Self { choice: Some(side), foreign_too: false }
    }

    /// Also if the VM was [another VMM's](crate::operation::Connection::foreign): its user has made sure that it has ended.
    pub fn of_any_vmm(self) -> Self {
        Self { foreign_too: true, ..self }
    }

    /// Resolves what the VM has left open. The second time it changes nothing. Without a state directory it looks at
    /// nothing else.
    ///
    /// # Errors
    /// [`ResolveError`]; [`JournalError::Locked`] in it: a coordinator is at work, which resolves it as well.
    pub fn run(self, state: &StateDir) -> Result<Resolution, ResolveError> {
        match Journal::open_existing(state)? {
            Some(mut journal) => self.run_in(&mut journal),
            None => {
                let disks = DurableDisks::load(state)?;
                Ok(Resolution { resolved: None, disks })
            }
        }
    }

    /// [`run`](Self::run) by the coordinator that has the journal.
    ///
    /// # Errors
    /// [`ResolveError`].
    pub fn run_in(self, journal: &mut Journal) -> Result<Resolution, ResolveError> {
        let resolved = match journal.open_operation().cloned() {
            Some(open) => Some(self.resolve(journal, &open)?),
            None => None,
        };
        let disks = DurableDisks::load(journal.state_dir())?;
        disks.check_generation(journal.state_dir(), journal.generation())?;
        Ok(Resolution { resolved, disks })
    }

    fn resolve(self, journal: &mut Journal, open: &OperationLog) -> Result<Resolved, ResolveError> {
        let (id, plan) = (open.id(), &open.plan);
        if open.foreign_monitor().is_some() && !self.foreign_too {
            return Err(ResolveError::Foreign { vm: open.vm_for_commands(journal.state_dir().name()), id });
        }
        let (witness, error) = Reading::of(plan.witness.as_deref(), &open.operation);
        let decision = decide(open.progress, plan.kind, plan.protocol, witness);
        let side = self.side(decision, journal.state_dir().name(), open, error)?;
        if !open.progress.is_decided() && !open.progress.is_copied() {
            let by = if matches!(decision, Decision::Undecidable(_)) { "user" } else { "resolver" };
            journal.append(
                id,
                Stage::Resolved(side),
                details(json!({"witness": witness.name(), "by": by})),
            )?;
        }
        let mut warnings = Vec::new();
        match side {
            Side::Target => conclude_target(journal, id, &mut warnings)?,
            Side::Source if open.progress.is_copied() => {
                for disk in &plan.disks {
                    journal.confirm_ours()?;
                    let removed = Stamp::remove(journal.state_dir(), &disk.target, &open.operation);
                    warn(&mut warnings, removed);
                }
            }
            Side::Source => {
                journal.confirm_ours()?;
                keep_stamps(journal.state_dir(), open, &mut warnings);
            }
        }
        journal.confirm_ours()?;
        // The journal says it all by now.
        if let Some(path) = &plan.witness {
            warn(&mut warnings, Witness::remove(path));
        }
        journal.append(id, Stage::Done, Map::new())?;
        let operation = journal.last().cloned().unwrap_or_else(|| open.clone());
        Ok(Resolved { operation, side, witness, warnings })
    }

    fn side(
        self,
        decision: Decision,
        vm: &str,
        open: &OperationLog,
        source: Option<WitnessError>,
    ) -> Result<Side, ResolveError> {
        let id = open.id();
        let decided = match (decision, self.choice) {
            (Decision::Undecidable(_), Some(choice)) => return Ok(choice),
            (Decision::Undecidable(why), None) => {
                let disks = &open.plan.disks;
                let names = |paths: Vec<String>| paths.join(", ");
                let sources =
                    names(disks.iter().map(|disk| disk.source.path.display().to_string()).collect());
                let targets =
                    names(disks.iter().map(|disk| disk.target.path.display().to_string()).collect());
                let vm = vm.to_owned();
                return Err(ResolveError::Undecidable {
                    vm,
                    id,
                    why,
                    sources,
                    targets,
                    source: source.map(Box::new),
                });
            }
            (Decision::Target, _) => Side::Target,
            (Decision::Source | Decision::Nothing, _) => Side::Source,
        };
        match self.choice {
            Some(choice) if choice != decided => Err(ResolveError::Decided { id, decided }),
            _ => Ok(decided),
        }
    }
}

impl Default for Resolver {
    fn default() -> Self {
        Self::new()
    }
}

/// After the decision for the targets: the durable configuration, then the stamps. Whoever coordinates a pivot to its
/// end does the same, with the VM alive. What has been done is not done again.
///
/// A stamp that cannot be set or removed does not hold this up: the durable configuration protects the disk. It is told
/// in `warnings`.
///
/// # Errors
/// The durable configuration or the journal cannot be written.
pub fn conclude_target(
    journal: &mut Journal,
    id: Uuid,
    warnings: &mut Vec<String>,
) -> Result<(), ResolveError> {
    let state = journal.state_dir().clone();
    let open = journal.open_operation().filter(|open| open.id() == id);
    let open = open.ok_or(JournalError::NotOpen { id })?.clone();
    let (operation, plan) = (open.operation, &open.plan);
    journal.confirm_ours()?;
    if !open.progress.is_configured() {
        DurableDisks::commit(&state, operation, plan)?;
        journal.append(id, Stage::ConfigCommitted, Map::new())?;
    }
    for disk in &plan.disks {
        journal.confirm_ours()?;
        warn(warnings, Stamp::remove(&state, &disk.target, &operation));
    }
    if plan.flags.retire_source && !open.progress.is_retired() {
        let failed = warnings.len();
        for disk in &plan.disks {
            let kind = StampKind::Superseded { by: disk.target.path.clone() };
            let stamp = Stamp { kind, operation, vm: state.name().to_owned() };
            journal.confirm_ours()?;
            warn(warnings, stamp.write(&state, &disk.source));
        }
        if warnings.len() == failed {
            journal.append(id, Stage::SourceRetired, Map::new())?;
        }
    }
    Ok(())
}

/// After the decision for the sources: the targets stay stamped, but those that were there before and that nothing was
/// copied to. A stamp that can be read may not last yet.
fn keep_stamps(state: &StateDir, open: &OperationLog, warnings: &mut Vec<String>) {
    for (index, disk) in open.plan.disks.iter().enumerate() {
        let target = &disk.target;
        if !open.has_made(index) && !open.may_have_copied() {
            warn(warnings, Stamp::uncover(state, target, &open.operation));
            continue;
        }
        match Stamp::read(state, target) {
            Ok(Some(stamp)) if stamp.operation.id == open.id() => warn(warnings, stamp.write(state, target)),
            Ok(_) => {}
            Err(error) => warn::<(), _>(warnings, Err(error)),
        }
    }
}

fn warn<T, E: std::error::Error>(warnings: &mut Vec<String>, result: Result<T, E>) {
    if let Err(error) = result {
        let because = error.source().map(|source| format!(": {source}")).unwrap_or_default();
        warnings.push(format!("{error}{because}"));
    }
}

fn details(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests;
