use std::collections::HashSet;

use super::*;

const KINDS: [(OperationKind, Protocol); 4] = [
    (OperationKind::Pivot, Protocol::A),
    (OperationKind::Pivot, Protocol::B),
    (OperationKind::Mirror, Protocol::A),
    (OperationKind::Backup, Protocol::A),
];

fn after(kind: OperationKind, protocol: Protocol, stages: &[Stage]) -> Progress {
    stages.iter().fold(Progress::planned(kind, protocol), |progress, stage| progress.on(*stage).unwrap())
}

/// The names of all that may follow.
fn next(progress: Progress) -> String {
    let allowed = Stage::ALL.into_iter().filter(|stage| progress.on(*stage).is_ok());
    allowed.map(Stage::name).collect::<Vec<_>>().join(" ")
}

/// Everything that can be reached.
fn reachable(kind: OperationKind, protocol: Protocol) -> Vec<Progress> {
    let mut found = vec![Progress::planned(kind, protocol)];
    let mut seen: HashSet<String> = HashSet::new();
    let mut index = 0;
    while let Some(&progress) = found.get(index) {
        index += 1;
        for stage in Stage::ALL {
            if let Ok(next) = progress.on(stage)
                && seen.insert(format!("{next:?}"))
            {
                found.push(next);
            }
        }
    }
    found
}

const FULL_A: [(Stage, &str); 14] = {
    use Stage::{
        ConfigCommitted, Done, FreezeIntent, Frozen, Mirroring, PivotIntent, Pivoted, Prepared, Ready,
        Resumed, SourceRetired, StopIntent, Stopped, Thawed,
    };
    [
        (Prepared, "mirroring aborted resolved-source resolved-target"),
        (Mirroring, "mirroring ready aborted resolved-source resolved-target"),
        (Ready, "mirroring freeze-intent stop-intent pivot-intent aborted resolved-source resolved-target"),
        (FreezeIntent, "frozen thawed aborted resolved-source resolved-target"),
        (Frozen, "mirroring stop-intent pivot-intent thawed aborted resolved-source resolved-target"),
        (StopIntent, "stopped resumed thawed aborted resolved-source resolved-target"),
        (Stopped, "mirroring pivot-intent resumed thawed aborted resolved-source resolved-target"),
        (PivotIntent, "pivoted aborted resolved-source resolved-target"),
        (Pivoted, "config-committed resumed thawed"),
        (ConfigCommitted, "resumed thawed source-retired done"),
        (Resumed, "thawed source-retired done"),
        (Thawed, "source-retired done"),
        (SourceRetired, "done"),
        (Done, ""),
    ]
};

#[test]
fn after_each_step_of_a_whole_pivot_by_witness_only_these_may_follow() {
    let mut progress = Progress::planned(OperationKind::Pivot, Protocol::A);
    assert_eq!(next(progress), "prepared aborted resolved-source resolved-target");
    for (stage, expected) in &FULL_A {
        progress = progress.on(*stage).unwrap();
        assert_eq!(next(progress), *expected, "after {}", stage.name());
    }
    assert!(progress.is_done());
    assert_eq!(progress.decision(), Some(Side::Target));
}

#[test]
fn after_each_step_of_a_pivot_by_commit_only_these_may_follow() {
    use Stage::{Commit, CompleteIntent, ConfigCommitted, Done, Mirroring, Pivoted, Prepared, Ready};
    let mut progress = Progress::planned(OperationKind::Pivot, Protocol::B);
    for (stage, expected) in [
        (Prepared, "mirroring aborted resolved-source"),
        (Mirroring, "mirroring ready aborted resolved-source"),
        (Ready, "mirroring freeze-intent stop-intent complete-intent aborted resolved-source"),
        (CompleteIntent, "commit aborted resolved-source"),
        (Commit, "pivoted resolved-target"),
        (Pivoted, "config-committed"),
        (ConfigCommitted, "source-retired done"),
        (Done, ""),
    ] {
        progress = progress.on(stage).unwrap();
        assert_eq!(next(progress), expected, "after {}", stage.name());
    }
}

