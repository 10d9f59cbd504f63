//! The loop of an operation, and its steps up to the decision.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::freeze::Freezer;
use super::report::{Copying, Observer, Report, Timeline};
use super::request::Settings;
use super::vm::{DiskNow, JobNow, VmSession};
use super::{Connection, OperationError, Recovery};
use crate::durable::{self, DurableError};
use crate::journal::{
    Hold, ImageId, Journal, JournalError, OperationKind, OperationLog, Outcome, Plan, Progress, Protocol,
    Side, Stage,
};
use crate::record::Operation;
use crate::record::witness::Witness;
use crate::stamp::{Stamp, StampKind};
use crate::{SessionError, failpoint};

/// How often a copy is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a mirror may be above the longest hold before each write goes to both images, and before it is given up.
const CONVERGE: Duration = Duration::from_secs(10);
const NEVER_CONVERGES: Duration = Duration::from_secs(60);
/// How long mirrors may take to end.
const PATIENCE: Duration = Duration::from_secs(300);

/// Why a step cannot be done.
#[derive(Debug)]
pub(super) enum Halt {
    /// The VM or the guest refuses, definitely: nothing was done.
    Abort(String),
    /// Nobody knows whether it was done.
    Unknown(String),
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
        if !progress.is_decided() && !progress.is_intended() {
            // What was held in between was held in vain.
            self.release().map_err(|halt| self.left(halt))?;
        }
        self.run()
    }

    pub(super) fn abort(self) -> Result<Recovery, OperationError> {
        if self.progress().decision() == Some(Side::Target) {
            let text = format!("Operation {} is decided: its targets are the disks", self.id);
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
        if progress.decision().is_some() {
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
                    if progress.decision().is_none() && !progress.is_intended() =>
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
            (None, _) => {}
        }
        match kind {
            _ if !has(Stage::Prepared) => self.prepare(),
            OperationKind::Backup if !has(Stage::Mirroring) => self.hold_all().and_then(|()| self.back_up()),
            OperationKind::Backup => self.await_backup().and_then(|()| self.conclude_copy()),
            _ if !has(Stage::Mirroring) => self.mirror(),
            _ if !has(Stage::Ready) => self.mirror_again().and_then(|()| self.await_ready()),
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
            if *created {
                let was_ours = stamp.claim(&state, &disk.target.path).map_err(|error| abort(&error))?;
                // By this operation, before somebody died.
                if was_ours && is_untouched(&disk.target.path) {
                    durable::remove_image(&disk.target.path).map_err(|error| abort(&error))?;
                }
                let made = durable::create_image(&disk.target.path, disk.target.size);
                if made.as_ref().is_err_and(DurableError::is_already_there) {
                    // Somebody else's: a stamp would keep it from being booted.
                    let removed = Stamp::remove(&state, &disk.target.path, &operation);
                    removed.map_err(|error| abort(&error))?;
                }
                made.map_err(|error| abort(&error))?;
            } else {
                stamp.write(&state, &disk.target.path).map_err(|error| abort(&error))?;
            }
            let image = ImageId::of(&disk.target.path);
            disk.target = image.map_err(|error| Halt::Abort(error.to_string()))?;
        }
        if let Some(path) = plan.witness.as_deref().filter(|path| !path.exists()) {
            Witness::create(path).map_err(|error| Halt::Abort(chain(&error)))?;
        }
        let details = map(json!({"created": created}));
        self.journal.append_plan(self.id, Stage::Prepared, &plan, details)?;
        self.observer.stage(self.id, Stage::Prepared);
        Ok(())
    }

    fn mirror(&mut self) -> Result<(), Halt> {
        let nodes = self.disks_now()?.into_iter().map(|disk| disk.node).collect::<Vec<_>>();
        self.append(Stage::Mirroring, json!({"nodes": nodes}))?;
        self.mirror_again()
    }

    /// Begins what does not run yet.
    fn mirror_again(&mut self) -> Result<(), Halt> {
        self.copying_since.get_or_insert_with(Instant::now);
        let (disks, jobs) = (self.disks_now()?, self.vm.jobs()?);
        for (index, disk) in disks.iter().enumerate() {
            let name = self.name(index);
            if jobs.iter().any(|job| job.id == name) {
                continue;
            }
            self.place("mirror", "before")?;
            self.open_target(index, disk)?;
            self.vm.mirror(&name, disk, &name, self.settings.copy_mode)?;
            self.place("mirror", "done")?;
        }
        Ok(())
    }

    pub(super) fn open_target(&mut self, index: usize, disk: &DiskNow) -> Result<(), Halt> {
        let (name, plan) = (self.name(index), self.plan());
        // One that another coordinator has opened, and not used.
        match self.vm.remove_node(&name) {
            Err(error) if error.refusal().is_none() => return Err(error.into()),
            _ => {}
        }
        Ok(self.vm.add_node(&name, &plan.disks[index].target.path, disk)?)
    }

    fn await_ready(&mut self) -> Result<(), Halt> {
        loop {
            let jobs = self.jobs_now()?;
            if let Some(job) =
                jobs.iter().find(|job| !matches!(job.status.as_str(), "created" | "running" | "ready"))
            {
                return Err(Halt::Abort(ended(job)));
            }
            self.tell(&jobs);
            if jobs.iter().all(|job| job.status == "ready") {
                break;
            }
            self.vm.await_event(LOOK)?;
        }
        self.timeline.copied = self.copying_since.map(|since| since.elapsed());
        self.append(Stage::Ready, json!({})).map(drop)
    }

    /// Waits until the guest would not be held for too long.
    fn converge(&mut self) -> Result<(), Halt> {
        let Some(limit) = self.settings.max_hold else { return Ok(()) };
        let (began, mut write_blocking) = (Instant::now(), false);
        loop {
            let jobs = self.jobs_now()?;
            self.tell(&jobs);
            let longest = jobs.iter().filter_map(|job| job.expected_hold).max().unwrap_or_default();
            if longest <= limit {
                return Ok(());
            }
            if began.elapsed() > NEVER_CONVERGES {
                return Err(Halt::Abort(format!(
                    "The guest writes so fast that it would have to be held for {longest:?}, and at most {limit:?} is wanted"
                )));
            }
            if began.elapsed() > CONVERGE && !write_blocking {
                for job in &jobs {
                    self.vm.write_blocking(&job.id)?;
                }
                write_blocking = true;
            }
            self.vm.await_event(LOOK)?;
        }
    }

    /// Freezes and stops, where that is wanted.
    fn hold_all(&mut self) -> Result<(), Halt> {
        if self.plan().kind == OperationKind::Pivot {
            self.converge()?;
        }
        let flags = self.plan().flags;
        if flags.freeze && self.progress().freeze() == Hold::None {
            let agent = self.connection.agent.clone();
            let agent = agent.ok_or_else(|| Halt::Abort("The guest has no agent".to_owned()))?;
            let mut freezer = Freezer::connect(&agent)?;
            self.append(Stage::FreezeIntent, json!({}))?;
            self.place("freeze", "before")?;
            self.frozen_since = Some(Instant::now());
            let frozen = freezer.freeze(self.settings.lease);
            self.freezer = Some(freezer);
            let filesystems = match frozen {
                // Nothing to thaw, and not by this operation.
                Err(error) if error.refusal().is_some() => {
                    (self.freezer, self.frozen_since) = (None, None);
                    self.append(Stage::Thawed, json!({"by": "refused"}))?;
                    return Err(error.into());
                }
                frozen => frozen?,
            };
            self.place("freeze", "done")?;
            self.append(Stage::Frozen, json!({"filesystems": filesystems}))?;
        }
        if flags.pause && self.progress().pause() == Hold::None {
            let was_running = self.vm.is_running()?;
            self.append(Stage::StopIntent, json!({"was-running": was_running}))?;
            self.place("stop", "before")?;
            self.paused_since = Some(Instant::now());
            self.vm.stop(self.holder())?;
            self.place("stop", "done")?;
            self.append(Stage::Stopped, json!({}))?;
        }
        Ok(())
    }

    fn back_up(&mut self) -> Result<(), Halt> {
        let disks = self.disks_now()?;
        self.append(Stage::Mirroring, json!({}))?;
        let mut jobs = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            self.open_target(index, disk)?;
            jobs.push((self.name(index), disk.node.clone(), self.name(index)));
        }
        self.copying_since = Some(Instant::now());
        self.place("backup", "before")?;
        self.vm.backup(&jobs)?;
        self.place("backup", "done")?;
        // The copy is of this moment: the guest goes on.
        self.release()
    }

    fn await_backup(&mut self) -> Result<(), Halt> {
        loop {
            let jobs = self.jobs_now()?;
            self.tell(&jobs);
            let is_over = |job: &JobNow| job.status == "concluded";
            if let Some(job) = jobs.iter().find(|job| is_over(job) && job.error.is_some()) {
                return Err(Halt::Abort(ended(job)));
            }
            if let Some(job) = jobs.iter().find(|job| matches!(job.status.as_str(), "paused" | "standby")) {
                return Err(Halt::Abort(ended(job)));
            }
            if jobs.iter().all(is_over) {
                self.timeline.copied = self.copying_since.map(|since| since.elapsed());
                return Ok(());
            }
            self.vm.await_event(LOOK)?;
        }
    }

    /// Each mirror ends as the copy it is at that moment.
    fn end_mirrors(&mut self) -> Result<(), Halt> {
        let jobs = self.jobs_now()?;
        // One that is pending, or about to be, was completed by another client: to finalize it would move the disk.
        if let Some(job) = jobs.iter().find(|job| job.status != "ready") {
            return Err(Halt::Abort(ended(job)));
        }
        for job in jobs {
            self.vm.cancel(&job.id, false)?;
        }
        let began = Instant::now();
        loop {
            let jobs = self.jobs_now()?;
            let is_stuck = |job: &&JobNow| matches!(job.status.as_str(), "paused" | "standby");
            if let Some(job) = jobs.iter().find(is_stuck) {
                return Err(Halt::Abort(ended(job)));
            }
            if began.elapsed() > PATIENCE {
                return Err(Halt::Abort("The mirrors do not end".to_owned()));
            }
            for job in jobs.iter().filter(|job| job.status == "pending") {
                self.vm.job("finalize", &job.id)?;
            }
            if let Some(job) = jobs.iter().find(|job| job.error.is_some()) {
                return Err(Halt::Abort(ended(job)));
            }
            if jobs.iter().all(|job| job.status == "concluded") {
                break;
            }
            self.vm.await_event(LOOK)?;
        }
        self.confirm_sources()?;
        self.release()?;
        self.conclude_copy()
    }
}

