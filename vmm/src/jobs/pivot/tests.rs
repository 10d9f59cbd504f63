use std::collections::{HashSet, VecDeque};

use super::*;

fn operation(id: u128, generation: u64) -> Operation {
    Operation { id: Uuid::from_u128(id), generation, epoch: 1 }
}

fn begun(jobs: usize, witness: bool) -> Pivots {
    let mut pivots = Pivots::default();
    let steps = pivots.begin(operation(1, 1), jobs, witness).unwrap();
    assert_eq!(steps, (0..jobs).map(Step::Hold).collect::<Vec<_>>());
    pivots
}

const DURABLE: Report = Report::Written { durable: true };
const DOUBTFUL: Report = Report::Written { durable: false };

fn state(pivots: &Pivots) -> PivotState {
    pivots.state(Uuid::from_u128(1))
}

#[test]
fn a_disk_pivots_after_the_witness_and_not_before() {
    let mut pivots = begun(1, true);
    assert_eq!(state(&pivots), PivotState::Draining);
    assert_eq!(pivots.hear(Report::Pending(0)), [Step::Decide]);
    assert_eq!(state(&pivots), PivotState::Held);
    assert_eq!(pivots.hear(DURABLE), [Step::Switch(0)]);
    assert_eq!(pivots.hear(Report::Switched(0)), [Step::Answer(PivotState::Pivoted)]);
    assert_eq!(pivots.open(), None);
}

#[test]
fn several_disks_pivot_together_or_not_at_all() {
    let mut pivots = begun(3, true);
    assert_eq!(pivots.hear(Report::Pending(2)), []);
    assert_eq!(pivots.hear(Report::Pending(0)), []);
    assert_eq!(pivots.hear(Report::Pending(1)), [Step::Decide]);
    assert_eq!(pivots.hear(DURABLE), [Step::Switch(0), Step::Switch(1), Step::Switch(2)]);
    assert_eq!(pivots.hear(Report::Switched(1)), []);
    assert_eq!(pivots.hear(Report::Switched(0)), []);
    assert_eq!(pivots.hear(Report::Switched(2)), [Step::Answer(PivotState::Pivoted)]);

    let mut pivots = begun(3, true);
    pivots.hear(Report::Pending(2));
    assert_eq!(pivots.hear(Report::Failed(0)), [Step::End(1), Step::End(2)]);
    pivots.hear(Report::Ended(2));
    assert_eq!(pivots.hear(Report::Ended(1)), [Step::Answer(PivotState::Aborted)]);
}

#[test]
fn a_witness_that_may_not_be_durable_is_revoked_before_the_guest_goes_on() {
    let mut pivots = begun(1, true);
    pivots.hear(Report::Pending(0));
    assert_eq!(pivots.hear(DOUBTFUL), [Step::Revoke]);
    assert_eq!(pivots.hear(DURABLE), [Step::End(0)]);
    assert_eq!(pivots.hear(Report::Ended(0)), [Step::Answer(PivotState::Aborted)]);
}

#[test]
fn where_nothing_can_be_made_durable_the_guest_is_held_until_somebody_else_has_decided() {
    let mut pivots = begun(1, true);
    pivots.hear(Report::Pending(0));
    pivots.hear(DOUBTFUL);
    assert_eq!(pivots.hear(DOUBTFUL), [Step::Answer(PivotState::Undetermined)]);
    assert_eq!(pivots.begin(operation(1, 1), 1, true), Ok(vec![Step::Answer(PivotState::Undetermined)]));
    assert_eq!(pivots.abort(&operation(1, 1)).unwrap(), [Step::End(0)]);
    assert_eq!(pivots.hear(Report::Ended(0)), [Step::Answer(PivotState::Aborted)]);
}

#[test]
fn an_operation_asked_for_again_is_answered_and_not_done_again() {
    let mut pivots = begun(1, false);
    assert_eq!(pivots.begin(operation(1, 1), 1, false), Ok(vec![Step::Answer(PivotState::Draining)]));
    assert_eq!(pivots.hear(Report::Pending(0)), [Step::Switch(0)]);
    pivots.hear(Report::Switched(0));
    assert_eq!(pivots.begin(operation(1, 1), 1, false), Ok(vec![Step::Answer(PivotState::Pivoted)]));
}