#[test]
fn a_backup_freezes_before_it_copies_and_a_mirror_when_it_follows() {
    use Stage::{Copied, EndIntent, FreezeIntent, Frozen, Mirroring, Prepared, Ready, Thawed};
    let backup = |stages: &[Stage]| next(after(OperationKind::Backup, Protocol::A, stages));
    assert_eq!(backup(&[Prepared]), "mirroring freeze-intent stop-intent aborted resolved-source");
    assert_eq!(
        backup(&[Prepared, FreezeIntent, Frozen]),
        "mirroring stop-intent thawed aborted resolved-source"
    );
    let copying = [Prepared, FreezeIntent, Frozen, Mirroring];
    assert_eq!(backup(&copying), "mirroring ready thawed done aborted resolved-source copied");
    let thawed = [&copying[..], &[Thawed]].concat();
    assert_eq!(backup(&thawed), "mirroring ready done aborted resolved-source copied");
    let copied = [&copying[..], &[Copied]].concat();
    assert_eq!(backup(&copied), "thawed done");
    let mirror = |stages: &[Stage]| next(after(OperationKind::Mirror, Protocol::A, stages));
    assert_eq!(mirror(&[Prepared, Mirroring]), "mirroring ready done aborted resolved-source");
    let ready = [Prepared, Mirroring, Ready];
    assert_eq!(mirror(&ready), "mirroring freeze-intent stop-intent done aborted resolved-source end-intent");
    let ending = [Prepared, Mirroring, Ready, FreezeIntent, Frozen, EndIntent];
    assert_eq!(mirror(&ending), "thawed done aborted resolved-source copied");
    assert_eq!(mirror(&[&ending[..], &[Copied]].concat()), "thawed done");
}

#[test]
fn what_was_asked_of_the_guest_can_be_taken_back_after_an_abort() {
    use Stage::{
        Aborted, FreezeIntent, Frozen, Mirroring, PivotIntent, Prepared, Ready, StopIntent, Stopped,
    };
    let held = [Prepared, Mirroring, Ready, FreezeIntent, Frozen, StopIntent, Stopped, PivotIntent, Aborted];
    let progress = after(OperationKind::Pivot, Protocol::A, &held);
    assert_eq!(next(progress), "resumed thawed done");
    assert_eq!((progress.freeze(), progress.pause()), (Hold::Held, Hold::Held));
    assert_eq!(progress.decision(), Some(Side::Source));
}

#[test]
fn there_is_one_decision_and_it_stays() {
    for (kind, protocol) in KINDS {
        let decided = |progress: &Progress| progress.is_decided();
        for progress in reachable(kind, protocol).into_iter().filter(decided) {
            for stage in
                [Stage::Aborted, Stage::Pivoted, Stage::Resolved(Side::Source), Stage::Resolved(Side::Target)]
            {
                assert!(progress.on(stage).is_err(), "{stage:?} after {progress:?}");
            }
            for next in Stage::ALL.into_iter().filter_map(|stage| progress.on(stage).ok()) {
                assert_eq!(next.decision(), progress.decision(), "{progress:?} to {next:?}");
            }
        }
    }
}

#[test]
fn a_commit_never_becomes_an_abort_and_nothing_else_moves_a_disk_without_an_intent() {
    for (kind, protocol) in KINDS {
        for progress in reachable(kind, protocol) {
            if progress.last() == Stage::Commit {
                assert!(
                    progress.on(Stage::Aborted).is_err()
                        && progress.on(Stage::Resolved(Side::Source)).is_err()
                );
            }
            if progress.on(Stage::Pivoted).is_ok() {
                let intended = [Stage::PivotIntent, Stage::Commit].contains(&progress.last());
                assert!(intended, "{progress:?}");
            }
            if kind != OperationKind::Pivot {
                assert_ne!(progress.decision(), Some(Side::Target), "{progress:?}");
            }
        }
    }
}

#[test]
fn every_operation_can_be_brought_to_its_end_from_everywhere() {
    for (kind, protocol) in KINDS {
        for progress in reachable(kind, protocol) {
            let sides = [Stage::Aborted, Stage::Resolved(Side::Target), Stage::ConfigCommitted, Stage::Done];
            let end =
                sides.into_iter().fold(progress, |progress, stage| progress.on(stage).unwrap_or(progress));
            assert!(end.is_done(), "{progress:?} ends as {end:?}");
            assert_eq!(next(end), "");
        }
    }
}

#[test]
fn numbers_and_names_tell_stages_apart() {
    let names: HashSet<_> = Stage::ALL.iter().map(|stage| stage.name()).collect();
    assert_eq!(names.len(), Stage::ALL.len());
    for stage in Stage::ALL {
        assert_eq!(Stage::by_number(stage.number()), Some(stage));
    }
    assert_eq!(Stage::Planned.number(), 16);
    assert_eq!(Stage::Resolved(Side::Target).number(), 35);
    assert_eq!(Stage::Copied.number(), 37);
    assert_eq!(Stage::by_number(38), None);
    assert_eq!(Stage::by_number(1), None);
}
