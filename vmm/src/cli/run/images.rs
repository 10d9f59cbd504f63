//! Which image each disk has, settled before one is opened: the configuration may still name what a pivot has replaced.
//!
//! ```text
//!   journal ─▶ an operation is open? resolve it ─▶ durable configuration ─▶ image replaced? the one that took its place
//!                │                                                              │                  │
//!                └ undecidable: refused                                         │                  └ another device has
//!                                                                               └ stamped? refused   its name? refused
//! ```
//!
//! It happens under the lock of the VM's run-time directory: no process of that VM lives, and none starts meanwhile.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, bail};
use coordinator::disks::DurableDisks;
use coordinator::journal::{ImageId, JournalError, Side};
use coordinator::resolve::{ResolveError, Resolved, Resolver};
use coordinator::stamp::{self, Stamp, StampKind};
use coordinator::{StateDir, StateDirError};

use crate::cli::output;
use crate::config::{DiskSpec, VmSpec};

const FORCE: &str = "--force-stale-source";

/// Where block devices have their stamps for all users, if this one has no place of its own.
const SYSTEM: &str = "/var/lib/tarn";

/// Resolves what the VM left open when it last ended, gives each disk the image that it has by now, and refuses images
/// that are not to be booted. Disks that are named in `force`, or all if one of the names is empty, keep the image that
/// they are configured with.
pub(super) fn settle(spec: &mut VmSpec, force: &[String]) -> anyhow::Result<()> {
    let is_unknown = |name: &&String| !name.is_empty() && spec.disks.iter().all(|disk| disk.id != **name);
    if let Some(name) = force.iter().find(is_unknown) {
        bail!("{FORCE}={name}: VM {} has no disk of that id", spec.name);
    }
    let lines = match StateDir::of(&spec.name) {
        Ok(state) => settle_in(&state, spec, force)?,
        Err(error) => settle_without_state(error, spec, force)?,
    };
    for line in lines {
        output::complain(&line);
    }
    Ok(())
}

/// Nobody knows what was decided about these disks: none may be written to.
fn settle_without_state(
    error: StateDirError,
    spec: &VmSpec,
    force: &[String],
) -> anyhow::Result<Vec<String>> {
    if let Some(disk) = spec.disks.iter().find(|disk| !disk.read_only) {
        let (name, id) = (&spec.name, &disk.id);
        let why = format!("Cannot start VM {name}: it cannot be told which image disk '{id}' has by now");
        return Err(error).context(why);
    }
    let state = StateDir::below(Path::new(SYSTEM), &spec.name)?;
    let disks = DurableDisks::default();
    for disk in spec.disks.iter().filter(|disk| !is_forced(force, disk)) {
        check_stamp(&state, &disks, disk)?;
    }
    Ok(vec![])
}

fn is_forced(force: &[String], disk: &DiskSpec) -> bool {
    force.iter().any(|name| name.is_empty() || *name == disk.id)
}

/// The same, with what there is to say.
fn settle_in(state: &StateDir, spec: &mut VmSpec, force: &[String]) -> anyhow::Result<Vec<String>> {
    let resolution = match Resolver::new().run(state) {
        Ok(resolution) => resolution,
        Err(ResolveError::Journal(error @ JournalError::Locked { .. })) => {
            let wait = "it is about to see what has become of it; try again, or look with `tarn op list`";
            return Err(error).context(format!("Cannot start VM {}: {wait}", spec.name));
        }
        Err(error) => return Err(error).context(format!("Cannot start VM {}", spec.name)),
    };
    let mut lines: Vec<String> = resolution.resolved.iter().flat_map(told).collect();
    for disk in &mut spec.disks {
        if is_forced(force, disk) {
            lines.extend(why_stale(state, &resolution.disks, disk));
            continue;
        }
        lines.extend(replace(&resolution.disks, disk)?);
        check_stamp(state, &resolution.disks, disk)?;
        check_other_disks(&resolution.disks, disk)?;
    }
    Ok(lines)
}

fn told(resolved: &Resolved) -> Vec<String> {
    let Resolved { operation, side, witness, warnings } = resolved;
    let images = match side {
        Side::Source => "stay as they are",
        Side::Target => "have moved",
    };
    let disks: Vec<_> = operation.plan.disks.iter().map(|disk| disk.disk.as_str()).collect();
    let first = format!(
        "operation {}, which was open when VM and coordinator ended, is over: disks {} {images} (witness: {})",
        operation.id(),
        disks.join(", "),
        witness.name()
    );
    std::iter::once(first).chain(warnings.iter().cloned()).collect()
}

