//! After a run: which images are the disks, whether they are the right ones, and whether anything is missing in them.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::{Disk, DiskOptions, Format};
use coordinator::journal::{self, OperationLog, Outcome, Protocol, Side, Stage};
use coordinator::record::{RECORD_MAX, Record as Block};
use coordinator::resolve::Resolver;
use coordinator::stamp::{Stamp, StampKind};
use serde::{Deserialize, Serialize};

use crate::records::{Ledger, Promise, Root, has_strangers};
use crate::setup::Setup;

type Failure = Box<dyn Error>;

/// For the kernel to give back the lock of a process that is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a run has shown.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Findings {
    /// Writes that were promised and are not there.
    pub(crate) lost: Vec<String>,
    /// Disks that have the wrong image, or two.
    pub(crate) wrong: Vec<String>,
    /// What a second recovery has changed.
    pub(crate) repeated: Vec<String>,
    /// Whatever else should not be.
    pub(crate) other: Vec<String>,
    /// Somebody waited at the gate.
    pub(crate) reached: bool,
}

impl Findings {
    pub(crate) fn is_clean(&self) -> bool {
        let Self { lost, wrong, repeated, other, reached: _ } = self;
        [lost, wrong, repeated, other].iter().all(|list| list.is_empty())
    }

    /// All of it, a line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let Self { lost, wrong, repeated, other, reached: _ } = self;
        let named = [("lost", lost), ("wrong", wrong), ("repeated", repeated), ("other", other)];
        let line = |(name, list): (&str, &Vec<String>)| -> Vec<String> {
            list.iter().map(|what| format!("{name}: {what}")).collect()
        };
        named.into_iter().flat_map(line).collect()
    }
}

/// The side that the recovery table names for a VM that is dead. Written a second time, by the table and not by the
/// resolver: the one has to agree with the other.
pub(crate) fn by_table(setup: &Setup) -> Result<Side, Failure> {
    let operations = journal::operations(&setup.state())?;
    let Some(last) = operations.last() else { return Ok(Side::Source) };
    let has = |stages: &[Stage]| last.entries.iter().any(|entry| stages.contains(&entry.stage));
    Ok(if has(&[Stage::Pivoted, Stage::ConfigCommitted, Stage::Commit, Stage::Resolved(Side::Target)]) {
        Side::Target
    } else if has(&[Stage::Aborted, Stage::Resolved(Side::Source)]) || last.plan.protocol == Protocol::B {
        Side::Source
    } else if is_witnessed(last)? {
        Side::Target
    } else {
        Side::Source
    })
}

/// Whether the newest valid slot of the operation's witness says that it pivoted.
fn is_witnessed(operation: &OperationLog) -> Result<bool, Failure> {
    const PIVOTED: u16 = 1;
    let Some(path) = operation.plan.witness.as_deref().filter(|path| path.exists()) else { return Ok(false) };
    let bytes = fs::read(path)?;
    let slots = bytes.chunks_exact(RECORD_MAX).filter_map(|slot| Block::decode(slot).ok());
    let newest = slots.map(|(record, _)| record).max_by_key(|record| record.sequence);
    Ok(newest.is_some_and(|record| {
        record.kind == PIVOTED
            && record.operation.id == operation.id()
            && record.operation.generation == operation.operation.generation
    }))
}

/// What recovery writes: state directory and stamps, byte by byte.
pub(crate) fn snapshot(setup: &Setup) -> Result<BTreeMap<PathBuf, Vec<u8>>, Failure> {
    let mut files = state_of(&setup.state().path())?;
    files.append(&mut state_of(&setup.images())?);
    Ok(files)
}

/// What is in a directory but images, and what belongs to the emulation of a power cut.
fn state_of(directory: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>, Failure> {
    let mut files = BTreeMap::new();
    if directory.exists() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.to_string_lossy().into_owned();
            if ![".durable", ".unnamed"].iter().any(|shadow| name.contains(shadow))
                && !name.ends_with(".raw")
                && path.is_file()
            {
                files.insert(path.clone(), fs::read(path)?);
            }
        }
    }
    Ok(files)
}

/// Names of files that differ.
pub(crate) fn differences(
    before: &BTreeMap<PathBuf, Vec<u8>>,
    after: &BTreeMap<PathBuf, Vec<u8>>,
) -> Vec<String> {
    let all = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    let differing = all.filter(|path| before.get(*path) != after.get(*path));
    differing.map(|path| path.display().to_string()).collect()
}