/// What the steps stand on.
impl Runner<'_> {
    pub(super) fn log(&self) -> OperationLog {
        let found = self.journal.operations().iter().rev().find(|operation| operation.id() == self.id);
        found.cloned().unwrap_or_else(|| unreachable!("an operation that has begun is in its journal"))
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

    fn tell(&mut self, jobs: &[JobNow]) {
        self.observer.copying(&Copying {
            done: jobs.iter().map(|job| job.done).sum(),
            total: jobs.iter().map(|job| job.total).sum(),
            remaining: jobs.iter().filter_map(|job| job.remaining).max(),
            expected_hold: jobs.iter().filter_map(|job| job.expected_hold).max(),
        });
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
        let reason = match halt {
            Halt::Abort(reason) | Halt::Unknown(reason) => reason,
            Halt::Journal(error) => chain(&error),
            Halt::Durable(error) => chain(&error),
        };
        OperationError::Unsettled { id: self.id, vm: self.journal.state_dir().name().to_owned(), reason }
    }
}

/// A file that nothing has been written to.
pub(super) fn is_untouched(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.blocks() == 0)
}

fn ended(job: &JobNow) -> String {
    match &job.error {
        Some(error) => format!("Job '{}' failed: {error}", job.id),
        None => format!("Job '{}' is {}: another client has meddled with it", job.id, job.status),
    }
}

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// An error and its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
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
