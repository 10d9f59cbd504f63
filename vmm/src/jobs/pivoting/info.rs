//! What is known of an operation.

use std::time::Duration;

use coordinator::record::Operation;

use super::super::pivot::PivotState;
use crate::monitor::Event;

/// What became of the witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WitnessState {
    /// There is none.
    None,
    /// Nothing has been decided.
    Pending,
    /// It says, durably, that the operation pivoted.
    Durable,
    /// It says, durably, that the operation did not, whatever it said before.
    Revoked,
    /// Nobody can tell what it says.
    Failed,
}

impl WitnessState {
    /// The name in `tarn-query-pivot`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pending => "pending",
            Self::Durable => "durable",
            Self::Revoked => "revoked",
            Self::Failed => "failed",
        }
    }
}

/// A disk of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PivotDisk {
    /// Its device name.
    pub device: String,
    /// The mirror.
    pub job: String,
    /// The image it worked on before.
    pub source: String,
    /// The image it works on once it has pivoted.
    pub target: String,
}

/// What is known of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PivotInfo {
    /// Which.
    pub operation: Operation,
    /// Where it is.
    pub state: PivotState,
    /// What became of its witness.
    pub witness: WitnessState,
    /// Its disks.
    pub disks: Vec<PivotDisk>,
    /// How long guest I/O was held, once it goes on: of the disk that was held the longest.
    pub held: Option<Duration>,
    /// Why it did not pivot.
    pub error: Option<String>,
}

impl PivotInfo {
    /// An operation of which nothing is known but its state.
    pub(super) fn bare(operation: Operation, state: PivotState) -> Self {
        Self { operation, state, witness: WitnessState::None, disks: vec![], held: None, error: None }
    }

    /// What clients are told of it.
    pub(super) fn event(&self, state: PivotState) -> Event {
        let Operation { id, generation, .. } = self.operation;
        Event::Pivot { id, generation, state }
    }
}
