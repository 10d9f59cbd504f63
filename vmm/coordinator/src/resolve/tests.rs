#[cfg(feature = "failpoints")]
mod crashes;

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::journal::{DiskPlan, ImageId, Outcome, Plan, PlanFlags, operations};
use crate::stamp;

/// A VM with one disk, its two images, and a pivot that comes as far as a test wants it.
struct Lab {
    base: tempfile::TempDir,
    state: StateDir,
}

const ID: Uuid = Uuid::from_u128(0xABC);

impl Lab {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        for image in ["old.raw", "new.raw"] {
            fs::write(base.path().join(image), image).unwrap();
        }
        let state = StateDir::below(&base.path().join("state"), "web").unwrap();
        Self { base, state }
    }

    fn path(&self, image: &str) -> PathBuf {
        fs::canonicalize(self.base.path()).unwrap().join(image)
    }

    fn plan(&self, kind: OperationKind, protocol: Protocol) -> Plan {
        let image = |name: &str| ImageId::of(&self.path(name)).unwrap();
        let disk = DiskPlan { disk: "vda".into(), source: image("old.raw"), target: image("new.raw") };
        let witness = (protocol == Protocol::A).then(|| self.state.witness(ID));
        let flags = PlanFlags { retire_source: true, ..PlanFlags::default() };
        Plan { kind, protocol, disks: vec![disk], witness, flags }
    }

    /// Everything up to these steps; the witness is made where it should be.
    fn come_to(&self, kind: OperationKind, protocol: Protocol, stages: &[Stage]) {
        let mut journal = Journal::open(&self.state).unwrap();
        let plan = self.plan(kind, protocol);
        let operation = journal.begin(ID, &plan, Map::new()).unwrap();
        let stamp = Stamp { kind: StampKind::Incomplete, operation, vm: "web".into() };
        stamp.cover(&self.state, &self.path("new.raw")).unwrap();
        for stage in stages {
            if *stage == Stage::PivotIntent {
                Witness::create(&self.state.witness(ID)).unwrap();
            }
            if *stage == Stage::ConfigCommitted {
                DurableDisks::commit(&self.state, operation, &plan).unwrap();
            }
            if *stage == Stage::SourceRetired {
                let kind = StampKind::Superseded { by: self.path("new.raw") };
                let stamp = Stamp { kind, operation, vm: "web".into() };
                stamp.write(&self.state, &self.path("old.raw")).unwrap();
            }
            journal.append(ID, *stage, Map::new()).unwrap();
        }
    }

    fn witness(&self, reading: Reading) {
        let path = self.state.witness(ID);
        if reading != Reading::Absent && !path.exists() {
            Witness::create(&path).unwrap();
        }
        let decide = |verdict, generation| {
            let operation = Operation { id: ID, generation, epoch: 1 };
            Witness::open(&path).unwrap().decide(verdict, operation, Value::Null).unwrap();
        };
        match reading {
            Reading::Absent => {
                let _ = fs::remove_file(path);
            }
            Reading::Pivoted => decide(Verdict::Pivoted, 1),
            Reading::Revoked => {
                decide(Verdict::Pivoted, 1);
                decide(Verdict::Revoked, 1);
            }
            Reading::Other => decide(Verdict::Pivoted, 2),
            Reading::Damaged => {
                decide(Verdict::Pivoted, 1);
                let mut bytes = fs::read(&path).unwrap();
                bytes[57] ^= 1;
                fs::write(path, bytes).unwrap();
            }
            Reading::Unreadable => fs::write(path, "something else").unwrap(),
            Reading::Unplanned | Reading::Empty => {}
        }
    }

    fn run(&self) -> Result<Resolution, ResolveError> {
        Resolver::new().run(&self.state)
    }

    /// Everything that lasts, as it lies there.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<_> = [self.base.path().to_owned(), self.state.path()]
            .iter()
            .filter_map(|directory| fs::read_dir(directory).ok())
            .flatten()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file() && !path.ends_with("lock"))
            // What a crash leaves of a replacement, and what the tests of crashes keep.
            .filter(|path| {
                let name = path.to_string_lossy();
                !name.contains(".durable") && ![".unnamed", ".new"].iter().any(|end| name.ends_with(end))
            })
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect();
        files.sort();
        files
    }

    fn assert_files(&self, before: &[(PathBuf, Vec<u8>)], context: &str) {
        let after = self.files();
        let names =
            |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|file| file.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&after), names(before), "{context}");
        for (before, after) in before.iter().zip(after) {
            assert!(*before == after, "{context}: {:?} has changed", before.0);
        }
    }

    /// Which image a start would open, and that nothing contradicts it.
    fn side(&self, disks: &DurableDisks) -> Side {
        let stamp = |image: &str| Stamp::read(&self.state, &self.path(image)).unwrap();
        match disks.successor("vda", &self.path("old.raw")) {
            Some(known) => {
                assert_eq!(known.by.path, self.path("new.raw"));
                assert_eq!(stamp("new.raw"), None);
                let by = self.path("new.raw");
                assert_eq!(stamp("old.raw").unwrap().kind, StampKind::Superseded { by });
                Side::Target
            }
            None => {
                assert_eq!(stamp("old.raw"), None);
                // It was there before, and is as it was until it is copied to.
                let copied = operations(&self.state).unwrap().last().unwrap().may_have_copied();
                let kind = stamp("new.raw").map(|stamp| stamp.kind);
                assert_eq!(kind, copied.then_some(StampKind::Incomplete));
                Side::Source
            }
        }
    }
}

