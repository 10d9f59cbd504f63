//! The loop of an operation, and its steps up to the decision.

use std::path::Path;
use std::time::Instant;

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::freeze::Freezer;
use super::report::{Observer, Report, Timeline};
use super::request::Settings;
use super::vm::{DiskNow, JobNow, Orders, VmSession};
use super::{Connection, OperationError, Recovery};
use crate::durable::{self, DurableError};
use crate::journal::{
    ImageId, Journal, JournalError, OperationKind, OperationLog, Outcome, Plan, Progress, Protocol, Side,
    Stage,
};
use crate::record::Operation;
use crate::record::witness::Witness;
use crate::stamp::{Stamp, StampKind};
use crate::{SessionError, chain, failpoint};

/// Why a step cannot be done.
#[derive(Debug)]
pub(super) enum Halt {
    /// The VM or the guest refuses, definitely: nothing was done.
    Abort(String),
    /// Nobody knows whether it was done.
    Unknown(String),
    /// Another client has moved disks, and nobody but a person can bring them together again. The VM is stopped.
    Stopped { reason: String, next: String },
    /// What has to be written down cannot be.
    Journal(JournalError),
    /// The same, of another file.
    Durable(DurableError),
}

/// One coordinator of one operation.
pub(super) struct Runner<'a> {
    pub(super) journal: Journal,
    pub(super) id: Uuid,
    pub(super) connection: Connection,
    pub(super) vm: VmSession,
    pub(super) freezer: Option<Freezer>,
    pub(super) settings: Settings,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) timeline: Timeline,
    pub(super) began: Instant,
    pub(super) copying_since: Option<Instant>,
    pub(super) frozen_since: Option<Instant>,
    pub(super) paused_since: Option<Instant>,
    pub(super) warnings: Vec<String>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(
        journal: Journal,
        id: Uuid,
        connection: &Connection,
        settings: Settings,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, SessionError> {
        let vm = VmSession::connect(&connection.monitor)?;
        Ok(Self::with_session(journal, id, connection, vm, settings, observer))
    }

    pub(super) fn with_session(
        journal: Journal,
        id: Uuid,
        connection: &Connection,
        vm: VmSession,
        settings: Settings,
        observer: &'a mut dyn Observer,
    ) -> Self {
        Self {
            journal,
            id,
            connection: connection.clone(),
            vm,
            freezer: None,
            settings,
            observer,
            timeline: Timeline::default(),
            began: Instant::now(),
            copying_since: None,
            frozen_since: None,
            paused_since: None,
            warnings: Vec::new(),
        }
    }

    pub(super) fn begin(mut self, plan: &Plan, details: Map<String, Value>) -> Result<Self, OperationError> {
        self.journal.begin(self.id, plan, details)?;
        self.observer.stage(self.id, Stage::Planned);
        Ok(self)
    }

    /// To the end, whatever that is.
    pub(super) fn run(mut self) -> Result<Report, OperationError> {
        self.finish()?;
        let operation = self.log();
        match operation.outcome() {
            Outcome::Pivoted | Outcome::Completed => Ok(Report::of(&operation, self.timeline, self.warnings)),
            Outcome::Aborted | Outcome::Open => {
                let reason = operation.detail("reason").and_then(Value::as_str).unwrap_or("nobody said why");
                Err(OperationError::Aborted {
                    id: self.id,
                    reason: reason.to_owned(),
                    warnings: self.warnings,
                })
            }
        }
    }

    pub(super) fn resume(mut self) -> Result<Report, OperationError> {
        let progress = self.progress();
        if progress.decision().is_none() && !progress.is_intended() && !progress.is_ending() {
            // What was held in between was held in vain.
            self.release().map_err(|halt| self.left(halt))?;
        }
        self.run()
    }

    pub(super) fn abort(self) -> Result<Recovery, OperationError> {
        if self.progress().decision() == Some(Side::Target) {
            let vm = self.vm_for_commands();
            let text = format!(
                "Operation {} is decided: its targets are the disks. `tarn recover {vm}` finishes it",
                self.id
            );
            return Err(OperationError::Refused(text));
        }
        if self.progress().is_copied() {
            let vm = self.vm_for_commands();
            let text =
                format!("The copies of operation {} are complete: `tarn recover {vm}` finishes it", self.id);
            return Err(OperationError::Refused(text));
        }
        let id = self.id;
        let recovery = self.settle("It was aborted by its user")?;
        match &recovery.operation {
            Some(operation) if operation.outcome() == Outcome::Pivoted => {
                let text = format!("Operation {id} was past that: its disks have moved, and it is finished");
                Err(OperationError::Refused(text))
            }
            _ => Ok(recovery),
        }
    }

    pub(super) fn recover(self) -> Result<Recovery, OperationError> {
        self.settle("Its coordinator was gone")
    }

    /// Finishes what is decided and undoes the rest.
    fn settle(mut self, reason: &str) -> Result<Recovery, OperationError> {
        let found = self.progress().last();
        let settled = self.settle_decision(reason);
        settled.map_err(|halt| self.left(halt))?;
        self.finish()?;
        let operation = self.log();
        let moved = operation.progress.decision() == Some(Side::Target);
        let end = match operation.outcome() {
            Outcome::Aborted => "nothing was decided, and all is undone",
            Outcome::Completed => "its copies were complete, and it is finished",
            _ => "it was decided, and is finished",
        };
        let mut story = vec![format!("Operation {} was left at {}. {reason}: {end}", self.id, found.name())];
        story.extend(operation.plan.disks.iter().map(|disk| {
            let image = if moved { &disk.target } else { &disk.source };
            format!("disk '{}' is {}", disk.disk, image.path.display())
        }));
        let (found, warnings) = (Some(found), self.warnings);
        Ok(Recovery { operation: Some(operation), found, story, warnings })
    }

    fn settle_decision(&mut self, reason: &str) -> Result<(), Halt> {
        let progress = self.progress();
        if progress.decision().is_some() || progress.is_copied() {
            return Ok(());
        }
        if progress.is_intended() && self.plan().protocol == Protocol::A {
            return self.ask_what_became_of_it(Some(reason));
        }
        self.abort_live(json!({"reason": reason}))
    }

    /// Step after step, until the operation is done.
    fn finish(&mut self) -> Result<(), OperationError> {
        while !self.progress().is_done() {
            let Err(halt) = self.step() else { continue };
            let progress = self.progress();
            match halt {
                // Whatever it was, no guest has written to a target, unless another client has moved it there.
                Halt::Abort(reason) | Halt::Unknown(reason)
                    if progress.decision().is_none() && !progress.is_intended() && !progress.is_copied() =>
                {
                    self.abort_live(json!({"reason": reason})).map_err(|halt| self.left(halt))?;
                }
                halt => return Err(self.left(halt)),
            }
        }
        Ok(())
    }

    /// What comes next, by the journal alone.
    fn step(&mut self) -> Result<(), Halt> {
        let (log, progress) = (self.log(), self.progress());
        let kind = log.plan.kind;
        let has = |stage| log.entry(stage).is_some();
        match (progress.decision(), kind) {
            (Some(Side::Target), _) if progress.is_decided() => return self.conclude_target(),
            (Some(Side::Target), _) => return self.finalize_all(),
            (Some(Side::Source), _) => return self.conclude_source(),
            (None, _) if progress.is_intended() => return self.decide_further(),
            (None, _) if progress.is_copied() || progress.is_ending() => {}
            (None, _) => self.go_on()?,
        }
        match kind {
            _ if progress.is_copied() => self.conclude_copy(),
            _ if !has(Stage::Prepared) => self.prepare(),
            OperationKind::Backup if !has(Stage::Mirroring) => self.hold_all().and_then(|()| self.back_up()),
            OperationKind::Backup => self.await_backup().and_then(|()| self.complete()),
            _ if !has(Stage::Mirroring) => self.mirror(),
            _ if !has(Stage::Ready) => self.mirror_again().and_then(|()| self.await_ready()),
            OperationKind::Mirror if progress.is_ending() => self.await_end(),
            OperationKind::Mirror => self.hold_all().and_then(|()| self.end_mirrors()),
            OperationKind::Pivot => self.hold_all().and_then(|()| self.decide()),
        }
    }

    /// Targets with their stamps, and the witness.
    fn prepare(&mut self) -> Result<(), Halt> {
        let mut plan = self.plan();
        let (state, operation) = (self.journal.state_dir().clone(), self.operation());
        let created: Vec<bool> = plan.disks.iter().map(|disk| disk.target.file.is_none()).collect();
        let now = self.disks_now()?;
        // An image that is there may be in use, as somebody's disk: the VM finds out before it is stamped.
        for index in (0..now.len()).filter(|index| !created[*index]) {
            self.open_target(index, &now[index])?;
        }
        for (disk, created) in plan.disks.iter_mut().zip(&created) {
            let stamp = Stamp { kind: StampKind::Incomplete, operation, vm: state.name().to_owned() };
            let abort = |error: &dyn std::error::Error| Halt::Abort(chain(error));
            self.confirm_ours()?;
            if *created {
                let was_ours = stamp.claim(&state, &disk.target.path).map_err(|error| abort(&error))?;
                // By this operation, before somebody died.
                if was_ours && is_untouched(&disk.target.path) {
                    durable::remove_image(&disk.target.path).map_err(|error| abort(&error))?;
                }
                self.confirm_ours()?;
                let made = durable::create_image(&disk.target.path, disk.target.size);
                if made.as_ref().is_err_and(DurableError::is_already_there) {
                    // Somebody else's: a stamp would keep it from being booted.
                    let removed = Stamp::remove(&state, &disk.target, &operation);
                    removed.map_err(|error| abort(&error))?;
                }
                made.map_err(|error| abort(&error))?;
            } else {
                stamp.cover(&state, &disk.target).map_err(|error| abort(&error))?;
            }
            let image = ImageId::of(&disk.target.locate().map_err(|error| abort(&error))?);
            disk.target = image.map_err(|error| Halt::Abort(error.to_string()))?;
        }
        if let Some(path) = plan.witness.as_deref().filter(|path| !path.exists()) {
            self.confirm_ours()?;
            Witness::create(path).map_err(|error| Halt::Abort(chain(&error)))?;
        }
        let details = map(json!({"created": created}));
        self.journal.append_plan(self.id, Stage::Prepared, &plan, details)?;
        self.observer.stage(self.id, Stage::Prepared);
        Ok(())
    }
}

