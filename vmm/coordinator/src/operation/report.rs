//! What is told of an operation: while it runs, and when it is over.

use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::journal::{Consistency, DiskPlan, OperationKind, OperationLog, Outcome, Stage};

/// How far a copy is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Copying {
    /// Bytes done, of all disks.
    pub done: u64,
    /// Bytes in all, as far as is known.
    pub total: u64,
    /// How long it will take, as the VM expects.
    pub remaining: Option<Duration>,
    /// How long the guest would be held for the end, as the VM expects.
    pub expected_hold: Option<Duration>,
}

/// Is told how an operation goes.
pub trait Observer {
    /// The operation has come to this stage, durably.
    fn stage(&mut self, id: Uuid, stage: Stage);
    /// How far the copy is.
    fn copying(&mut self, copying: &Copying);
    /// Whether its user wants it to end: it is undone, unless it is decided, or about to be.
    fn wants_end(&mut self) -> bool {
        false
    }
}

/// Listens to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn stage(&mut self, _: Uuid, _: Stage) {}
    fn copying(&mut self, _: &Copying) {}
}

/// How long what took; `None` where it was not done, or by a coordinator that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// From the first byte copied until all mirrors were ready, or the backup was complete.
    pub copied: Option<Duration>,
    /// Filesystems of the guest were frozen.
    pub frozen: Option<Duration>,
    /// The VM was stopped.
    pub paused: Option<Duration>,
    /// The guest's I/O was held by the pivot.
    pub held: Option<Duration>,
    /// From the beginning to the end.
    pub whole: Option<Duration>,
}

impl Timeline {
    /// Milliseconds, with three places.
    pub fn to_json(self) -> Value {
        let ms = |duration: Option<Duration>| {
            duration.map(|duration| (duration.as_secs_f64() * 1e6).round() / 1e3)
        };
        let Self { copied, frozen, paused, held, whole } = self;
        json!({
            "copied-ms": ms(copied),
            "frozen-ms": ms(frozen),
            "paused-ms": ms(paused),
            "held-ms": ms(held),
            "whole-ms": ms(whole),
        })
    }
}

/// How an operation went that did what was asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// It.
    pub id: Uuid,
    /// What it was.
    pub kind: OperationKind,
    /// How it ended.
    pub outcome: Outcome,
    /// What the copy is worth: of the targets at the moment of the pivot, or of the copy.
    pub consistency: Consistency,
    /// Its disks.
    pub disks: Vec<DiskPlan>,
    /// How long what took.
    pub timeline: Timeline,
    /// What of the rest could not be done.
    pub warnings: Vec<String>,
}

impl Report {
    pub(super) fn of(operation: &OperationLog, timeline: Timeline, warnings: Vec<String>) -> Self {
        Self {
            id: operation.id(),
            kind: operation.plan.kind,
            outcome: operation.outcome(),
            consistency: operation.consistency().unwrap_or(Consistency::Crash),
            disks: operation.plan.disks.clone(),
            timeline,
            warnings,
        }
    }

    /// For `--json`.
    pub fn to_json(&self) -> Value {
        let Self { id, kind, outcome, consistency, disks, timeline, warnings } = self;
        json!({
            "id": id,
            "kind": kind,
            "outcome": outcome,
            "consistency": consistency,
            "disks": disks,
            "timeline": timeline.to_json(),
            "warnings": warnings,
        })
    }
}