use Stage::{
    Aborted, Commit, CompleteIntent, ConfigCommitted, Done, FreezeIntent, Frozen, Mirroring, PivotIntent,
    Pivoted, Prepared, Ready, Resumed, SourceRetired, StopIntent, Stopped, Thawed,
};

/// Every last record, each with a way to it.
fn ways(protocol: Protocol) -> Vec<Vec<Stage>> {
    let whole: &[Stage] = match protocol {
        Protocol::A => &[
            Prepared,
            Mirroring,
            Ready,
            FreezeIntent,
            Frozen,
            StopIntent,
            Stopped,
            PivotIntent,
            Pivoted,
            ConfigCommitted,
            Resumed,
            Thawed,
            SourceRetired,
            Done,
        ],
        Protocol::B => &[
            Prepared,
            Mirroring,
            Ready,
            FreezeIntent,
            Frozen,
            StopIntent,
            Stopped,
            CompleteIntent,
            Commit,
            Pivoted,
            ConfigCommitted,
            Resumed,
            Thawed,
            SourceRetired,
            Done,
        ],
    };
    let intent = whole.iter().position(|stage| [PivotIntent, CompleteIntent].contains(stage)).unwrap();
    let mut ways: Vec<_> = (0..=whole.len()).map(|end| whole[..end].to_vec()).collect();
    for from in 0..=intent + 1 {
        let aborted = |more: &[Stage]| [&whole[..from], &[Aborted], more].concat();
        ways.push(aborted(&[]));
        ways.push(aborted(&[Done]));
        ways.push([&whole[..from], &[Stage::Resolved(Side::Source)]].concat());
    }
    ways.push([&whole[..intent + 1], &[Aborted, Resumed, Thawed]].concat());
    let undecided = if protocol == Protocol::A { intent + 1 } else { intent + 2 };
    ways.push([&whole[..undecided], &[Stage::Resolved(Side::Target)]].concat());
    ways
}

/// The table of the module's header, once more and in other words.
fn expected(way: &[Stage], protocol: Protocol, reading: Reading) -> Decision {
    if way.last() == Some(&Done) {
        return Decision::Nothing;
    }
    let has = |stage| way.contains(&stage);
    if has(Aborted) || has(Stage::Resolved(Side::Source)) {
        return Decision::Source;
    }
    if has(Pivoted) || has(Stage::Resolved(Side::Target)) || has(Commit) {
        return Decision::Target;
    }
    if protocol == Protocol::B {
        return Decision::Source;
    }
    match reading {
        Reading::Pivoted => Decision::Target,
        Reading::Empty | Reading::Revoked | Reading::Other | Reading::Damaged => Decision::Source,
        _ if !has(PivotIntent) => Decision::Source,
        Reading::Unplanned => Decision::Undecidable(Undecidable::Unplanned),
        Reading::Absent => Decision::Undecidable(Undecidable::Absent),
        Reading::Unreadable => Decision::Undecidable(Undecidable::Unreadable),
    }
}

