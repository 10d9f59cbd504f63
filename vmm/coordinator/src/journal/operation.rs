//! The operations of a journal, folded from its records.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::plan::Plan;
use super::stage::{Misplaced, OperationKind, Progress, Side, Stage};
use crate::record::{Operation, Record};

/// Details of the first entry: the sockets of a VM that is another VMM's.
pub(crate) const MONITOR: &str = "monitor";
pub(crate) const AGENT: &str = "agent";

/// What a record says, beside its stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Payload {
    /// Wall clock, milliseconds since 1970: for people only.
    #[serde(default)]
    pub(super) at: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) plan: Option<Plan>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub(super) details: Map<String, Value>,
}

/// One step of an operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Which.
    pub stage: Stage,
    /// Of the coordinator that took it.
    pub epoch: u64,
    /// Wall clock, milliseconds since 1970: for people only, no decision depends on it.
    pub at: u64,
    /// Whatever belongs to it.
    pub details: Map<String, Value>,
}

/// What a copy may be trusted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// As after a power loss.
    Crash,
    /// Filesystems were frozen.
    Filesystem,
    /// They were, and the hooks of applications ran.
    Application,
    /// The guest thawed by itself in between: as after a power loss.
    Void,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Nobody knows yet.
    Open,
    /// The targets are the disks.
    Pivoted,
    /// A mirror or backup has reached its end.
    Completed,
    /// The sources are the disks, as before.
    Aborted,
}

/// An operation, from its beginning as far as it has come.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationLog {
    /// Id and generation; the epoch is that of the last record.
    pub operation: Operation,
    /// What it is about, as the last record that says has it.
    pub plan: Plan,
    /// How far it has come.
    pub progress: Progress,
    /// Its steps.
    pub entries: Vec<Entry>,
}

impl OperationLog {
    /// Its id.
    pub fn id(&self) -> Uuid {
        self.operation.id
    }

    /// Its last step.
    pub fn stage(&self) -> Stage {
        self.progress.last()
    }

    /// Whether something is left to do.
    pub fn is_open(&self) -> bool {
        !self.progress.is_done()
    }

    /// What became of it.
    pub fn outcome(&self) -> Outcome {
        let moved = self.progress.decision();
        match (self.plan.kind, moved) {
            (OperationKind::Pivot, Some(Side::Target)) => Outcome::Pivoted,
            (OperationKind::Mirror | OperationKind::Backup, _)
                if self.progress.is_done() && self.entry(Stage::Aborted).is_none() && !self.is_resolved() =>
            {
                Outcome::Completed
            }
            (_, Some(_)) => Outcome::Aborted,
            (_, None) => Outcome::Open,
        }
    }

