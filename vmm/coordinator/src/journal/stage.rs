//! How far an operation has come, and what may come next. No I/O, no clock.
//!
//! ```text
//!   planned ▶ prepared ▶ mirroring ▶ ready ─┬─▶ pivot-intent ──(A: witness)──────────▶ pivoted ─▶ config-committed ─▶ …
//!                 ▲          │        │  ▲  └─▶ complete-intent ─▶ commit (B) ───────▶ pivoted         │
//!                            └────────┘  │                                                             ▼
//!                    freeze-intent ▶ frozen ▶ stop-intent ▶ stopped         resumed, thawed, source-retired ▶ done
//!
//!   a mirror:   … ready ▶ [held] ▶ end-intent ▶ copied ▶ done          a backup:   … mirroring ▶ copied ▶ done
//!
//!   decided once:  pivoted │ aborted │ resolved-source │ resolved-target       (commit decides, too, and only forward)
//! ```
//!
//! Each record is durable before what it announces (`…-intent`) or after what it reports. A mirror and a backup decide
//! nothing about which image is the disk, but once their copies are complete they are not undone any more; a backup
//! freezes before it begins to copy.

use serde::{Deserialize, Serialize};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OperationKind {
    /// The disks move to other images.
    Pivot,
    /// Other images follow the disks.
    Mirror,
    /// Other images get what the disks have at one moment.
    Backup,
}

/// Who decides a pivot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The VMM, by a witness.
    A,
    /// The coordinator, by a record in its journal.
    B,
}

/// Which image is the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The one that was.
    Source,
    /// The new one.
    Target,
}

impl Side {
    /// Its name in messages and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// What a record says about its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It has begun; nothing has changed.
    Planned,
    /// The targets are there, each stamped as incomplete.
    Prepared,
    /// The jobs that copy may run from here on.
    Mirroring,
    /// Every target follows its source.
    Ready,
    /// The guest's filesystems may be frozen from here on.
    FreezeIntent,
    /// They are.
    Frozen,
    /// The vCPUs may be stopped from here on, by this operation.
    StopIntent,
    /// They are.
    Stopped,
    /// Protocol A: the VMM may pivot from here on; the witness says whether it did.
    PivotIntent,
    /// Protocol B: the jobs may be completed as far as pending.
    CompleteIntent,
    /// Protocol B: all jobs are pending, and the targets are the disks whatever comes.
    Commit,
    /// The targets are the disks.
    Pivoted,
    /// The durable configuration names them.
    ConfigCommitted,
    /// The vCPUs go on.
    Resumed,
    /// The guest's filesystems are thawed.
    Thawed,
    /// The sources are stamped as superseded.
    SourceRetired,
    /// Nothing is left to do.
    Done,
    /// The sources stay the disks.
    Aborted,
    /// After the VMM's end: this side is the disk.
    Resolved(Side),
    /// A mirror: all jobs have been ready, and may be told to end from here on.
    EndIntent,
    /// A mirror or a backup: the targets are complete copies, and last.
    Copied,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Planned,
        Self::Prepared,
        Self::Mirroring,
        Self::Ready,
        Self::FreezeIntent,
        Self::Frozen,
        Self::StopIntent,
        Self::Stopped,
        Self::PivotIntent,
        Self::CompleteIntent,
        Self::Commit,
        Self::Pivoted,
        Self::ConfigCommitted,
        Self::Resumed,
        Self::Thawed,
        Self::SourceRetired,
        Self::Done,
        Self::Aborted,
        Self::Resolved(Side::Source),
        Self::Resolved(Side::Target),
        Self::EndIntent,
        Self::Copied,
    ];

    /// Its name, in listings and of its failpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Prepared => "prepared",
            Self::Mirroring => "mirroring",
            Self::Ready => "ready",
            Self::FreezeIntent => "freeze-intent",
            Self::Frozen => "frozen",
            Self::StopIntent => "stop-intent",
            Self::Stopped => "stopped",
            Self::PivotIntent => "pivot-intent",
            Self::CompleteIntent => "complete-intent",
            Self::Commit => "commit",
            Self::Pivoted => "pivoted",
            Self::ConfigCommitted => "config-committed",
            Self::Resumed => "resumed",
            Self::Thawed => "thawed",
            Self::SourceRetired => "source-retired",
            Self::Done => "done",
            Self::Aborted => "aborted",
            Self::Resolved(Side::Source) => "resolved-source",
            Self::Resolved(Side::Target) => "resolved-target",
            Self::EndIntent => "end-intent",
            Self::Copied => "copied",
        }
    }

    /// Number of the first in a record; those before belong to the journal itself.
    const FIRST: u16 = 16;

    /// The number in a record. Never changes.
    pub(super) fn number(self) -> u16 {
        let place = Self::ALL.iter().position(|stage| *stage == self);
        Self::FIRST + place.and_then(|place| u16::try_from(place).ok()).unwrap_or_default()
    }

    pub(super) fn by_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(Self::FIRST)?)).copied()
    }
}

