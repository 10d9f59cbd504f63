//! A pivot: several mirrors, each ready, become the disks of their guest together, or none does, and whoever dies in
//! between, a file says afterwards which. No I/O, no clock.
//!
//! ```text
//!   begin ─▶ Draining ── all pending ──▶ Deciding ── witness durable ──▶ Switching ── all switched ──▶ pivoted
//!               │                           │ witness failed                  (no way back from here)
//!               │ one failed, abort         ▼
//!               │                        Revoking ── revocation durable ─┐
//!               │                           │ failed as well             │
//!               ▼                           ▼                            ▼
//!           Aborting ◀──── abort ──── undetermined (guest I/O held)   Aborting ── all ended ──▶ aborted
//! ```
//!
//! The order is all there is to it: no guest I/O between the first drain and the decision; every target synced before
//! the decision (that is what *pending* means); the decision durable before the first I/O to a target; and, if nobody
//! can tell whether it is durable, no I/O to either side until somebody else has decided, durably.
//!
//! [`Pivots`] keeps what became of each operation for as long as the VM lives: to ask again for the same one is no
//! mistake, and gets the same answer.

use std::collections::VecDeque;

use coordinator::record::Operation;
use uuid::Uuid;

/// Operations that are over and remembered; a coordinator asks for the last one.
const REMEMBERED: usize = 256;

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The targets are the disks.
    Pivoted,
    /// The sources are, as before.
    Aborted,
}

/// Where an operation is (`tarn-query-pivot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PivotState {
    /// Nobody has begun it.
    None,
    /// Guest I/O is being held, and what is left is copied.
    Draining,
    /// Guest I/O is held; it is being decided, or undone, or carried out.
    Held,
    /// The targets are the disks.
    Pivoted,
    /// The sources are.
    Aborted,
    /// Guest I/O is held, and it cannot be told what the witness will say after a crash.
    Undetermined,
}

impl PivotState {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::None, Self::Draining, Self::Held, Self::Pivoted, Self::Aborted, Self::Undetermined];

    /// The name in `tarn-query-pivot`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Draining => "draining",
            Self::Held => "held",
            Self::Pivoted => "pivoted",
            Self::Aborted => "aborted",
            Self::Undetermined => "undetermined",
        }
    }
}

/// What the jobs and the witness report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The job of this number holds its disk: copied, synced.
    Pending(usize),
    /// The job of this number has failed or was cancelled before that.
    Failed(usize),
    /// A job stands still because of an error.
    Stopped,
    /// The job of this number has switched.
    Switched(usize),
    /// The job of this number has ended on its source.
    Ended(usize),
    /// What it waits for takes too long: disks that are held for others, or the witness.
    Late,
    /// The witness has taken the last decision, or nobody can tell.
    Written {
        /// It is durable.
        durable: bool,
    },
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Complete the job of this number, as far as pending.
    Hold(usize),
    /// Write PIVOTED to the witness.
    Decide,
    /// Write REVOKED to the witness.
    Revoke,
    /// Finalize the job of this number.
    Switch(usize),
    /// Cancel the job of this number.
    End(usize),
    /// Tell who asked.
    Answer(PivotState),
}

/// An operation that is refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PivotRefused {
    /// One at a time.
    #[error("Operation {0} is in progress")]
    Other(Uuid),
    /// The disks have moved on since.
    #[error("Generation {asked} is not newer than {known}, which this VM has seen")]
    Generation {
        /// Of the operation.
        asked: u64,
        /// Of the last one.
        known: u64,
    },
    /// A later coordinator has been here.
    #[error("Epoch {asked} is older than {known}: another coordinator has taken over")]
    Epoch {
        /// Of who asks.
        asked: u64,
        /// Of who was here.
        known: u64,
    },
    /// The same name for something else.
    #[error("Operation {id} is of generation {known}, not {asked}")]
    Changed {
        /// The operation.
        id: Uuid,
        /// What is asked now.
        asked: u64,
        /// What it was begun with.
        known: u64,
    },
    /// There is nothing to abort, or it cannot be aborted any more.
    #[error("Operation {id} is {}, it cannot be aborted", state.name())]
    Late {
        /// The operation.
        id: Uuid,
        /// Where it is.
        state: PivotState,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Draining,
    Deciding,
    Revoking,
    Switching,
    Aborting,
    Undetermined,
}

