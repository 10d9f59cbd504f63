//! A disk of which a backup is made, seen by its guest and by its owner.

use block::{MirrorOptions, MirrorRefusal, MirrorSync};

use super::*;

/// A backup of the rig's disk to a new image.
fn start(rig: &Rig, options: MirrorOptions) -> NamedTempFile {
    let target = image(MIB);
    let disk = Disk::open(DiskOptions::path(target.path())).unwrap();
    let ticket = rig.backend.start_backup(disk, &EngineOptions::default(), options).unwrap();
    ticket.wait(PATIENCE).unwrap();
    target
}

fn report(rig: &Rig) -> MirrorReport {
    match rig.event() {
        DiskEvent::Mirror { report, .. } => report,
        other @ DiskEvent::IoError { .. } => panic!("{other:?}"),
    }
}

fn content(image: &NamedTempFile) -> Vec<u8> {
    fs::read(image.path()).unwrap()
}

#[test]
fn a_backup_is_the_disk_as_of_its_start_and_ends_by_itself() {
    let mut rig = rig();
    assert_eq!(rig.write(0, &[1; 8192]), OK);
    let before = content(&rig.image);
    let target = start(&rig, MirrorOptions { speed: 4096, ..MirrorOptions::default() });
    // What the guest changes is saved before its write is done, however slow the rest is.
    assert_eq!(rig.write(8, &[2; 4096]), OK);
    assert_eq!(content(&target)[4096..8192], [1; 4096]);
    let quiesce = rig.backend.mirror(MirrorOrder::Quiesce { limit: u64::MAX }).wait(PATIENCE).unwrap_err();
    assert!(matches!(quiesce, BlkError::Mirror { source: MirrorRefusal::Backup, .. }));
    rig.backend.mirror(MirrorOrder::SetSpeed(0)).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Ready);
    assert_eq!(content(&target), before);
    // Complete, it is in nobody's way, until it is detached.
    assert_eq!(rig.write(16, &[3; 4096]), OK);
    rig.backend.mirror(MirrorOrder::Detach).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Detached);
    assert_eq!(content(&target), before);
    assert_eq!(rig.read(8, 8192), [[2; 4096], [3; 4096]].concat());
}

#[test]
fn a_backup_of_changes_alone_goes_on_until_it_is_detached() {
    let mut rig = rig();
    assert_eq!(rig.write(0, &vec![1; MIB]), OK);
    let target = start(&rig, MirrorOptions { sync: MirrorSync::None, ..MirrorOptions::default() });
    assert_eq!(rig.write(128, &[2; 512]), OK);
    let saved = content(&target);
    assert!(saved[..1 << 16].iter().all(|byte| *byte == 0));
    assert!(saved[1 << 16..2 << 16].iter().all(|byte| *byte == 1));
    // Even when all of it is saved there is no end but this.
    assert_eq!(rig.write(0, &vec![3; MIB]), OK);
    assert_eq!(rig.flush(), OK);
    rig.backend.mirror(MirrorOrder::Detach).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Detached);
    assert!(content(&target).iter().all(|byte| *byte == 1));
}

#[test]
fn disks_that_are_held_together_show_one_moment() {
    let mut rigs = [rig(), rig()];
    for rig in &mut rigs {
        assert_eq!(rig.write(0, &[1; 4096]), OK);
    }
    let holds: Vec<_> = rigs.iter().map(|rig| rig.backend.hold()).collect();
    let holds: Vec<_> =
        holds.into_iter().map(|(hold, ticket)| (hold, ticket.wait(PATIENCE).unwrap())).collect();
    // These wait, whatever else is done with the disk meanwhile.
    for rig in &mut rigs {
        rig.send_write(0, &[2; 4096]);
        rig.backend.pause().wait(PATIENCE).unwrap();
        rig.backend.resume().wait(PATIENCE).unwrap();
    }
    let targets = rigs.each_ref().map(|rig| start(rig, MirrorOptions::default()));
    assert!(rigs.iter().all(|rig| content(&rig.image)[..4096] == [1; 4096]));
    drop(holds);
    for (rig, target) in rigs.iter_mut().zip(&targets) {
        assert_eq!(rig.wait(), OK);
        assert_eq!(report(rig), MirrorReport::Ready);
        assert_eq!(content(target)[..4096], [1; 4096]);
        assert_eq!(rig.read(0, 4096), [2; 4096]);
    }
}