/// A record that cannot follow those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} cannot follow {}", stage.name(), after.map_or("nothing", Stage::name))]
pub struct Misplaced {
    /// The record.
    pub stage: Stage,
    /// The last one before it.
    pub after: Option<Stage>,
}

/// How far the copy and the decision are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Planned,
    Prepared,
    Copying,
    Ready,
    Intent,
    Committed,
    Decided(Side),
    Done,
}

/// Something that is asked of the guest, and has to be taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hold {
    /// Not asked for, or taken back.
    #[default]
    None,
    /// Asked for; it may have happened.
    Asked,
    /// It has.
    Held,
}

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    kind: OperationKind,
    protocol: Protocol,
    last: Stage,
    phase: Phase,
    freeze: Hold,
    pause: Hold,
    configured: bool,
    retired: bool,
    ending: bool,
    copied: bool,
}

impl Progress {
    /// Of an operation that has begun.
    pub fn planned(kind: OperationKind, protocol: Protocol) -> Self {
        let (last, phase) = (Stage::Planned, Phase::Planned);
        let (freeze, pause) = (Hold::None, Hold::None);
        let (configured, retired, ending, copied) = (false, false, false, false);
        Self { kind, protocol, last, phase, freeze, pause, configured, retired, ending, copied }
    }

    /// The last record.
    pub fn last(self) -> Stage {
        self.last
    }

    /// Which image is the disk, if the journal says; a commit counts.
    pub fn decision(self) -> Option<Side> {
        match self.phase {
            Phase::Committed => Some(Side::Target),
            Phase::Decided(side) => Some(side),
            Phase::Done if self.configured => Some(Side::Target),
            Phase::Done => Some(Side::Source),
            Phase::Planned | Phase::Prepared | Phase::Copying | Phase::Ready | Phase::Intent => None,
        }
    }

    /// Whether the decision has a record of its own, so that no other one can follow.
    pub fn is_decided(self) -> bool {
        matches!(self.phase, Phase::Decided(_) | Phase::Done)
    }

    /// Whether nothing is left to do.
    pub fn is_done(self) -> bool {
        self.phase == Phase::Done
    }

    /// Whether the VMM may have been told to pivot, or to complete, and no decision is recorded.
    pub fn is_intended(self) -> bool {
        self.phase == Phase::Intent
    }

    /// Whether the durable configuration names the targets.
    pub fn is_configured(self) -> bool {
        self.configured
    }

    /// Whether the sources are stamped.
    pub fn is_retired(self) -> bool {
        self.retired
    }

    /// Whether mirrors may have been told to end as copies.
    pub fn is_ending(self) -> bool {
        self.ending
    }

    /// Whether the targets are complete copies, by a record.
    pub fn is_copied(self) -> bool {
        self.copied
    }

    /// What of the guest's filesystems is to be thawed.
    pub fn freeze(self) -> Hold {
        self.freeze
    }

    /// What of the vCPUs is to be resumed.
    pub fn pause(self) -> Hold {
        self.pause
    }

    /// After the next record.
    ///
    /// # Errors
    /// It cannot follow.
    pub fn on(mut self, stage: Stage) -> Result<Self, Misplaced> {
        let misplaced = Misplaced { stage, after: Some(self.last) };
        self.follow(stage).ok_or(misplaced)?;
        self.last = stage;
        Ok(self)
    }