#[test]
fn another_operation_an_old_generation_and_a_former_coordinator_are_refused() {
    let mut pivots = begun(1, false);
    assert_eq!(pivots.begin(operation(2, 2), 1, false), Err(PivotRefused::Other(Uuid::from_u128(1))));
    pivots.hear(Report::Pending(0));
    pivots.hear(Report::Switched(0));
    assert_eq!(pivots.begin(operation(2, 1), 1, false), Err(PivotRefused::Generation { asked: 1, known: 1 }));
    let later = Operation { epoch: 5, ..operation(3, 2) };
    pivots.begin(later, 1, false).unwrap();
    assert_eq!(pivots.abort(&operation(3, 2)), Err(PivotRefused::Epoch { asked: 1, known: 5 }));
    assert_eq!(pivots.state(later.id), PivotState::Draining);
}

#[test]
fn an_abort_is_in_time_until_the_decision_is_being_written() {
    let mut pivots = begun(2, true);
    pivots.hear(Report::Pending(0));
    assert_eq!(pivots.abort(&operation(1, 1)).unwrap(), [Step::End(0), Step::End(1)]);
    let mut pivots = begun(1, true);
    pivots.hear(Report::Pending(0));
    for report in [None, Some(DURABLE), Some(Report::Switched(0))] {
        report.into_iter().for_each(|report| drop(pivots.hear(report)));
        assert!(matches!(pivots.abort(&operation(1, 1)), Err(PivotRefused::Late { .. })));
    }
}

#[test]
fn what_was_aborted_before_it_came_does_not_begin_when_it_comes() {
    let mut pivots = Pivots::default();
    assert_eq!(pivots.abort(&operation(1, 1)).unwrap(), [Step::Answer(PivotState::Aborted)]);
    assert_eq!(pivots.begin(operation(1, 1), 1, true), Ok(vec![Step::Answer(PivotState::Aborted)]));
}

// ---- Every interleaving, with crashes: no acknowledged write is lost ----

/// The VM, the guest, the coordinator and what is on disk. A guest writes to whatever serves it, unless it is held; a
/// mirror in step takes every write to both images.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// Versions: of the source, of the target, and what the guest was told is safe.
    source: u8,
    target: u8,
    acknowledged: u8,
    /// The target serves the guest; the mirror is gone.
    switched: bool,
    ended: bool,
    held: bool,
    /// What the witness says: nothing, decided, revoked. `doubt`: it may or may not be what a reader finds.
    witness: Option<bool>,
    doubt: Option<bool>,
    /// The coordinator's journal: it has put down that it aborted.
    journal_aborted: bool,
    /// What the machine has still to do.
    todo: Vec<Doing>,
    steps: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Doing {
    Hold,
    Decide,
    Revoke,
    Switch,
    End,
}

/// What a rule of the machine may be broken by, to see that the search would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    SwitchBeforeTheWitness,
    DoubtTakenForDone,
    ReleaseWithoutRevocation,
}

/// Explores; the first loss found.
fn search(bug: Bug) -> Result<usize, String> {
    let pivots = begun(1, true);
    let world = World {
        source: 0,
        target: 0,
        acknowledged: 0,
        switched: false,
        ended: false,
        held: false,
        witness: None,
        doubt: None,
        journal_aborted: false,
        todo: vec![Doing::Hold],
        steps: vec![],
    };
    let mut seen = HashSet::new();
    let mut queue = VecDeque::from([(world, pivots)]);
    while let Some((world, pivots)) = queue.pop_front() {
        let key = (World { steps: vec![], ..world.clone() }, format!("{pivots:?}"));
        if !seen.insert(key) {
            continue;
        }
        crash(&world)?;
        for (next, machine) in moves(&world, &pivots, bug) {
            queue.push_back((next, machine));
        }
    }
    Ok(seen.len())
}

/// VM and coordinator die here: does the image that the rules choose hold every acknowledged write?
fn crash(world: &World) -> Result<(), String> {
    let readings = world.doubt.map_or(vec![world.witness], |doubt| vec![world.witness, Some(doubt)]);
    for witness in readings {
        let target = witness == Some(true) && !world.journal_aborted;
        let version = if target { world.target } else { world.source };
        if version < world.acknowledged {
            return Err(format!("lost: {witness:?} in {world:?}"));
        }
    }
    Ok(())
}