    fn is_resolved(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry.stage, Stage::Resolved(_)))
    }

    /// The last step of this kind.
    pub fn entry(&self, stage: Stage) -> Option<&Entry> {
        self.entries.iter().rev().find(|entry| entry.stage == stage)
    }

    /// What the last step that has this detail says.
    pub fn detail(&self, name: &str) -> Option<&Value> {
        self.entries.iter().rev().find_map(|entry| entry.details.get(name))
    }

    /// Where the monitor of its VM was, if that is another VMM's: see
    /// [`Connection::foreign`](crate::operation::Connection::foreign).
    pub fn foreign_monitor(&self) -> Option<&str> {
        self.detail(MONITOR).and_then(Value::as_str)
    }

    /// What commands about it have to be told for `vm`.
    pub fn vm_for_commands(&self, vm: &str) -> String {
        let socket = |name| self.detail(name).and_then(Value::as_str);
        let mut text = vm.to_owned();
        for (option, socket) in [("--monitor", socket(MONITOR)), ("--agent", socket(AGENT))] {
            if let Some(socket) = socket {
                text += &format!(" {option} {socket}");
            }
        }
        text
    }

    /// Whether anything may have been written to its targets.
    pub fn may_have_copied(&self) -> bool {
        self.entry(Stage::Mirroring).is_some()
    }

    /// Whether the target of its disk `index` was not there before.
    pub(crate) fn has_made(&self, index: usize) -> bool {
        match self.detail("created").and_then(Value::as_array) {
            Some(created) => created.get(index) == Some(&Value::Bool(true)),
            // Before it was prepared, an image that was not there has no identity in the plan.
            None => self.plan.disks.get(index).is_some_and(|disk| disk.target.file.is_none()),
        }
    }

    /// What the copies may be trusted with, if it is known: the detail `consistency`.
    pub fn consistency(&self) -> Option<Consistency> {
        serde_json::from_value(self.detail("consistency")?.clone()).ok()
    }

    /// When it began, by the wall clock: milliseconds since 1970.
    pub fn began(&self) -> u64 {
        self.entries.first().map_or(0, |entry| entry.at)
    }

    /// When its last step was taken, by the wall clock: milliseconds since 1970.
    pub fn changed(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.at)
    }

    /// While it is open: what is known of it, and the commands that go on from here. `vm` is the VM's name.
    pub fn what_next(&self, vm: &str) -> String {
        let (progress, vm) = (self.progress, self.vm_for_commands(vm));
        let finish = format!("`tarn recover {vm}` finishes it");
        match progress.decision() {
            Some(Side::Target) => format!("its targets are the disks, and {finish}"),
            Some(Side::Source) => format!("its sources stay the disks, and {finish}"),
            None if progress.is_copied() => format!("its copies are complete, and {finish}"),
            None if progress.is_intended() => {
                format!(
                    "it may have moved the disks: `tarn recover {vm}` finds out, and finishes or undoes it"
                )
            }
            None => format!(
                "nothing is decided: `tarn op resume {vm}` goes on with it, `tarn recover {vm}` undoes it"
            ),
        }
    }

    /// For `--json`: the operation in a few members, and with `steps` each of them.
    pub fn to_json(&self, steps: bool) -> Value {
        let mut object = json!({
            "id": self.id(),
            "kind": self.plan.kind,
            "protocol": self.plan.protocol,
            "state": self.stage().name(),
            "outcome": self.outcome(),
            "generation": self.operation.generation,
            "began-ms": self.began(),
            "changed-ms": self.changed(),
            "disks": self.plan.disks,
            "flags": self.plan.flags,
            "consistency": self.consistency(),
        });
        if steps {
            let step = |entry: &Entry| {
                let Entry { stage, epoch, at, details } = entry;
                json!({"stage": stage.name(), "epoch": epoch, "at-ms": at, "details": details})
            };
            object["steps"] = self.entries.iter().map(step).collect();
            object["witness"] = json!(self.plan.witness);
        }
        object
    }

    /// Whether its record of a decision says that the targets are the disks.
    fn has_moved(&self) -> bool {
        let Self { plan, progress, .. } = self;
        plan.kind == OperationKind::Pivot
            && progress.is_decided()
            && progress.decision() == Some(Side::Target)
    }

    /// The journal's generation after its last step.
    pub(super) fn generation_after(&self) -> u64 {
        self.operation.generation - u64::from(!self.has_moved())
    }

    /// The first record of an operation.
    pub(super) fn begin(operation: Operation, payload: Payload) -> Option<Self> {
        let plan = payload.plan.clone()?;
        let progress = Progress::planned(plan.kind, plan.protocol);
        let entries = vec![entry(Stage::Planned, operation, payload)];
        Some(Self { operation, plan, progress, entries })
    }

    pub(super) fn follow(
        &mut self,
        stage: Stage,
        operation: Operation,
        payload: Payload,
    ) -> Result<(), Misplaced> {
        self.progress = self.progress.on(stage)?;
        if let Some(plan) = &payload.plan {
            self.plan = plan.clone();
        }
        self.operation = operation;
        self.entries.push(entry(stage, operation, payload));
        Ok(())
    }
}

fn entry(stage: Stage, operation: Operation, payload: Payload) -> Entry {
    Entry { stage, epoch: operation.epoch, at: payload.at, details: payload.details }
}

/// The number of the record by which a coordinator takes the journal over.
pub(super) const EPOCH: u16 = 1;

/// What a journal says, all in all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Folded {
    pub(super) operations: Vec<OperationLog>,
    pub(super) epoch: u64,
    /// Of the last operation whose targets became the disks.
    pub(super) generation: u64,
}

impl Folded {
    /// All records; the error is the index of the one that makes no sense, and why.
    pub(super) fn of(records: &[Record]) -> Result<Self, (usize, String)> {
        let mut folded = Self::default();
        for (index, record) in records.iter().enumerate() {
            folded.add(record).map_err(|why| (index, why))?;
        }
        Ok(folded)
    }

    /// One more.
    pub(super) fn add(&mut self, record: &Record) -> Result<(), String> {
        let Record { kind, operation, payload, .. } = record;
        self.epoch = operation.epoch;
        if *kind == EPOCH {
            self.generation = self.generation.max(operation.generation);
            return Ok(());
        }
        let stage = Stage::by_number(*kind).ok_or_else(|| format!("A record of unknown kind {kind}"))?;
        let payload: Payload = serde_json::from_value(payload.clone()).map_err(|error| error.to_string())?;
        if stage == Stage::Planned {
            self.begin(*operation, payload)
        } else {
            self.follow(stage, *operation, payload)
        }
    }

    fn begin(&mut self, operation: Operation, payload: Payload) -> Result<(), String> {
        if let Some(open) = self.operations.last().filter(|last| last.is_open()) {
            return Err(format!("Operation {} begins before {} has ended", operation.id, open.id()));
        }
        if operation.generation != self.generation + 1 {
            return Err(format!("Generation {} follows {}", operation.generation, self.generation));
        }
        let begun = OperationLog::begin(operation, payload);
        self.operations.push(begun.ok_or("An operation without a plan")?);
        Ok(())
    }

    fn follow(&mut self, stage: Stage, operation: Operation, payload: Payload) -> Result<(), String> {
        let last = self.operations.last_mut().filter(|last| last.id() == operation.id);
        let last = last.ok_or_else(|| format!("Operation {} has not begun", operation.id))?;
        if last.operation.generation != operation.generation {
            return Err(format!("Operation {} changes its generation", operation.id));
        }
        last.follow(stage, operation, payload).map_err(|misplaced| misplaced.to_string())?;
        if last.has_moved() {
            self.generation = operation.generation;
        }
        Ok(())
    }
}