/// Gives the disk the image that took the place of the one it is configured with, by the name it has now.
fn replace(disks: &DurableDisks, disk: &mut DiskSpec) -> anyhow::Result<Option<String>> {
    let (image, why) = match disks.successor(&disk.id, &disk.path) {
        Some(found) => {
            (&found.by, format!("replaced {} by operation {}", disk.path.display(), found.operation))
        }
        None => match current_device(disks, disk) {
            Some(image) => (image, format!("was {} before", disk.path.display())),
            None => return Ok(None),
        },
    };
    let (id, path) = (&disk.id, disk.path.display());
    let now = image.locate().with_context(|| {
        format!("Disk '{id}': its image is not where it was; to boot {path} all the same, add {FORCE}={id}")
    })?;
    if now == disk.path {
        return Ok(None);
    }
    if matches!(fs::metadata(&now), Err(error) if error.kind() == ErrorKind::NotFound) {
        let now = now.display();
        bail!(
            "Disk '{id}': {now}, which {why}, does not exist. If it was moved, say where to: --disk IMAGE,id={id}; to boot \
             {path} all the same, add {FORCE}={id}"
        );
    }
    let line = format!("disk '{}': {}, which {why}", disk.id, now.display());
    disk.path = now;
    Ok(Some(line))
}

/// The block device that is the disk by now, if the disk is configured with its name, and another device may have that.
fn current_device<'a>(disks: &'a DurableDisks, disk: &DiskSpec) -> Option<&'a ImageId> {
    let image = &disks.disks.get(&disk.id)?.image;
    let is_certain = image.device.is_some() && image.is(&disk.path);
    (image.is_device() && image.is_named(&disk.path) && !is_certain).then_some(image)
}

/// What would have been done about a disk whose user insists on its image.
fn why_stale(state: &StateDir, disks: &DurableDisks, disk: &DiskSpec) -> Option<String> {
    let replaced = |by: &Path| format!("{} took its place", by.display());
    let found = disks.successor(&disk.id, &disk.path).or_else(|| disks.successor_of_any(&disk.path));
    let displaced = current_device(disks, disk).and_then(|image| image.locate().err());
    let why = match (found, Stamp::read(state, &disk.path)) {
        (Some(found), _) => replaced(&found.by.path),
        (None, Ok(None)) => displaced?.to_string(),
        (None, Ok(Some(Stamp { kind: StampKind::Superseded { by }, .. }))) => replaced(&by),
        (None, Ok(Some(stamp))) if disks.is_current(&disk.path, stamp.operation.id) => return None,
        (None, Ok(Some(_))) => "it is not complete".to_owned(),
        (None, Err(error)) => format!("its stamp makes no sense: {error}"),
    };
    Some(format!("disk '{}': boots {}, although {why} ({FORCE})", disk.id, disk.path.display()))
}

fn check_stamp(state: &StateDir, disks: &DurableDisks, disk: &DiskSpec) -> anyhow::Result<()> {
    let (id, path) = (&disk.id, disk.path.display());
    let instead = format!("to boot it all the same, add {FORCE}={id}");
    let stamp = Stamp::read(state, &disk.path);
    let Some(Stamp { kind, operation, vm }) = stamp
        .with_context(|| format!("Disk '{id}': it cannot be told whether {path} may be booted; {instead}"))?
    else {
        return Ok(());
    };
    match kind {
        // Its operation ended well, and died before it could remove it.
        StampKind::Incomplete if disks.is_current(&disk.path, operation.id) => Ok(()),
        StampKind::Incomplete => {
            let stamp = stamp::path_of(state, &disk.path);
            bail!(
                "Disk '{id}': {path} is not complete: operation {} of VM {vm} was copying to it. If it is complete by other \
                 means, remove the stamp: rm {}; {instead}",
                operation.id,
                stamp.display()
            )
        }
        // Who only reads it knows what he reads.
        StampKind::Superseded { .. } if disk.read_only => Ok(()),
        StampKind::Superseded { by } => {
            refuse_superseded(disk, &by, &format!("operation {} of VM {vm}", operation.id))
        }
    }
}

/// An image that was another disk of this VM, and is not any more.
fn check_other_disks(disks: &DurableDisks, disk: &DiskSpec) -> anyhow::Result<()> {
    match disks.successor_of_any(&disk.path) {
        Some(found) if !disk.read_only => {
            refuse_superseded(disk, &found.by.path, &format!("operation {} of this VM", found.operation))
        }
        _ => Ok(()),
    }
}

