//! Which runs there are.
//!
//! ```text
//!   recipes × scenarios ─▶ one run each without a crash, which logs the places it passes
//!                              │
//!                              ▼
//!   places × who dies ∪ places × errors, and who dies later ∪ places × interference = all cells
//! ```
//!
//! No place is listed by hand: a step that is new in the coordinator or in the VMM has its cells by itself.

use std::collections::HashMap;

use coordinator::journal::{OperationKind, Protocol};
use devices::testing::Random;
use serde::{Deserialize, Serialize};

use crate::mistakes::Mistake;
use crate::setup::{Recipe, TargetFault};

/// Who passes a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Role {
    Coordinator,
    Vmm,
}

/// A place, by name and by how often it was passed before.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) nth: usize,
}

impl Place {
    pub(crate) fn armed(&self, action: &str) -> String {
        format!("{}:{}={action}", self.name, self.nth)
    }

    /// As one place after another was passed.
    pub(crate) fn all(role: Role, log: &str) -> Vec<Self> {
        let mut passed: HashMap<&str, usize> = HashMap::new();
        let place = |name| {
            let nth = passed.entry(name).or_default();
            *nth += 1;
            Self { role, name: name.to_owned(), nth: *nth }
        };
        log.lines().map(place).collect()
    }
}

/// Who dies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Who {
    Nobody,
    Coordinator,
    Vmm,
    Both,
    /// Both, with what was not synced.
    Power,
    /// The coordinator; and both with what was not synced when all is settled and the guest has gone on.
    PowerLater,
}

/// What goes wrong beside that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fault {
    None,
    /// An operation at a place fails, with the name of the error; from then on each time, or once.
    Place {
        role: Role,
        armed: String,
    },
    Target(TargetFault),
}

/// What somebody else does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stranger {
    /// Lets the VM run.
    Cont,
    /// Cancels every job.
    Cancel,
    /// Asks for the same pivot again, and for another one.
    Pivot,
    /// Completes and finalizes every job, once all are ready.
    Complete,
    /// Does so with the first job alone.
    CompleteOne,
    /// Lets the first disk move by the verb of 2012, without a witness.
    Reopen,
    /// Begins an operation on the same disks.
    Coordinator,
    /// Takes the lock away and recovers, while the first coordinator only sleeps.
    Successor,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) recipe: Recipe,
    pub(crate) fault: Fault,
    pub(crate) place: Option<Place>,
    pub(crate) who: Who,
    pub(crate) stranger: Option<Stranger>,
    /// Recovery dies at the place of this number, and another one follows.
    pub(crate) again: Option<usize>,
    pub(crate) mistake: Option<Mistake>,
    pub(crate) seed: u64,
}

impl Who {
    /// Whether the power goes at the end.
    pub(crate) fn is_power(self) -> bool {
        matches!(self, Self::Power | Self::PowerLater)
    }
}

impl Cell {
    /// Whether nothing keeps the pivot from its end.
    pub(crate) fn is_undisturbed(&self) -> bool {
        self.fault == Fault::None && self.place.is_none()
    }

    /// Without a crash.
    fn quiet(recipe: Recipe, fault: Fault, seed: u64) -> Self {
        Self {
            recipe,
            fault,
            place: None,
            who: Who::Nobody,
            stranger: None,
            again: None,
            mistake: None,
            seed,
        }
    }
}

/// Runs without a crash; the places that they pass are the rest of the matrix.
pub(crate) fn scenarios(random: &mut Random) -> Vec<Cell> {
    let mut cells = Vec::new();
    for protocol in [Protocol::A, Protocol::B] {
        for disks in [1, 2] {
            for pause in [false, true] {
                let write_blocking = random.below(2) == 0;
                let freeze = pause && disks == 1;
                let reuse = disks == 1 && !pause || random.below(3) == 0;
                let kind = OperationKind::Pivot;
                let recipe = Recipe { kind, protocol, disks, freeze, pause, write_blocking, reuse };
                for fault in faults_of(protocol) {
                    cells.push(Cell::quiet(recipe, fault, random.bits()));
                }
            }
        }
    }
    for kind in [OperationKind::Mirror, OperationKind::Backup] {
        for disks in [1, 2] {
            let (write_blocking, freeze) =
                (kind == OperationKind::Mirror && random.below(2) == 0, disks == 2);
            let pause = disks == 2 && random.below(2) == 0;
            let (protocol, reuse) = (Protocol::A, random.below(3) == 0);
            let recipe = Recipe { kind, protocol, disks, freeze, pause, write_blocking, reuse };
            cells.push(Cell::quiet(recipe, Fault::None, random.bits()));
        }
    }
    cells
}

/// Each leads another way through coordinator and VMM.
fn faults_of(protocol: Protocol) -> Vec<Fault> {
    let target = TargetFault { flush: true, after: 0, count: 1, nospace: false };
    let vmm = |armed: &str| Fault::Place { role: Role::Vmm, armed: armed.to_owned() };
    let mut faults = vec![Fault::None, Fault::Target(target)];
    if protocol == Protocol::A {
        faults.push(vmm("witness.pivoted.written=eio"));
        faults.push(vmm("witness.pivoted.written=eio,witness.revoked.written=eio"));
        // It has lasted, though it was said that it has not.
        faults.push(vmm("witness.pivoted.synced=eio,witness.revoked.written=eio"));
    }
    faults
}