fn moves(world: &World, pivots: &Pivots, bug: Bug) -> Vec<(World, Pivots)> {
    let mut next = Vec::new();
    // The guest writes.
    if !world.held && world.acknowledged < 3 {
        let mut written = world.clone();
        written.acknowledged += 1;
        if world.switched {
            written.target = written.acknowledged;
        } else {
            written.source = written.acknowledged;
            if !world.ended {
                written.target = written.acknowledged;
            }
        }
        next.push((written, pivots.clone()));
    }
    let tell = |mut world: World, report: Report| {
        let mut pivots = pivots.clone();
        let steps = pivots.hear(report);
        carry_out(&mut world, &steps, bug);
        (world, pivots)
    };
    for (index, doing) in world.todo.iter().enumerate() {
        let mut done = world.clone();
        done.todo.remove(index);
        match doing {
            Doing::Hold => {
                let mut held = done.clone();
                held.held = true;
                next.push(tell(held, Report::Pending(0)));
                let mut failed = done;
                failed.ended = true;
                next.push(tell(failed, Report::Failed(0)));
            }
            Doing::Decide | Doing::Revoke => {
                let verdict = *doing == Doing::Decide;
                let mut durable = done.clone();
                (durable.witness, durable.doubt) = (Some(verdict), None);
                next.push(tell(durable, Report::Written { durable: true }));
                let mut doubtful = done;
                doubtful.doubt = Some(verdict);
                if !verdict {
                    // Either slot may be what is found.
                    doubtful.doubt = Some(true);
                }
                let durable = bug == Bug::DoubtTakenForDone;
                next.push(tell(doubtful, Report::Written { durable }));
            }
            Doing::Switch => {
                (done.switched, done.held) = (true, false);
                next.push(tell(done, Report::Switched(0)));
            }
            Doing::End => {
                (done.ended, done.held) = (true, false);
                next.push(tell(done, Report::Ended(0)));
            }
        }
    }
    // The coordinator puts down that it aborts, once it has been told that nobody knows, and says so.
    if pivots.state(Uuid::from_u128(1)) == PivotState::Undetermined {
        let mut decided = world.clone();
        decided.journal_aborted = true;
        let mut machine = pivots.clone();
        if let Ok(steps) = machine.abort(&operation(1, 1)) {
            carry_out(&mut decided, &steps, bug);
            next.push((decided, machine));
        }
    }
    // Or it aborts early.
    let mut machine = pivots.clone();
    if pivots.state(Uuid::from_u128(1)) == PivotState::Draining
        && let Ok(steps) = machine.abort(&operation(1, 1))
    {
        let mut early = world.clone();
        carry_out(&mut early, &steps, bug);
        early.todo.retain(|doing| *doing != Doing::Hold);
        next.push((early, machine));
    }
    next
}

fn carry_out(world: &mut World, steps: &[Step], bug: Bug) {
    for step in steps {
        match step {
            Step::Hold(_) => world.todo.push(Doing::Hold),
            Step::Decide => {
                if bug == Bug::SwitchBeforeTheWitness {
                    (world.switched, world.held) = (true, false);
                }
                world.todo.push(Doing::Decide);
            }
            Step::Revoke => {
                if bug == Bug::ReleaseWithoutRevocation {
                    (world.ended, world.held) = (true, false);
                }
                world.todo.push(Doing::Revoke);
            }
            Step::Switch(_) => world.todo.push(Doing::Switch),
            Step::End(_) => world.todo.push(Doing::End),
            Step::Answer(_) => {}
        }
    }
}

#[test]
fn whoever_dies_whenever_no_acknowledged_write_is_lost() {
    let states = search(Bug::None).unwrap();
    assert!(states > 30, "only {states} states");
}

#[test]
fn the_search_notices_each_way_to_lose_a_write() {
    for bug in [Bug::SwitchBeforeTheWitness, Bug::DoubtTakenForDone, Bug::ReleaseWithoutRevocation] {
        assert!(search(bug).is_err(), "{bug:?}");
    }
}