#[test]
fn every_last_record_with_every_witness_is_decided_as_the_table_says() {
    let mut decided = 0;
    for protocol in [Protocol::A, Protocol::B] {
        for way in ways(protocol) {
            let begun = Progress::planned(OperationKind::Pivot, protocol);
            let progress = way.iter().fold(begun, |progress, stage| progress.on(*stage).unwrap());
            for reading in Reading::ALL {
                let decision = decide(progress, OperationKind::Pivot, protocol, reading);
                assert_eq!(decision, expected(&way, protocol, reading), "{way:?}, witness {reading:?}");
                decided += 1;
            }
        }
    }
    assert!(decided > 500, "{decided}");
}

#[test]
fn a_mirror_and_a_backup_leave_the_disk_where_it_is() {
    for kind in [OperationKind::Mirror, OperationKind::Backup] {
        let mut ways = vec![&[][..], &[Prepared], &[Prepared, Mirroring], &[Prepared, Mirroring, Ready]];
        ways.push(match kind {
            OperationKind::Mirror => &[Prepared, Mirroring, Ready, Stage::EndIntent, Stage::Copied],
            _ => &[Prepared, Mirroring, Stage::Copied],
        });
        for way in ways {
            let begun = Progress::planned(kind, Protocol::A);
            let progress = way.iter().fold(begun, |progress, stage| progress.on(*stage).unwrap());
            for reading in Reading::ALL {
                assert_eq!(decide(progress, kind, Protocol::A, reading), Decision::Source);
            }
        }
    }
}

#[test]
fn what_was_decided_is_carried_out_and_once_more_changes_nothing() {
    for protocol in [Protocol::A, Protocol::B] {
        for way in ways(protocol).into_iter().filter(|way| way.last() != Some(&Done)) {
            let readings: &[Reading] = match protocol {
                Protocol::A => {
                    &[Reading::Empty, Reading::Pivoted, Reading::Revoked, Reading::Damaged, Reading::Other]
                }
                Protocol::B => &[Reading::Absent],
            };
            for &reading in readings {
                let lab = Lab::new();
                lab.come_to(OperationKind::Pivot, protocol, &way);
                lab.witness(reading);
                let resolution = lab.run().unwrap();
                let resolved = resolution.resolved.unwrap();
                let expected = match expected(&way, protocol, reading) {
                    Decision::Target => Side::Target,
                    _ => Side::Source,
                };
                assert_eq!(resolved.side, expected, "{way:?}, witness {reading:?}");
                assert_eq!(resolved.warnings, [] as [&str; 0]);
                let outcome = if expected == Side::Target { Outcome::Pivoted } else { Outcome::Aborted };
                assert_eq!(resolved.operation.outcome(), outcome);
                assert_eq!(lab.side(&resolution.disks), expected);
                assert!(!lab.state.witness(ID).exists());
                let before = lab.files();
                let again = lab.run().unwrap();
                assert_eq!((again.resolved, &again.disks), (None, &resolution.disks));
                lab.assert_files(&before, "the second time");
            }
        }
    }
}

