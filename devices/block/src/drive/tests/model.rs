//! Thousands of random schedules, and every mistake that one of them has to find.

use std::collections::BTreeMap;

use super::schedule::{Modes, Verdict, run, run_until_target_hangs};
use super::seed;
use crate::drive::mirror::Bug;

fn schedules() -> u64 {
    std::env::var("SCHEDULES").map_or(2000, |count| count.parse().unwrap())
}

fn all_are_good(modes: Modes) {
    let first = seed();
    let mut verdicts = BTreeMap::<Verdict, u64>::new();
    for seed in first..first + schedules() {
        let verdict = run(seed, modes, None);
        assert!(verdict.is_good(), "{verdict:?} with {modes:?}: SEED={seed} SCHEDULES=1 shows it again");
        *verdicts.entry(verdict).or_default() += 1;
    }
    println!("{modes:?}: {verdicts:?}");
    let count = |verdict| verdicts.get(&verdict).copied().unwrap_or(0);
    // The test has to reach what it is about.
    if schedules() >= 1000 {
        assert!(count(Verdict::Switched) + count(Verdict::Kept) > schedules() / 2);
    }
}

#[test]
fn a_background_mirror_ends_equal_and_durable_whatever_happens() {
    all_are_good(Modes::Background);
}

#[test]
fn a_write_blocking_mirror_ends_equal_and_durable_whatever_happens() {
    all_are_good(Modes::WriteBlocking);
}

#[test]
fn a_mirror_may_change_its_mode_at_any_moment() {
    all_are_good(Modes::Both);
}

#[test]
fn a_backup_is_what_the_disk_was_in_the_beginning_whatever_happens() {
    all_are_good(Modes::Backup);
}

#[test]
fn a_guest_does_not_wait_for_a_target_that_is_given_up() {
    for modes in [Modes::Background, Modes::WriteBlocking, Modes::Both, Modes::Backup] {
        let (first, mut hung) = (seed(), 0);
        for seed in first..first + schedules() {
            let verdict = run_until_target_hangs(seed, modes);
            assert!(verdict.is_good(), "{verdict:?} with {modes:?}: SEED={seed} SCHEDULES=1 shows it again");
            hung += u64::from(verdict == Verdict::GivenUp);
        }
        println!("{modes:?}: {hung} hung");
        assert!(hung > schedules() / 10, "{hung} hung with {modes:?}");
    }
}

/// The mistakes, and where they show.
const BUGS: &[(Bug, Modes)] = &[
    (Bug::AttachWithoutDrain, Modes::Background),
    (Bug::AttachWithoutDrain, Modes::WriteBlocking),
    (Bug::MarkAtSubmit, Modes::Background),
    (Bug::TakeAfterCopy, Modes::Background),
    (Bug::TakeAfterCopy, Modes::WriteBlocking),
    (Bug::TakeAfterActiveWrite, Modes::Both),
    (Bug::TakeTouched, Modes::WriteBlocking),
    (Bug::StaleExtent, Modes::Background),
    (Bug::NoLastPass, Modes::Background),
    (Bug::NoLastPass, Modes::WriteBlocking),
    (Bug::NoLastSync, Modes::Background),
    (Bug::NoLastSync, Modes::WriteBlocking),
    (Bug::FinishWithoutDrain, Modes::Background),
    (Bug::FinishWithoutDrain, Modes::WriteBlocking),
    (Bug::SourceFailureNotMarked, Modes::Background),
    (Bug::SourceFailureNotMarked, Modes::WriteBlocking),
    (Bug::TargetFailureNotMarked, Modes::Background),
    (Bug::TargetFailureNotMarked, Modes::WriteBlocking),
    (Bug::SyncFailureNotMarked, Modes::Background),
    (Bug::SyncFailureNotMarked, Modes::WriteBlocking),
    (Bug::SyncCoversTheFuture, Modes::WriteBlocking),
    (Bug::CopyWithoutClaim, Modes::WriteBlocking),
    (Bug::ActiveWithoutClaim, Modes::WriteBlocking),
    (Bug::NoBounce, Modes::WriteBlocking),
    (Bug::ZeroForEver, Modes::Background),
    (Bug::DiscardAsZeroes, Modes::WriteBlocking),
    (Bug::WriteBeforeCopy, Modes::Backup),
    (Bug::WriteDuringCopy, Modes::Backup),
    (Bug::AttachWithoutDrain, Modes::Backup),
    (Bug::TargetFailureNotMarked, Modes::Backup),
];

#[test]
fn every_mistake_is_found() {
    let first = seed();
    let mut missed = Vec::new();
    for (bug, modes) in BUGS {
        match (0..20_000).find(|n| !run(first + n, *modes, Some(*bug)).is_good()) {
            Some(n) => println!("{bug:?}, {modes:?}: found by schedule {}", n + 1),
            None => missed.push((bug, modes)),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