    fn follow(&mut self, stage: Stage) -> Option<()> {
        use Phase::{Committed, Copying, Decided, Done, Intent, Planned, Prepared, Ready};
        let must = |holds: bool| holds.then_some(());
        match stage {
            Stage::Planned => return None,
            Stage::Prepared => self.go(&[Planned], Prepared)?,
            Stage::Mirroring => {
                must(self.is_settled() && !self.ending && !self.copied)?;
                self.go(&[Prepared, Copying, Ready], Copying)?;
            }
            Stage::Ready => {
                must(!self.copied)?;
                self.go(&[Copying], Ready)?;
            }
            Stage::EndIntent => {
                must(self.kind == OperationKind::Mirror && self.phase == Ready && self.is_settled())?;
                step(&mut self.ending, &[false], true)?;
            }
            Stage::Copied => {
                must(match self.kind {
                    OperationKind::Pivot => false,
                    OperationKind::Mirror => self.phase == Ready && self.ending,
                    OperationKind::Backup => self.phase == Copying,
                })?;
                step(&mut self.copied, &[false], true)?;
            }
            Stage::FreezeIntent
            | Stage::Frozen
            | Stage::StopIntent
            | Stage::Stopped
            | Stage::Resumed
            | Stage::Thawed => self.follow_hold(stage)?,
            Stage::PivotIntent | Stage::CompleteIntent => {
                let protocol = if stage == Stage::PivotIntent { Protocol::A } else { Protocol::B };
                must(self.kind == OperationKind::Pivot && self.protocol == protocol && self.is_settled())?;
                self.go(&[Ready], Intent)?;
            }
            Stage::Commit => {
                must(self.protocol == Protocol::B)?;
                self.go(&[Intent], Committed)?;
            }
            Stage::Pivoted => {
                let from = if self.protocol == Protocol::A { Intent } else { Committed };
                self.go(&[from], Decided(Side::Target))?;
            }
            Stage::ConfigCommitted => {
                must(self.phase == Decided(Side::Target) && !self.configured)?;
                self.configured = true;
            }
            Stage::SourceRetired => {
                must(matches!(self.phase, Decided(_)) && self.configured && !self.retired)?;
                self.retired = true;
            }
            Stage::Done => {
                must(self.may_end())?;
                self.phase = Done;
            }
            Stage::Aborted | Stage::Resolved(Side::Source) => {
                must(!self.copied)?;
                self.go(&[Planned, Prepared, Copying, Ready, Intent], Decided(Side::Source))?;
            }
            Stage::Resolved(Side::Target) => {
                must(self.kind == OperationKind::Pivot)?;
                let from: &[Phase] = match self.protocol {
                    // A witness outranks whatever the journal has not decided.
                    Protocol::A => &[Planned, Prepared, Copying, Ready, Intent],
                    Protocol::B => &[Committed],
                };
                self.go(from, Decided(Side::Target))?;
            }
        }
        Some(())
    }

    /// What is asked of the guest, and taken back.
    fn follow_hold(&mut self, stage: Stage) -> Option<()> {
        let must = |holds: bool| holds.then_some(());
        match stage {
            Stage::FreezeIntent => {
                must(self.may_hold() && self.freeze == Hold::None && self.pause == Hold::None)?;
                self.freeze = Hold::Asked;
            }
            Stage::Frozen => {
                must(self.may_hold())?;
                step(&mut self.freeze, &[Hold::Asked], Hold::Held)?;
            }
            Stage::StopIntent => {
                must(self.may_hold() && self.is_settled())?;
                step(&mut self.pause, &[Hold::None], Hold::Asked)?;
            }
            Stage::Stopped => {
                must(self.may_hold())?;
                step(&mut self.pause, &[Hold::Asked], Hold::Held)?;
            }
            Stage::Resumed => {
                must(self.may_release())?;
                step(&mut self.pause, &[Hold::Asked, Hold::Held], Hold::None)?;
            }
            Stage::Thawed => {
                must(self.may_release())?;
                step(&mut self.freeze, &[Hold::Asked, Hold::Held], Hold::None)?;
            }
            _ => return None,
        }
        Some(())
    }

    fn go(&mut self, from: &[Phase], to: Phase) -> Option<()> {
        step(&mut self.phase, from, to)
    }

    /// Nothing is asked of the guest of which nobody knows whether it happened.
    fn is_settled(&self) -> bool {
        self.freeze != Hold::Asked && self.pause != Hold::Asked
    }

    /// When the guest is held: late, for a pivot; for a backup before it begins.
    fn may_hold(&self) -> bool {
        match self.kind {
            OperationKind::Backup => self.phase == Phase::Prepared,
            OperationKind::Pivot | OperationKind::Mirror => self.phase == Phase::Ready && !self.ending,
        }
    }

    /// Between an intent and its decision the guest stays as it is.
    fn may_release(&self) -> bool {
        !matches!(self.phase, Phase::Intent | Phase::Committed | Phase::Done)
    }

    fn may_end(&self) -> bool {
        match self.phase {
            Phase::Decided(Side::Target) => self.configured,
            Phase::Decided(Side::Source) => true,
            Phase::Copying | Phase::Ready => self.kind != OperationKind::Pivot,
            _ => false,
        }
    }
}

fn step<T: PartialEq>(state: &mut T, from: &[T], to: T) -> Option<()> {
    from.contains(state).then(|| *state = to)
}

#[cfg(test)]
mod tests;