/// The operation in progress.
#[derive(Clone, Debug)]
struct Open {
    operation: Operation,
    /// Whether there is a witness.
    witness: bool,
    phase: Phase,
    /// Jobs that the phase waits for.
    waiting: Vec<usize>,
    /// Jobs that have not ended.
    jobs: Vec<usize>,
}

/// The operations of a VM: at most one in progress, and those that are over.
#[derive(Clone, Debug, Default)]
pub struct Pivots {
    open: Option<Open>,
    over: VecDeque<(Operation, Outcome)>,
    /// Of the last one that pivoted.
    generation: u64,
    epoch: u64,
}

impl Pivots {
    /// Begins to pivot jobs 0 to `jobs`, all of which are ready. The same operation again is answered with its state.
    ///
    /// # Errors
    ///
    /// [`PivotRefused`].
    pub fn begin(
        &mut self,
        operation: Operation,
        jobs: usize,
        witness: bool,
    ) -> Result<Vec<Step>, PivotRefused> {
        self.check(&operation)?;
        let state = self.state(operation.id);
        if state != PivotState::None {
            return Ok(vec![Step::Answer(state)]);
        }
        if let Some(open) = &self.open {
            return Err(PivotRefused::Other(open.operation.id));
        }
        if operation.generation <= self.generation {
            return Err(PivotRefused::Generation { asked: operation.generation, known: self.generation });
        }
        let jobs: Vec<usize> = (0..jobs).collect();
        let steps = jobs.iter().copied().map(Step::Hold).collect();
        self.open = Some(Open { operation, witness, phase: Phase::Draining, waiting: jobs.clone(), jobs });
        Ok(steps)
    }

    /// Ends an operation on its sources. Where it is undetermined the caller has put that decision down, durably: this
    /// side cannot.
    ///
    /// # Errors
    ///
    /// [`PivotRefused`]: it is decided already, or being decided.
    pub fn abort(&mut self, operation: &Operation) -> Result<Vec<Step>, PivotRefused> {
        self.check(operation)?;
        let state = self.state(operation.id);
        let late = Err(PivotRefused::Late { id: operation.id, state });
        match (&mut self.open, state) {
            (_, PivotState::Aborted) => Ok(vec![Step::Answer(state)]),
            // It may have pivoted, so long ago that it is forgotten.
            (_, PivotState::None) if operation.generation <= self.generation => {
                Err(PivotRefused::Generation { asked: operation.generation, known: self.generation })
            }
            // A command that is still on its way must not begin it later.
            (_, PivotState::None) => {
                self.remember(*operation, Outcome::Aborted);
                Ok(vec![Step::Answer(PivotState::Aborted)])
            }
            (Some(open), PivotState::Draining | PivotState::Undetermined) => Ok(open.give_up()),
            _ => late,
        }
    }

    /// Something has happened that the operation waits for.
    pub fn hear(&mut self, report: Report) -> Vec<Step> {
        let Some(open) = &mut self.open else { return vec![] };
        let steps = open.hear(report);
        let outcome = match open.phase {
            Phase::Switching if open.waiting.is_empty() => Outcome::Pivoted,
            Phase::Aborting if open.waiting.is_empty() => Outcome::Aborted,
            _ => return steps,
        };
        let operation = open.operation;
        self.remember(operation, outcome);
        let state = self.state_of_last(outcome);
        self.open = None;
        steps.into_iter().chain([Step::Answer(state)]).collect()
    }

    /// Where the operation of this name is.
    pub fn state(&self, id: Uuid) -> PivotState {
        if let Some(open) = self.open.as_ref().filter(|open| open.operation.id == id) {
            return match open.phase {
                Phase::Draining => PivotState::Draining,
                Phase::Undetermined => PivotState::Undetermined,
                Phase::Deciding | Phase::Revoking | Phase::Switching | Phase::Aborting => PivotState::Held,
            };
        }
        let over = self.over.iter().rev().find(|(operation, _)| operation.id == id);
        over.map_or(PivotState::None, |(_, outcome)| self.state_of_last(*outcome))
    }