#[test]
fn a_copy_that_is_complete_stays_one_when_the_vm_dies() {
    use Stage::{Copied, EndIntent};
    for (way, complete) in [
        (&[Prepared, Mirroring, Ready, EndIntent][..], false),
        (&[Prepared, Mirroring, Ready, StopIntent, Stopped, EndIntent, Copied], true),
    ] {
        let lab = Lab::new();
        lab.come_to(OperationKind::Mirror, Protocol::B, way);
        let resolved = lab.run().unwrap().resolved.unwrap();
        assert_eq!((resolved.side, resolved.warnings), (Side::Source, vec![]));
        let outcome = if complete { Outcome::Completed } else { Outcome::Aborted };
        assert_eq!(resolved.operation.outcome(), outcome);
        assert_eq!(Stamp::read(&lab.state, &lab.path("new.raw")).unwrap().is_none(), complete);
        assert_eq!(lab.run().unwrap().resolved, None);
    }
}

#[test]
fn a_target_that_was_there_has_the_stamp_it_had_until_it_is_copied_to() {
    let operation = Operation { id: Uuid::from_u128(1), generation: 7, epoch: 2 };
    let superseded = StampKind::Superseded { by: "/img/b.raw".into() };
    for kind in [None, Some(StampKind::Incomplete), Some(superseded)] {
        for (way, copied) in [(&[][..], false), (&[Prepared], false), (&[Prepared, Mirroring], true)] {
            let lab = Lab::new();
            let former = kind.clone().map(|kind| Stamp { kind, operation, vm: "db".into() });
            if let Some(former) = &former {
                former.write(&lab.state, &lab.path("new.raw")).unwrap();
            }
            lab.come_to(OperationKind::Pivot, Protocol::A, way);
            assert_eq!(lab.run().unwrap().resolved.unwrap().warnings, [] as [&str; 0]);
            let now = Stamp::read(&lab.state, &lab.path("new.raw")).unwrap();
            if copied {
                assert_eq!(now.unwrap().operation.id, ID, "{way:?}");
            } else {
                assert_eq!(now, former, "{way:?}");
            }
        }
    }
}

#[test]
fn a_lock_does_not_prove_that_the_vm_of_another_vmm_has_ended() {
    let lab = Lab::new();
    let mut journal = Journal::open(&lab.state).unwrap();
    let sockets = json!({"monitor": "/run/q.sock", "agent": "/run/a.sock"});
    journal.begin(ID, &lab.plan(OperationKind::Pivot, Protocol::B), details(sockets)).unwrap();
    drop(journal);
    let refused = Resolver::new().run(&lab.state).unwrap_err().to_string();
    assert!(
        refused.contains("`tarn recover web --monitor /run/q.sock --agent /run/a.sock` asks it"),
        "{refused}"
    );
    assert!(operations(&lab.state).unwrap().last().unwrap().is_open(), "nothing has changed");
    let resolved = Resolver::new().of_any_vmm().run(&lab.state).unwrap().resolved.unwrap();
    assert_eq!(resolved.side, Side::Source);
}

#[test]
fn what_cannot_be_told_is_refused_with_the_commands_that_decide_it() {
    for (reading, words) in [
        (Reading::Absent, "the witness that would say so has been removed"),
        (Reading::Unreadable, "the witness that would say so cannot be read"),
    ] {
        for choice in [Side::Source, Side::Target] {
            let lab = Lab::new();
            lab.come_to(OperationKind::Pivot, Protocol::A, &[Prepared, Mirroring, Ready, PivotIntent]);
            lab.witness(reading);
            let before = lab.files();
            let error = lab.run().unwrap_err().to_string();
            let (old, new) = (lab.path("old.raw"), lab.path("new.raw"));
            let expected = format!(
                "It cannot be told whether operation {ID} has moved the disks of VM web: the VMM may have pivoted, and \
                 {words}. Both images are as they were left; look at them, then run `tarn recover web --use source` to go \
                 on with {}, or `tarn recover web --use target` to go on with {}",
                old.display(),
                new.display()
            );
            assert_eq!(error, expected);
            lab.assert_files(&before, "refused");
            let resolution = Resolver::choosing(choice).run(&lab.state).unwrap();
            assert_eq!(resolution.resolved.unwrap().side, choice);
            assert_eq!(lab.side(&lab.run().unwrap().disks), choice);
        }
    }
}