fn refuse_superseded(disk: &DiskSpec, by: &Path, operation: &str) -> anyhow::Result<()> {
    let (id, path, by) = (&disk.id, disk.path.display(), by.display());
    bail!(
        "Disk '{id}': {path} was replaced by {by} in {operation}, and lacks what was written since. Use --disk {by},id={id}; \
         to boot the old one all the same, add {FORCE}={id}"
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use coordinator::journal::{DiskPlan, Journal, OperationKind, Plan, PlanFlags, Protocol, Stage};
    use coordinator::record::Operation;
    use coordinator::record::witness::{Verdict, Witness};
    use serde_json::{Map, Value};
    use uuid::Uuid;

    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    struct Lab {
        base: tempfile::TempDir,
        state: StateDir,
    }

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

        /// A pivot of `vda` that nobody has seen the end of.
        fn pivot(&self, verdict: Option<Verdict>, retire_source: bool) {
            let mut journal = Journal::open(&self.state).unwrap();
            let image = |name: &str| ImageId::of(&self.path(name)).unwrap();
            let disk = DiskPlan { disk: "vda".into(), source: image("old.raw"), target: image("new.raw") };
            let plan = Plan {
                kind: OperationKind::Pivot,
                protocol: Protocol::A,
                disks: vec![disk],
                witness: Some(self.state.witness(ID)),
                flags: PlanFlags { retire_source, ..PlanFlags::default() },
            };
            let operation = journal.begin(ID, &plan, Map::new()).unwrap();
            let stamp = Stamp { kind: StampKind::Incomplete, operation, vm: "web".into() };
            stamp.write(&self.state, &self.path("new.raw")).unwrap();
            for stage in [Stage::Prepared, Stage::Mirroring, Stage::Ready, Stage::PivotIntent] {
                journal.append(ID, stage, Map::new()).unwrap();
            }
            let mut witness = Witness::create(&self.state.witness(ID)).unwrap();
            if let Some(verdict) = verdict {
                witness.decide(verdict, operation, Value::Null).unwrap();
            }
        }

        fn spec(&self, disks: &[&str]) -> VmSpec {
            let disk =
                |text: &&str| text.replace("DIR/", &self.path("").display().to_string()).parse().unwrap();
            VmSpec { name: "web".into(), disks: disks.iter().map(disk).collect(), ..VmSpec::default() }
        }

        /// What is said, and the images that are booted.
        fn settle(&self, disks: &[&str], force: bool) -> Result<(String, Vec<PathBuf>), String> {
            self.settle_but(disks, if force { &[""] } else { &[] })
        }

        fn settle_but(&self, disks: &[&str], force: &[&str]) -> Result<(String, Vec<PathBuf>), String> {
            let mut spec = self.spec(disks);
            let force: Vec<String> = force.iter().map(|&name| name.to_owned()).collect();
            let lines = settle_in(&self.state, &mut spec, &force).map_err(|error| format!("{error:#}"))?;
            Ok((lines.join("\n"), spec.disks.into_iter().map(|disk| disk.path).collect()))
        }
    }

    const OLD: &str = "DIR/old.raw,id=vda";

    #[test]
    fn a_vm_without_operations_boots_what_it_is_configured_with() {
        let lab = Lab::new();
        assert_eq!(lab.settle(&[OLD], false).unwrap(), (String::new(), vec![lab.path("old.raw")]));
        assert!(!lab.state.base().exists());
    }

    #[test]
    fn a_pivot_that_nobody_saw_the_end_of_is_resolved_and_the_disk_is_where_the_witness_says() {
        let lab = Lab::new();
        lab.pivot(Some(Verdict::Pivoted), false);
        let (old, new) = (lab.path("old.raw"), lab.path("new.raw"));
        let moved =
            format!("disk 'vda': {}, which replaced {} by operation {ID}", new.display(), old.display());
        let (said, booted) = lab.settle(&[OLD], false).unwrap();
        let resolved = format!(
            "operation {ID}, which was open when VM and coordinator ended, is over: disks vda have moved (witness: pivoted)"
        );
        assert_eq!((said, booted), (format!("{resolved}\n{moved}"), vec![new.clone()]));
        // From now on only what is of interest is said; a configuration that names the new one is right.
        assert_eq!(lab.settle(&[OLD], false).unwrap(), (moved, vec![new.clone()]));
        assert_eq!(lab.settle(&["DIR/new.raw,id=vda"], false).unwrap(), (String::new(), vec![new]));
        let stale = format!(
            "disk 'vda': boots {}, although {} took its place (--force-stale-source)",
            old.display(),
            lab.path("new.raw").display()
        );
        assert_eq!(lab.settle(&[OLD], true).unwrap(), (stale.clone(), vec![old.clone()]));
        // One that needs it does not take the others along.
        fs::write(lab.path("x.raw"), "").unwrap();
        fs::write(lab.path("x.raw.stamp"), "nonsense").unwrap();
        let both = [OLD, "DIR/x.raw,id=vdb"];
        let (said, booted) = lab.settle_but(&both, &["vdb"]).unwrap();
        assert!(said.contains("'vdb': boots ") && said.contains("its stamp makes no sense"), "{said}");
        assert_eq!(booted, [lab.path("new.raw"), lab.path("x.raw")]);
        assert!(lab.settle_but(&both, &["vda"]).is_err());
        assert_eq!(lab.settle_but(&both[..1], &["vda"]).unwrap(), (stale, vec![old]));
    }

    #[test]
    fn an_image_that_was_moved_by_hand_can_be_named() {
        let lab = Lab::new();
        lab.pivot(Some(Verdict::Pivoted), false);
        lab.settle(&[OLD], false).unwrap();
        fs::rename(lab.path("new.raw"), lab.path("moved.raw")).unwrap();
        let refused = lab.settle(&[OLD], false).unwrap_err();
        let expected = "does not exist. If it was moved, say where to: --disk IMAGE,id=vda; to boot ";
        assert!(refused.contains("/new.raw, which replaced ") && refused.contains(expected), "{refused}");
        let (_, booted) = lab.settle(&["DIR/moved.raw,id=vda"], false).unwrap();
        assert_eq!(booted, [lab.path("moved.raw")]);
        assert_eq!(lab.settle(&[OLD], true).unwrap().1, [lab.path("old.raw")]);
    }

    #[test]
    fn without_a_place_for_what_lasts_a_disk_is_read_at_most_and_not_if_it_is_stamped() {
        let lab = Lab::new();
        let settle = |disk: &str| {
            settle_without_state(StateDirError::NoBase, &lab.spec(&[disk]), &[])
                .map_err(|error| format!("{error:#}"))
        };
        let refused = settle(OLD).unwrap_err();
        assert!(refused.contains("disk 'vda'") && refused.contains("set TARN_STATE_DIR,"), "{refused}");
        let read_only = format!("{OLD},ro");
        assert_eq!(settle(&read_only).unwrap(), Vec::<String>::new());
        let operation = Operation { id: ID, generation: 1, epoch: 1 };
        let stamp = Stamp { kind: StampKind::Incomplete, operation, vm: "web".into() };
        stamp.write(&lab.state, &lab.path("old.raw")).unwrap();
        assert!(settle(&read_only).unwrap_err().contains("is not complete"));
    }

    #[test]
    fn only_a_disk_that_is_there_is_forced() {
        let mut spec = Lab::new().spec(&[OLD]);
        let refused = super::settle(&mut spec, &["vdx".to_owned()]).unwrap_err().to_string();
        assert_eq!(refused, "--force-stale-source=vdx: VM web has no disk of that id");
    }

    #[test]
    fn a_pivot_that_did_not_happen_leaves_the_disk_and_a_target_that_is_not_booted() {
        let lab = Lab::new();
        lab.pivot(None, true);
        let (said, booted) = lab.settle(&[OLD], false).unwrap();
        assert!(said.ends_with("disks vda stay as they are (witness: empty)"), "{said}");
        assert_eq!(booted, [lab.path("old.raw")]);
        for options in ["", ",ro"] {
            let target = format!("DIR/new.raw,id=vda{options}");
            let refused = lab.settle(&[&target], false).unwrap_err();
            let new = lab.path("new.raw");
            let expected = format!(
                "Disk 'vda': {new} is not complete: operation {ID} of VM web was copying to it. If it is complete by other \
                 means, remove the stamp: rm {new}.stamp; to boot it all the same, add --force-stale-source=vda",
                new = new.display()
            );
            assert_eq!(refused, expected);
            lab.settle(&[&target], true).unwrap();
        }
    }

    #[test]
    fn what_was_a_disk_and_is_none_any_more_is_read_and_not_written() {
        for retire_source in [false, true] {
            let lab = Lab::new();
            lab.pivot(Some(Verdict::Pivoted), retire_source);
            let both = ["DIR/new.raw,id=vda", "DIR/old.raw,id=vdb"];
            let refused = lab.settle(&both, false).unwrap_err();
            let (old, new) = (lab.path("old.raw"), lab.path("new.raw"));
            let expected =
                format!("Disk 'vdb': {} was replaced by {} in operation {ID}", old.display(), new.display());
            assert!(refused.starts_with(&expected), "{refused}");
            assert!(refused.contains(&format!("Use --disk {},id=vdb;", new.display())), "{refused}");
            lab.settle(&both, true).unwrap();
            lab.settle(&["DIR/new.raw,id=vda", "DIR/old.raw,id=vdb,ro"], false).unwrap();
        }
    }

    #[test]
    fn an_image_that_another_vm_has_left_behind_is_refused() {
        let lab = Lab::new();
        let operation = Operation { id: ID, generation: 3, epoch: 1 };
        let kind = StampKind::Superseded { by: "/img/new.raw".into() };
        let stamp = Stamp { kind, operation, vm: "db".into() };
        stamp.write(&lab.state, &lab.path("old.raw")).unwrap();
        let refused = lab.settle(&[OLD], false).unwrap_err();
        let expected =
            "was replaced by /img/new.raw in operation 00000000-0000-0000-0000-000000000007 of VM db,";
        assert!(refused.contains(expected), "{refused}");
        fs::write(lab.path("old.raw.stamp"), "nonsense").unwrap();
        let refused = lab.settle(&[OLD], false).unwrap_err();
        assert!(refused.contains("cannot be told whether") && refused.contains(FORCE), "{refused}");
        assert_eq!(lab.settle(&[OLD], true).unwrap().1, [lab.path("old.raw")]);
    }

    #[test]
    fn a_block_device_that_is_not_where_it_was_is_not_taken_for_another_one() {
        let lab = Lab::new();
        let device = |name: &str, device: &str| {
            let path = lab.path(name);
            ImageId { path, device: Some(device.into()), file: None, size: 512 }
        };
        let disk = DiskPlan {
            disk: "vda".into(),
            source: device("old.raw", "naa.1"),
            target: device("new.raw", "naa.2"),
        };
        let plan = Plan {
            kind: OperationKind::Pivot,
            protocol: Protocol::B,
            disks: vec![disk],
            witness: None,
            flags: PlanFlags::default(),
        };
        let operation = Operation { id: ID, generation: 1, epoch: 1 };
        lab.state.create().unwrap();
        DurableDisks::commit(&lab.state, operation, &plan).unwrap();
        // By its old name, and by its new one.
        for disk in [OLD, "DIR/new.raw,id=vda"] {
            let refused = lab.settle(&[disk], false).unwrap_err();
            let expected = format!(
                "Disk 'vda': its image is not where it was; to boot {} all the same, add {FORCE}=vda: {} was the block \
                 device naa.2, and now it is no block device; that one is not attached",
                lab.spec(&[disk]).disks[0].path.display(),
                lab.path("new.raw").display()
            );
            assert_eq!(refused, expected);
            let (said, booted) = lab.settle(&[disk], true).unwrap();
            assert!(said.contains("although "), "{said}");
            assert_eq!(booted, [lab.spec(&[disk]).disks[0].path.clone()]);
        }
        // What has the name of a device that was a disk once is none of it.
        lab.settle(&["DIR/old.raw,id=vdb"], false).unwrap();
    }

    #[test]
    fn what_cannot_be_told_is_refused_even_with_force() {
        let lab = Lab::new();
        lab.pivot(Some(Verdict::Pivoted), false);
        fs::remove_file(lab.state.witness(ID)).unwrap();
        for force in [false, true] {
            let refused = lab.settle(&[OLD], force).unwrap_err();
            assert!(
                refused.starts_with("Cannot start VM web: It cannot be told whether operation"),
                "{refused}"
            );
            assert!(refused.contains("`tarn recover web --use target`"), "{refused}");
        }
    }

    #[test]
    fn a_coordinator_that_lives_has_the_first_word() {
        let lab = Lab::new();
        lab.pivot(Some(Verdict::Pivoted), false);
        let _coordinator = Journal::open(&lab.state).unwrap();
        let refused = lab.settle(&[OLD], false).unwrap_err();
        let end = format!("Process {} coordinates VM web", std::process::id());
        assert!(refused.starts_with("Cannot start VM web: ") && refused.ends_with(&end), "{refused}");
    }
}