/// All cells with a crash, an error or a stranger, from the places that the scenarios have passed.
pub(crate) fn all(passed: &[(Cell, Vec<Place>)], random: &mut Random) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (quiet, places) in passed {
        let again = |random: &mut Random| (random.below(3) == 0).then(|| 1 + usize::from(random.below(30)));
        for place in places {
            let all = [Who::Coordinator, Who::Vmm, Who::Both, Who::Power, Who::PowerLater];
            // Every death at every place; with an error on the way one of them, another one with another seed.
            let one = [random.pick(&all)];
            for &who in if quiet.fault == Fault::None { &all[..] } else { &one[..] } {
                let (place, again, seed) = (Some(place.clone()), again(random), random.bits());
                cells.push(Cell { place, who, again, seed, ..quiet.clone() });
            }
        }
        if quiet.fault != Fault::None {
            continue;
        }
        errors(quiet, places, random, &mut cells);
        targets(quiet, places, random, &mut cells);
        strangers(quiet, places, random, &mut cells);
    }
    cells
}

/// Every durable step fails, and somebody dies afterwards, or nobody.
fn errors(quiet: &Cell, places: &[Place], random: &mut Random, cells: &mut Vec<Cell>) {
    let durable =
        |place: &&Place| !place.name.starts_with("jobs.") && !place.name.starts_with("coordinator.");
    for place in places.iter().filter(durable) {
        for errno in ["eio", "enospc"] {
            // Once, or for as long as the process lives.
            let plus = if random.below(3) == 0 { "+" } else { "" };
            let armed = format!("{}:{}{plus}={errno}", place.name, place.nth);
            let fault = Fault::Place { role: place.role, armed };
            let who = random.pick(&[Who::Nobody, Who::Coordinator, Who::Vmm, Who::Both, Who::Power]);
            let later = (who != Who::Nobody).then(|| later(places, place, random));
            cells.push(Cell { fault, place: later, who, seed: random.bits(), ..quiet.clone() });
        }
    }
}

/// The target fails or is full, early or late.
fn targets(quiet: &Cell, places: &[Place], random: &mut Random, cells: &mut Vec<Cell>) {
    for nospace in [false, true] {
        for flush in [false, true] {
            for who in [Who::Nobody, Who::Coordinator, Who::Vmm, Who::Both, Who::Power] {
                let after = u64::from(random.below(if flush { 3 } else { 40 }));
                let count = u64::from(1 + random.below(2));
                let fault = Fault::Target(TargetFault { flush, after, count, nospace });
                let place = (who != Who::Nobody).then(|| random_place(places, random));
                cells.push(Cell { fault, place, who, seed: random.bits(), ..quiet.clone() });
            }
        }
    }
}

fn strangers(quiet: &Cell, places: &[Place], random: &mut Random, cells: &mut Vec<Cell>) {
    use Stranger::{Cancel, Cont, Coordinator, Pivot, Successor};
    let ours = places.iter().filter(|place| place.role == Role::Coordinator);
    for place in ours {
        let all = [Cont, Cancel, Pivot, Coordinator, Successor];
        // Over QEMU's verbs alone any client can break a pivot: that is what protocol A is for.
        let few = [Cont, Coordinator, Successor];
        let stranger =
            if quiet.recipe.protocol == Protocol::A { random.pick(&all) } else { random.pick(&few) };
        // What was checked before it slept is not checked again: taking its lock away does not help then.
        let unchecked = place.name.ends_with(".before") && !place.name.starts_with("coordinator.");
        if stranger == Successor && unchecked {
            continue;
        }
        let who = random.pick(&[Who::Nobody, Who::Coordinator, Who::Both, Who::Power]);
        let (place, seed) = (Some(place.clone()), random.bits());
        cells.push(Cell { place, who, stranger: Some(stranger), seed, ..quiet.clone() });
    }
    // Only who lives can tell that somebody else has moved the disks.
    for place in places.iter().filter(|place| may_be_completed(quiet.recipe, place)) {
        for who in [Who::Nobody, Who::Coordinator] {
            // The verb is Tarn's.
            let other = random.pick(&[Stranger::Reopen, Stranger::CompleteOne]);
            let other = if quiet.recipe.protocol == Protocol::A { other } else { Stranger::CompleteOne };
            for stranger in [&[Stranger::Complete][..], &[other]].concat() {
                let (place, seed) = (Some(place.clone()), random.bits());
                cells.push(Cell { place, who, stranger: Some(stranger), seed, ..quiet.clone() });
            }
        }
    }
}

/// Under B a move that was not intended here cannot be taken for its outcome, nor can one of a mirror: the VM stops.
fn may_be_completed(recipe: Recipe, place: &Place) -> bool {
    if recipe.kind != OperationKind::Pivot {
        return false;
    }
    let from: &[&str] = match recipe.protocol {
        Protocol::A => &["journal.ready.", "journal.stop", "journal.pivot-intent.", "coordinator.pivot."],
        Protocol::B => &["coordinator.complete.", "journal.commit."],
    };
    place.role == Role::Coordinator && from.iter().any(|prefix| place.name.starts_with(prefix))
}

fn random_place(places: &[Place], random: &mut Random) -> Place {
    places[usize::from(random.below(u16::try_from(places.len()).unwrap_or(u16::MAX)))].clone()
}

/// Any place behind this one, or the first that is passed then.
fn later(places: &[Place], place: &Place, random: &mut Random) -> Place {
    let from = places.iter().position(|known| known == place).unwrap_or(0);
    // Whatever the error leads to may pass others than the scenario did.
    if random.below(2) == 0 {
        let nth = from + 2 + usize::from(random.below(4));
        let here = places[..from].iter().filter(|known| known.role == Role::Coordinator).count();
        return Place { role: Role::Coordinator, name: "*.*.*".into(), nth: nth.max(here + 1) };
    }
    random_place(&places[from..], random)
}