/// Boots, as `tarn run` would: the images that are chosen are opened, and have all that was promised.
pub(crate) fn boot(
    setup: &Setup,
    named: Side,
    promise: Promise,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let state = setup.state();
    let resolution = Resolver::new().run(&state)?;
    if let Some(resolved) = resolution.resolved {
        findings.other.push(format!("operation {} was still open", resolved.operation.id()));
    }
    let log = fs::read_to_string(setup.log())?;
    for (index, ledger) in Ledger::parse(&log, setup.recipe.disks).iter().enumerate() {
        let source = setup.source(index);
        let successor = resolution.disks.successor(&Setup::disk(index), &source);
        let chosen = successor.map_or(source.clone(), |found| found.by.path.clone());
        let side = if chosen == source { Side::Source } else { Side::Target };
        if side != named {
            findings.wrong.push(format!("disk {index}: the {} and not the {}", side.name(), named.name()));
        }
        findings.wrong.extend(check_roots(index, ledger, side));
        findings.wrong.extend(check_stamp(setup, &resolution.disks, &chosen)?);
        let options = || DiskOptions { format: Some(Format::Raw), ..DiskOptions::path(&chosen) };
        if let Err(error) = Disk::open_after_another(options, PATIENCE) {
            findings.wrong.push(format!("disk {index} cannot be opened: {error}"));
            continue;
        }
        findings.lost.extend(ledger.check(index, &fs::read(&chosen)?, promise));
        findings.lost.extend(ledger.misread.iter().cloned());
        if fs::read(&source).is_ok_and(|image| has_strangers(&image)) {
            findings.wrong.push(format!("disk {index}: its source was written to after the pivot"));
        }
        if ledger.acknowledged() == 0 {
            findings.other.push(format!("disk {index}: the guest has written nothing"));
        }
    }
    Ok(())
}

/// The targets of a mirror or a backup: complete, with all that was promised when it began, and not stamped; or gone, or
/// stamped.
pub(crate) fn copies(setup: &Setup, early: &[Ledger], findings: &mut Findings) -> Result<(), Failure> {
    let Some(last) = journal::operations(&setup.state())?.pop() else { return Ok(()) };
    let log = fs::read_to_string(setup.log())?;
    let ledgers = Ledger::parse(&log, setup.recipe.disks);
    for (disk, (ledger, early)) in ledgers.iter().zip(early).enumerate() {
        let target = setup.target(disk);
        let stamp = Stamp::read(&setup.state(), &target)?;
        if last.outcome() != Outcome::Completed {
            if target.exists() && stamp.is_none() {
                findings.wrong.push(format!("The copy of disk {disk} is not complete, nor stamped"));
            }
            continue;
        }
        let lost = ledger.check_copy(early, disk, &fs::read(&target)?);
        findings.lost.extend(lost.into_iter().map(|lost| format!("copy of {lost}")));
    }
    Ok(())
}

/// Targets that were there before, and have not become disks: as they were, or stamped by the operation that has written
/// to them.
pub(crate) fn left_behind(setup: &Setup, stamps_fail: bool, findings: &mut Findings) -> Result<(), Failure> {
    let last = journal::operations(&setup.state())?.pop();
    let copied = last.as_ref().is_some_and(OperationLog::may_have_copied);
    for disk in 0..setup.recipe.disks {
        let target = setup.target(disk);
        let as_before = fs::read(&target).is_ok_and(|image| image == Setup::left_behind());
        if last.as_ref().is_some_and(|last| last.outcome() == Outcome::Completed) {
            continue;
        }
        let complaint = match Stamp::read(&setup.state(), &target)? {
            Some(stamp) if stamp == Setup::former() => (!as_before).then_some("was written to"),
            Some(stamp) if last.as_ref().is_some_and(|last| last.id() == stamp.operation.id) => {
                (!copied && !stamps_fail).then_some("is stamped, and nothing was copied to it")
            }
            _ => Some("has lost its stamp"),
        };
        findings.wrong.extend(complaint.map(|complaint| format!("The target of disk {disk} {complaint}")));
    }
    Ok(())
}

/// A disk works on its source, then perhaps on its target, and never on the one after it has worked on the other.
fn check_roots(index: usize, ledger: &Ledger, chosen: Side) -> Option<String> {
    let is_target: Vec<bool> = ledger.roots.iter().map(|root| *root == Root::Target).collect();
    if !is_target.is_sorted() {
        return Some(format!("disk {index} went back from its target"));
    }
    let used = is_target.last() == Some(&true);
    (used && chosen == Side::Source).then(|| format!("disk {index}: the guest has used the target"))
}

fn check_stamp(
    setup: &Setup,
    disks: &coordinator::disks::DurableDisks,
    image: &Path,
) -> Result<Option<String>, Failure> {
    let Some(stamp) = Stamp::read(&setup.state(), image)? else { return Ok(None) };
    let may = stamp.kind == StampKind::Incomplete && disks.is_current(image, stamp.operation.id);
    Ok((!may).then(|| format!("{} is stamped: {:?}", image.display(), stamp.kind)))
}