    /// The operation in progress, which holds back a guest's shutdown and a `quit` until it is decided.
    pub fn open(&self) -> Option<Operation> {
        self.open.as_ref().map(|open| open.operation)
    }

    fn remember(&mut self, operation: Operation, outcome: Outcome) {
        if outcome == Outcome::Pivoted {
            self.generation = operation.generation;
        }
        if self.over.len() == REMEMBERED {
            self.over.pop_front();
        }
        self.over.push_back((operation, outcome));
    }

    fn state_of_last(&self, outcome: Outcome) -> PivotState {
        match outcome {
            Outcome::Pivoted => PivotState::Pivoted,
            Outcome::Aborted => PivotState::Aborted,
        }
    }

    /// An operation named `id` that would be accepted.
    pub fn next(&self, id: Uuid) -> Operation {
        Operation { id, generation: self.generation + 1, epoch: self.epoch }
    }

    /// Whether the witness is being written to.
    pub fn is_deciding(&self) -> bool {
        self.open.as_ref().is_some_and(|open| matches!(open.phase, Phase::Deciding | Phase::Revoking))
    }

    fn check(&mut self, asked: &Operation) -> Result<(), PivotRefused> {
        if asked.epoch < self.epoch {
            return Err(PivotRefused::Epoch { asked: asked.epoch, known: self.epoch });
        }
        let open = self.open.iter().map(|open| &open.operation);
        let mut known = open.chain(self.over.iter().map(|(operation, _)| operation));
        if let Some(known) = known.find(|known| known.id == asked.id && known.generation != asked.generation)
        {
            let (id, asked, known) = (asked.id, asked.generation, known.generation);
            return Err(PivotRefused::Changed { id, asked, known });
        }
        self.epoch = asked.epoch;
        Ok(())
    }
}

impl Open {
    fn hear(&mut self, report: Report) -> Vec<Step> {
        match (self.phase, report) {
            (Phase::Draining, Report::Pending(job)) => {
                self.waiting.retain(|waiting| *waiting != job);
                if self.waiting.is_empty() { self.decide() } else { vec![] }
            }
            // All or none: the others are let go.
            (Phase::Draining, Report::Failed(job) | Report::Ended(job)) => {
                self.jobs.retain(|known| *known != job);
                self.give_up()
            }
            (Phase::Draining, Report::Stopped | Report::Late) => self.give_up(),
            // Whatever comes of the witness after all: it is somebody else's decision now.
            (Phase::Deciding | Phase::Revoking, Report::Late) => {
                self.phase = Phase::Undetermined;
                vec![Step::Answer(PivotState::Undetermined)]
            }
            (Phase::Deciding, Report::Written { durable: true }) => self.switch(),
            (Phase::Deciding, Report::Written { durable: false }) => {
                self.phase = Phase::Revoking;
                vec![Step::Revoke]
            }
            (Phase::Revoking, Report::Written { durable: true }) => self.give_up(),
            (Phase::Revoking, Report::Written { durable: false }) => {
                self.phase = Phase::Undetermined;
                vec![Step::Answer(PivotState::Undetermined)]
            }
            (Phase::Switching, Report::Switched(job))
            | (Phase::Aborting, Report::Ended(job) | Report::Failed(job)) => {
                self.waiting.retain(|waiting| *waiting != job);
                self.jobs.retain(|known| *known != job);
                vec![]
            }
            // Said too late, or twice.
            (
                Phase::Draining
                | Phase::Deciding
                | Phase::Revoking
                | Phase::Switching
                | Phase::Aborting
                | Phase::Undetermined,
                _,
            ) => vec![],
        }
    }

    fn decide(&mut self) -> Vec<Step> {
        if self.witness {
            self.phase = Phase::Deciding;
            vec![Step::Decide]
        } else {
            self.switch()
        }
    }

    fn switch(&mut self) -> Vec<Step> {
        self.phase = Phase::Switching;
        self.waiting.clone_from(&self.jobs);
        self.jobs.iter().copied().map(Step::Switch).collect()
    }

    fn give_up(&mut self) -> Vec<Step> {
        self.phase = Phase::Aborting;
        self.waiting.clone_from(&self.jobs);
        self.jobs.iter().copied().map(Step::End).collect()
    }
}

#[cfg(test)]
mod tests;