/// What the steps stand on.
impl Runner<'_> {
    pub(super) fn log(&self) -> OperationLog {
        let found = self.journal.operations().iter().rev().find(|operation| operation.id() == self.id);
        found.cloned().unwrap_or_else(|| unreachable!("an operation that has begun is in its journal"))
    }

    fn vm_for_commands(&self) -> String {
        self.log().vm_for_commands(self.journal.state_dir().name())
    }

    pub(super) fn progress(&self) -> Progress {
        self.log().progress
    }

    pub(super) fn plan(&self) -> Plan {
        self.log().plan
    }

    /// As this coordinator speaks of it.
    pub(super) fn operation(&self) -> Operation {
        Operation { epoch: self.journal.epoch(), ..self.log().operation }
    }

    pub(super) fn append(&mut self, stage: Stage, details: Value) -> Result<Operation, Halt> {
        let operation = self.journal.append(self.id, stage, map(details))?;
        self.observer.stage(self.id, stage);
        Ok(operation)
    }

    /// Before anything that others can see: whoever was taken over from leaves it to his heir.
    pub(super) fn confirm_ours(&self) -> Result<(), Halt> {
        Ok(self.journal.confirm_ours()?)
    }

    /// The VM, to change something in it.
    pub(super) fn orders(&mut self) -> Result<Orders<'_>, Halt> {
        self.confirm_ours()?;
        Ok(self.vm.orders())
    }

    /// Of a disk's job and of its target's node.
    pub(super) fn name(&self, index: usize) -> String {
        let id = self.id.simple().to_string();
        format!("tarn-{}-{index}", &id[..8])
    }

    /// Whose pause it is, for a VM that knows of operations.
    pub(super) fn holder(&self) -> Option<Uuid> {
        (self.plan().protocol == Protocol::A).then_some(self.id)
    }

    pub(super) fn disks_now(&mut self) -> Result<Vec<DiskNow>, Halt> {
        let mut disks = Vec::new();
        for plan in self.plan().disks {
            let disk = self.vm.disk(&plan.disk)?;
            disks.push(disk.ok_or_else(|| Halt::Abort(format!("The VM has no disk '{}'", plan.disk)))?);
        }
        Ok(disks)
    }

    /// The operation's jobs, all of them.
    pub(super) fn jobs_now(&mut self) -> Result<Vec<JobNow>, Halt> {
        let jobs = self.vm.jobs()?;
        let wanted = (0..self.plan().disks.len()).map(|index| self.name(index));
        wanted
            .map(|name| {
                let found = jobs.iter().find(|job| job.id == name).cloned();
                found.ok_or_else(|| Halt::Abort(format!("Job '{name}' is gone: another client has ended it")))
            })
            .collect()
    }

    /// Where a test may let this process die.
    #[expect(clippy::unused_self, reason = "it is a place of a coordinator")]
    pub(super) fn place(&self, step: &str, point: &str) -> Result<(), Halt> {
        failpoint::pass(["coordinator", step, point]).map_err(|error| Halt::Unknown(error.to_string()))
    }

    /// The operation stays open.
    fn left(&mut self, halt: Halt) -> OperationError {
        self.let_go(&halt);
        self.unsettled(halt)
    }

    fn unsettled(&self, halt: Halt) -> OperationError {
        let vm = self.journal.state_dir().name();
        let next = format!("Now {}", self.log().what_next(vm));
        let (reason, next) = match halt {
            Halt::Abort(reason) | Halt::Unknown(reason) => (reason, next),
            Halt::Stopped { reason, next } => (reason, next),
            Halt::Journal(error @ JournalError::Fenced { .. }) => {
                let next = format!("This one does nothing more; `tarn op show {vm}` tells how far it is");
                (chain(&error), next)
            }
            Halt::Journal(error) => (chain(&error), next),
            Halt::Durable(error) => (chain(&error), next),
        };
        OperationError::Unsettled { id: self.id, reason, next }
    }
}

/// A file that nothing has been written to.
pub(super) fn is_untouched(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.blocks() == 0)
}

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

impl From<SessionError> for Halt {
    fn from(error: SessionError) -> Self {
        match error.refusal() {
            Some(refusal) => Self::Abort(refusal.desc.clone()),
            None => Self::Unknown(chain(&error)),
        }
    }
}

impl From<JournalError> for Halt {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

impl From<DurableError> for Halt {
    fn from(error: DurableError) -> Self {
        Self::Durable(error)
    }
}
