//! Everything that a pivot and its recovery put on disk, with a crash or an error at every place there is.
//!
//! A child process plays coordinator and VMM of one pivot and notes which image the guest has used since. It is killed,
//! or one of its operations fails, at one place; then the machine loses power, or does not. Whatever happened, recovery
//! has to choose the image that the guest has used, and to do it again must change nothing.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::*;
use super::{ID, Lab};
use crate::journal::{DiskPlan, ImageId, Plan, PlanFlags};
use crate::lose_power;

const LAB: &str = "TARN_CRASH_LAB";
const ROLE: &str = "TARN_CRASH_ROLE";

impl Lab {
    /// A child process in this lab; `place` as in `TARN_FAILPOINT`.
    fn child(&self, role: &str, place: &str) {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "resolve::tests::crashes::child", "--test-threads=1"]);
        command.env(LAB, self.base.path()).env(ROLE, role).env("TARN_FAILPOINT", place);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap();
    }

    fn used(&self) -> Option<String> {
        fs::read_to_string(self.path("used")).ok()
    }

    /// After a crash: what counts is there, and stays. A stamp that could not be written, or a witness that could not
    /// be removed, was told and given up.
    fn check(&self, context: &str, all_lasts: bool) {
        let side = Resolver::new().run(&self.state).unwrap_or_else(|error| panic!("{context}: {error}"));
        let now = match side.disks.successor("vda", &self.path("old.raw")) {
            Some(_) => "target",
            None => "source",
        };
        if let Some(used) = self.used() {
            assert_eq!(now, used, "{context}: the guest has used the other image");
        }
        if all_lasts && fs::exists(self.path("former")).unwrap() {
            let stamp = Stamp::read(&self.state, &self.path("new.raw")).unwrap();
            assert_eq!(stamp, Some(former()), "{context}");
        }
        let before = self.files();
        let again = Resolver::new().run(&self.state).unwrap();
        assert_eq!((again.resolved, again.disks), (None, side.disks), "{context}");
        self.assert_files(&before, &format!("{context}: the second time"));
        // And what was said was not only in memory.
        self.lose_power();
        if !all_lasts {
            assert_eq!(Resolver::new().run(&self.state).unwrap().resolved, None, "{context}");
            return;
        }
        let later = Resolver::new().run(&self.state).unwrap();
        self.assert_files(&before, &format!("{context}: power lost after the recovery"));
        assert_eq!(later.resolved, None, "{context}");
    }

    fn lose_power(&self) {
        for directory in [self.base.path(), &self.state.path()] {
            if directory.exists() {
                lose_power(directory);
            }
        }
    }
}

/// Not a test: what a child process does.
#[test]
fn child() {
    let Some(base) = env::var_os(LAB) else { return };
    let base = fs::canonicalize(base).unwrap();
    let state = StateDir::below(&base.join("state"), "web").unwrap();
    // It stops at the first thing that it cannot do, as a coordinator does.
    let _ = match env::var(ROLE).unwrap().as_str() {
        "pivot" => pivot(&base, &state, Protocol::A),
        "commit" => pivot(&base, &state, Protocol::B),
        "reuse" => reuse(&base, &state),
        _ => Resolver::new().run(&state).map(drop).map_err(Into::into),
    };
}

type Stopped = Box<dyn std::error::Error>;

/// The guest goes on, and its writes reach this image; that is on disk.
fn use_image(base: &Path, side: &str) {
    fs::write(base.join("used"), side).unwrap();
}

fn pivot(base: &Path, state: &StateDir, protocol: Protocol) -> Result<(), Stopped> {
    let mut journal = Journal::open(state)?;
    let image = |name: &str| ImageId::of(&base.join(name)).unwrap();
    let disk = DiskPlan { disk: "vda".into(), source: image("old.raw"), target: image("new.raw") };
    let witness = (protocol == Protocol::A).then(|| state.witness(ID));
    let flags = PlanFlags { retire_source: true, ..Default::default() };
    let plan = Plan { kind: OperationKind::Pivot, protocol, disks: vec![disk], witness, flags };
    let operation = journal.begin(ID, &plan, Map::new())?;
    let mut step = |stage| journal.append(ID, stage, Map::new()).map(drop);
    let stamp = Stamp { kind: StampKind::Incomplete, operation, vm: "web".into() };
    stamp.write(state, &base.join("new.raw"))?;
    for stage in [Stage::Prepared, Stage::Mirroring, Stage::Ready] {
        step(stage)?;
    }
    if protocol == Protocol::A {
        let mut witness = Witness::create(&state.witness(ID))?;
        step(Stage::PivotIntent)?;
        // From here on guest I/O is held; this is the VMM.
        if witness.decide(Verdict::Pivoted, operation, Value::Null).is_err() {
            witness.decide(Verdict::Revoked, operation, Value::Null)?;
            use_image(base, "source");
            step(Stage::Aborted)?;
            Witness::remove(&state.witness(ID))?;
            step(Stage::Done)?;
            return Ok(());
        }
    } else {
        step(Stage::CompleteIntent)?;
        step(Stage::Commit)?;
    }
    use_image(base, "target");
    step(Stage::Pivoted)?;
    conclude_target(&mut journal, ID, &mut Vec::new())?;
    Witness::remove(&state.witness(ID))?;
    journal.append(ID, Stage::Done, Map::new())?;
    Ok(())
}

