//! The states of a job and what may be done to it in each: a pure function, every pair decided.
//!
//! ```text
//!   created ─▶ running ◀─▶ paused
//!                │  │
//!                │  └────▶ ready ◀─▶ standby
//!                │           │
//!                └─▶ waiting ◀┘──▶ pending ──▶ concluded ──▶ null
//!      from all of these ──▶ aborting ───────────▲
//! ```
//!
//! The table is QEMU's (`job.c`, `JobSTT` and `JobVerbTable`), because clients know it by heart: which verb is
//! refused when, and with which words.

use serde::Serialize;

/// Where a job is (QEMU's `JobStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// It exists and has not begun.
    Created,
    /// It works.
    Running,
    /// It stands still at a client's wish, or because of an error, and was running.
    Paused,
    /// It has reached its goal and keeps it up until told to complete.
    Ready,
    /// Paused, and was ready.
    Standby,
    /// It waits for others of its transaction.
    Waiting,
    /// It waits for `job-finalize`.
    Pending,
    /// It undoes what can be undone.
    Aborting,
    /// It is over, and waits for `job-dismiss`.
    Concluded,
    /// It is gone.
    Null,
}

/// What a client may ask of a job (QEMU's `JobVerb`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// `block-job-cancel`, `job-cancel`.
    Cancel,
    /// `block-job-pause`, `job-pause`.
    Pause,
    /// `block-job-resume`, `job-resume`.
    Resume,
    /// `block-job-set-speed`.
    SetSpeed,
    /// `block-job-complete`, `job-complete`.
    Complete,
    /// `block-job-finalize`, `job-finalize`.
    Finalize,
    /// `block-job-dismiss`, `job-dismiss`.
    Dismiss,
    /// `block-job-change`.
    Change,
}

/// A verb that the state does not admit; the text is QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Job '{id}' in state '{}' cannot accept command verb '{}'", status.name(), verb.name())]
pub struct VerbRefused {
    /// The job.
    pub id: String,
    /// Its state.
    pub status: JobStatus,
    /// What was asked of it.
    pub verb: Verb,
}

impl JobStatus {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// QEMU's spelling.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job in this state may go to `next`.
    pub fn may_become(self, next: Self) -> bool {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        let nexts: &[Self] = match self {
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        };
        nexts.contains(&next)
    }

    /// Whether a client may ask this of a job in this state.
    pub fn admits(self, verb: Verb) -> bool {
        use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby};
        match verb {
            Verb::Cancel => !matches!(self, Aborting | Concluded | Null),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Refuses a verb with QEMU's words.
    ///
    /// # Errors
    ///
    /// [`VerbRefused`].
    pub fn check(self, id: &str, verb: Verb) -> Result<(), VerbRefused> {
        if self.admits(verb) { Ok(()) } else { Err(self.refuse(id, verb)) }
    }

    /// The refusal itself.
    pub(super) fn refuse(self, id: &str, verb: Verb) -> VerbRefused {
        VerbRefused { id: id.to_owned(), status: self, verb }
    }

    /// Whether the job stands still.
    pub fn is_paused(self) -> bool {
        matches!(self, Self::Paused | Self::Standby)
    }

    /// Whether the job is over, well or not.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Concluded | Self::Null)
    }
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Cancel,
        Self::Pause,
        Self::Resume,
        Self::SetSpeed,
        Self::Complete,
        Self::Finalize,
        Self::Dismiss,
        Self::Change,
    ];

    /// QEMU's spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows are states, columns are the next states in the order of [`JobStatus::ALL`].
    const TRANSITIONS: [(JobStatus, &str); 10] = [
        (JobStatus::Created, ".x.....x.x"),
        (JobStatus::Running, "..xx.x.x.."),
        (JobStatus::Paused, ".x........"),
        (JobStatus::Ready, "....xx.x.."),
        (JobStatus::Standby, "...x......"),
        (JobStatus::Waiting, "......xx.."),
        (JobStatus::Pending, ".......xx."),
        (JobStatus::Aborting, ".......xx."),
        (JobStatus::Concluded, ".........x"),
        (JobStatus::Null, ".........."),
    ];

    /// Rows are states, columns are verbs in the order of [`Verb::ALL`].
    const VERBS: [(JobStatus, &str); 10] = [
        (JobStatus::Created, "xxxx...x"),
        (JobStatus::Running, "xxxx...x"),
        (JobStatus::Paused, "xxxx...x"),
        (JobStatus::Ready, "xxxxx..x"),
        (JobStatus::Standby, "xxxxx..x"),
        (JobStatus::Waiting, "x......."),
        (JobStatus::Pending, "x....x.."),
        (JobStatus::Aborting, "........"),
        (JobStatus::Concluded, "......x."),
        (JobStatus::Null, "........"),
    ];

    fn row<T: Copy>(all: &[T], admitted: impl Fn(T) -> bool) -> String {
        all.iter().map(|&one| if admitted(one) { 'x' } else { '.' }).collect()
    }

    #[test]
    fn every_transition_is_decided_as_the_table_says() {
        assert_eq!(TRANSITIONS.map(|(status, _)| status), JobStatus::ALL);
        for (status, expected) in TRANSITIONS {
            assert_eq!(row(&JobStatus::ALL, |next| status.may_become(next)), expected, "{status:?}");
        }
    }

    #[test]
    fn every_verb_is_decided_as_the_table_says() {
        assert_eq!(VERBS.map(|(status, _)| status), JobStatus::ALL);
        for (status, expected) in VERBS {
            assert_eq!(row(&Verb::ALL, |verb| status.admits(verb)), expected, "{status:?}");
        }
    }

    #[test]
    fn a_refusal_has_qemus_words() {
        assert_eq!(
            JobStatus::Running.check("m0", Verb::Complete).unwrap_err().to_string(),
            "Job 'm0' in state 'running' cannot accept command verb 'complete'"
        );
    }

    #[test]
    fn every_state_leads_to_the_end() {
        for status in JobStatus::ALL {
            let mut reached = vec![status];
            let mut next = 0;
            while let Some(&from) = reached.get(next) {
                next += 1;
                let new = JobStatus::ALL.into_iter().filter(|to| from.may_become(*to));
                let new: Vec<_> = new.filter(|to| !reached.contains(to)).collect();
                reached.extend(new);
            }
            assert!(reached.contains(&JobStatus::Null), "{status:?}");
        }
    }
}