#[test]
fn a_choice_does_not_overrule_what_is_written() {
    let lab = Lab::new();
    lab.come_to(OperationKind::Pivot, Protocol::A, &[Prepared, Mirroring, Ready, PivotIntent]);
    lab.witness(Reading::Pivoted);
    let error = Resolver::choosing(Side::Source).run(&lab.state).unwrap_err().to_string();
    assert_eq!(error, format!("Operation {ID} is decided: the target is the disk"));
    assert_eq!(operations(&lab.state).unwrap()[0].stage(), PivotIntent);
}

#[test]
fn a_coordinator_at_work_is_not_disturbed() {
    let lab = Lab::new();
    lab.come_to(OperationKind::Pivot, Protocol::A, &[Prepared]);
    let mut journal = Journal::open(&lab.state).unwrap();
    let refused = lab.run().unwrap_err();
    assert!(matches!(refused, ResolveError::Journal(JournalError::Locked { .. })), "{refused}");
    // It does it itself.
    let resolution = Resolver::new().run_in(&mut journal).unwrap();
    assert_eq!(resolution.resolved.unwrap().side, Side::Source);
    journal.begin(Uuid::from_u128(1), &lab.plan(OperationKind::Pivot, Protocol::A), Map::new()).unwrap();
}

#[test]
fn a_durable_configuration_that_is_older_than_the_journal_is_refused() {
    let lab = Lab::new();
    lab.come_to(OperationKind::Pivot, Protocol::A, &[Prepared, Mirroring, Ready, PivotIntent]);
    lab.witness(Reading::Pivoted);
    lab.run().unwrap();
    fs::remove_file(lab.state.disks()).unwrap();
    let error = lab.run().unwrap_err().to_string();
    assert!(error.contains("is of generation 0, and the journal knows of 1"), "{error}");
    fs::write(lab.state.disks(), "{").unwrap();
    assert!(lab.run().unwrap_err().to_string().ends_with("disks.json makes no sense"));
    fs::write(lab.state.disks(), r#"{"version": 2}"#).unwrap();
    assert!(lab.run().unwrap_err().to_string().contains("has version 2"));
}

#[test]
fn generations_go_on_where_they_were_when_the_journal_was_lost() {
    let lab = Lab::new();
    lab.come_to(OperationKind::Pivot, Protocol::A, &[Prepared, Mirroring, Ready, PivotIntent]);
    let old = fs::read(lab.state.journal()).unwrap();
    lab.witness(Reading::Pivoted);
    let disks = lab.run().unwrap().disks;
    fs::remove_file(lab.state.journal()).unwrap();
    assert_eq!(lab.run().unwrap(), Resolution { resolved: None, disks });
    assert_eq!(Journal::open(&lab.state).unwrap().generation(), 1);
    // One that was brought back is not taken to be about what came after it.
    fs::write(lab.state.journal(), old).unwrap();
    assert!(lab.run().unwrap_err().to_string().contains("the witness that would say so has been removed"));
    Resolver::choosing(Side::Source).run(&lab.state).unwrap();
    assert_eq!(Journal::open(&lab.state).unwrap().generation(), 1);
}

#[test]
fn a_vm_without_operations_is_left_alone() {
    let lab = Lab::new();
    let resolution = lab.run().unwrap();
    assert_eq!(resolution, Resolution { resolved: None, disks: DurableDisks::default() });
    assert!(!lab.state.base().exists());
}

#[test]
fn a_stamp_that_cannot_be_set_is_told_and_does_not_hold_up_the_rest() {
    let lab = Lab::new();
    lab.come_to(OperationKind::Pivot, Protocol::A, &[Prepared, Mirroring, Ready, PivotIntent]);
    lab.witness(Reading::Pivoted);
    let stamp = stamp::path_of(&lab.state, &lab.path("old.raw"));
    fs::create_dir(&stamp).unwrap();
    let resolved = lab.run().unwrap().resolved.unwrap();
    assert!(resolved.warnings[0].starts_with("Cannot replace the stamp "), "{:?}", resolved.warnings);
    assert_eq!(resolved.operation.stage(), Done);
}