/// A pivot to an image that another VM has left behind, which ends before it has copied anything.
fn reuse(base: &Path, state: &StateDir) -> Result<(), Stopped> {
    let mut journal = Journal::open(state)?;
    let image = |name: &str| ImageId::of(&base.join(name)).unwrap();
    let disk = DiskPlan { disk: "vda".into(), source: image("old.raw"), target: image("new.raw") };
    let (kind, protocol, flags) = (OperationKind::Pivot, Protocol::B, PlanFlags::default());
    let plan = Plan { kind, protocol, disks: vec![disk], witness: None, flags };
    let operation = journal.begin(ID, &plan, Map::new())?;
    let stamp = Stamp { kind: StampKind::Incomplete, operation, vm: "web".into() };
    stamp.cover(state, &base.join("new.raw"))?;
    journal.append(ID, Stage::Prepared, Map::new())?;
    journal.append(ID, Stage::Aborted, Map::new())?;
    Stamp::uncover(state, &base.join("new.raw"), &operation)?;
    journal.append(ID, Stage::Done, Map::new())?;
    Ok(())
}

/// Every place that a role passes, in a lab that `prepare` has made.
fn places(role: &str, prepare: &(dyn Fn(&Lab) + Sync)) -> Vec<String> {
    let lab = Lab::new();
    prepare(&lab);
    let log = lab.path("places");
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "resolve::tests::crashes::child", "--test-threads=1"]);
    command.env(LAB, lab.base.path()).env(ROLE, role).env("TARN_FAILPOINT_LOG", &log);
    assert!(command.stdout(Stdio::null()).status().unwrap().success());
    let mut passed: HashMap<String, usize> = HashMap::new();
    let log = fs::read_to_string(log).unwrap();
    log.lines()
        .map(|place| {
            let nth = passed.entry(place.to_owned()).or_default();
            *nth += 1;
            format!("{place}:{nth}")
        })
        .collect()
}

/// Lets every place do what `actions` say, each with and without a power loss, and checks what is left.
fn crash_everywhere(role: &str, actions: &[&str], prepare: &(dyn Fn(&Lab) + Sync)) -> usize {
    let places = places(role, prepare);
    let is_thorough = env::var_os("TARN_SOAK").is_some();
    let mut runs = Vec::new();
    for (index, place) in places.iter().enumerate() {
        for action in actions {
            // Errors every other time with a power loss, as each takes a while.
            let wanted = |power: &bool| is_thorough || *action == "=kill" || (index % 2 == 0) == *power;
            runs.extend(
                [false, true].into_iter().filter(wanted).map(|power| (format!("{place}{action}"), power)),
            );
        }
    }
    let next = AtomicUsize::new(0);
    // Each waits for a disk most of the time.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some((place, loses_power)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let lab = Lab::new();
                    prepare(&lab);
                    lab.child(role, place);
                    if *loses_power {
                        lab.lose_power();
                    }
                    let optional = ["stamp.", "witness.remove."].iter().any(|file| place.starts_with(file));
                    let all_lasts = !optional || place.ends_with("=kill");
                    lab.check(&format!("{role}, {place}, power lost: {loses_power}"), all_lasts);
                }
            });
        }
    });
    runs.len()
}

fn nothing(_: &Lab) {}

#[test]
fn a_pivot_by_witness_may_die_anywhere() {
    let runs = crash_everywhere("pivot", &["=kill"], &nothing);
    assert!(runs > 100, "{runs}");
}

#[test]
fn a_pivot_by_witness_may_meet_a_disk_that_fails_anywhere() {
    crash_everywhere("pivot", &["+=eio"], &nothing);
}

#[test]
fn a_pivot_by_commit_may_die_or_fail_anywhere() {
    crash_everywhere("commit", &["=kill", "=enospc"], &nothing);
}

/// What another VM has left on an image.
fn former() -> Stamp {
    let operation = Operation { id: Uuid::from_u128(1), generation: 7, epoch: 2 };
    Stamp { kind: StampKind::Superseded { by: "/img/b.raw".into() }, operation, vm: "db".into() }
}

#[test]
fn a_target_that_was_there_has_its_stamp_again_wherever_an_operation_dies_or_fails_before_it_copies() {
    let prepare = |lab: &Lab| {
        former().write(&lab.state, &lab.path("new.raw")).unwrap();
        fs::write(lab.path("former"), "").unwrap();
    };
    let runs = crash_everywhere("reuse", &["=kill", "=eio"], &prepare);
    assert!(runs > 50, "{runs}");
}

#[test]
fn a_recovery_may_die_or_fail_anywhere_and_is_done_again() {
    for used in ["target", "source"] {
        let prepare = move |lab: &Lab| {
            // Died when the witness was there, or just before.
            let place = if used == "target" { "journal.pivoted.before" } else { "witness.pivoted.before" };
            lab.child("pivot", place);
            use_image(lab.base.path(), used);
        };
        crash_everywhere("recover", &["=kill", "+=eio"], &prepare);
    }
}

#[test]
fn a_decision_that_was_read_and_is_lost_with_the_power_does_not_come_back() {
    // The witness is written and not synced when the VMM is killed: readable, and gone after a power loss.
    let lab = Lab::new();
    lab.child("pivot", "witness.pivoted.written");
    let first = Resolver::new().run(&lab.state).unwrap();
    assert_eq!(first.resolved.unwrap().side, Side::Target);
    lab.lose_power();
    let second = Resolver::new().run(&lab.state).unwrap();
    assert_eq!((second.resolved, &second.disks), (None, &first.disks));
    assert_eq!(lab.side(&second.disks), Side::Target);
}
