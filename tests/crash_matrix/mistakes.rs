//! Mistakes on purpose: a search for lost writes that finds none proves something only if it would find some.

use coordinator::journal::{OperationKind, Protocol};
use serde::{Deserialize, Serialize};

use crate::cells::{Cell, Fault, Who};
use crate::laboratory::Laboratory;

/// Runs with each mistake, and with steps of the decision: one in a few of them shows it.
const RUNS: usize = 24;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mistake {
    /// The VMM does not sync its decision.
    WitnessUnsynced,
    /// The VMM switches without having put its decision down.
    SwitchBeforeWitness,
    /// The coordinator does not sync its journal.
    JournalUnsynced,
    /// The coordinator finalizes without having put its decision down.
    CommitSkipped,
}

impl Mistake {
    const ALL: [Self; 4] =
        [Self::WitnessUnsynced, Self::SwitchBeforeWitness, Self::JournalUnsynced, Self::CommitSkipped];

    /// To `coordinator::failpoint::mistake`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::WitnessUnsynced => "witness-unsynced",
            Self::SwitchBeforeWitness => "switch-before-witness",
            Self::JournalUnsynced => "journal-unsynced",
            Self::CommitSkipped => "commit-skipped",
        }
    }

    /// Whether it can show in a run.
    fn shows_in(self, cell: &Cell) -> bool {
        if cell.recipe.kind != OperationKind::Pivot {
            return false;
        }
        let name = cell.place.as_ref().map_or("", |place| place.name.as_str());
        let decisive = ["pivoted", "answer", "switch", "finalize", "pivot.done", "config-committed"];
        let protocol = if self == Self::CommitSkipped { Protocol::B } else { Protocol::A };
        let deadly = match self {
            Self::WitnessUnsynced | Self::JournalUnsynced => cell.who == Who::Power,
            Self::SwitchBeforeWitness | Self::CommitSkipped => matches!(cell.who, Who::Vmm | Who::Both),
        };
        deadly
            && cell.recipe.protocol == protocol
            && cell.fault == Fault::None
            && cell.stranger.is_none()
            && decisive.iter().any(|word| name.contains(word))
    }
}

/// Whether each mistake is found.
pub(crate) fn are_found(laboratory: &Laboratory, cells: &[Cell]) -> bool {
    let is_found = |mistake: &Mistake| {
        let concerned = cells.iter().filter(|cell| mistake.shows_in(cell)).take(RUNS);
        let cells: Vec<Cell> =
            concerned.map(|cell| Cell { mistake: Some(*mistake), ..cell.clone() }).collect();
        let (counts, _) = laboratory.run_all(&cells);
        eprintln!(
            "crash matrix: with the mistake {}, {} runs show {} lost writes and {} wrong images",
            mistake.name(),
            counts.runs,
            counts.lost,
            counts.wrong
        );
        counts.lost + counts.wrong > 0
    };
    // All of them, also behind one that was not found.
    Mistake::ALL.iter().filter(|mistake| !is_found(mistake)).count() == 0
}
