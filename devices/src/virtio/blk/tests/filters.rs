//! Limits and faults of a disk, seen by its guest and by its owner.

use std::time::Duration;

use block::{FaultOperation, FaultRule, Filters, MirrorAction, MirrorOptions, Rate, Rates, ThrottleLimits};

use super::*;

fn filtered(adjust: impl FnOnce(&mut BlkOptions)) -> (Rig, Filters) {
    let filters = Filters::new().unwrap();
    let setup = Setup::new(MIB).with(|_, blk| {
        blk.engine.filters = Some(filters.clone());
        adjust(blk);
    });
    (setup.start(ALL), filters)
}

fn one_per_second() -> ThrottleLimits {
    let total = Rate { average: 1, ..Rate::default() };
    ThrottleLimits { operations: Rates { total, ..Rates::default() }, ..ThrottleLimits::default() }
}

fn eio_on_writes() -> FaultRule {
    FaultRule { errno: Some(Errno::new(libc::EIO)), ..FaultRule::new(FaultOperation::Write) }
}

#[test]
fn whoever_waits_for_a_throttled_disk_does_not_wait_for_its_limits() {
    for kind in engines() {
        let (mut rig, filters) = filtered(|blk| blk.engine.kind = Some(kind));
        filters.set_limits(one_per_second()).unwrap();
        let start = Instant::now();
        let send = |rig: &mut Rig, first| {
            for sector in first..first + 30 {
                rig.send_write(sector, &[1; 512]);
            }
        };
        send(&mut rig, 0);
        assert_eq!(rig.wait(), OK);
        rig.backend.pause().wait(PATIENCE).unwrap();
        (1..30).for_each(|_| assert_eq!(rig.wait(), OK));
        rig.backend.resume().wait(PATIENCE).unwrap();
        // The limits are what they were; a reset of the device does not wait for them either.
        send(&mut rig, 100);
        rig.driver.reset();
        assert_eq!(filters.limits(), one_per_second());
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

#[test]
fn a_fault_stops_the_vm_and_is_retried_when_it_goes_on() {
    let (mut rig, filters) = filtered(|blk| blk.write_error = ErrorPolicy::Stop);
    let id = filters.add_fault(eio_on_writes()).unwrap();
    rig.send_write(8, &[5; 512]);
    assert_eq!(rig.event(), io_error(DiskOperation::Write, ErrorAction::Stop, libc::EIO, 8));
    assert!(filters.remove_fault(id));
    rig.backend.resume().wait(PATIENCE).unwrap();
    assert_eq!(rig.wait(), OK);
    assert_eq!(rig.read(8, 512), [5; 512]);
}

#[test]
fn filters_stay_with_the_device_when_its_image_changes() {
    let (mut rig, filters) = filtered(|_| ());
    let target = image(MIB);
    let disk = Disk::open(DiskOptions::path(target.path())).unwrap();
    filters.set_limits(one_per_second()).unwrap();
    let id = filters.add_fault(eio_on_writes()).unwrap();
    let start = Instant::now();
    let ticket = rig.backend.start_mirror(disk, &EngineOptions::default(), MirrorOptions::default()).unwrap();
    ticket.wait(PATIENCE).unwrap();
    let report = |rig: &Rig| match rig.event() {
        DiskEvent::Mirror { report, .. } => report,
        other @ DiskEvent::IoError { .. } => panic!("{other:?}"),
    };
    // Neither is the copy limited, nor do its writes fail: it is not the device's.
    assert_eq!(report(&rig), MirrorReport::Ready);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    rig.backend.mirror(MirrorOrder::Quiesce { limit: u64::MAX }).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Quiesced);
    rig.backend.mirror(MirrorOrder::Switch).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Switched);
    assert_eq!(rig.write(0, &[1; 512]), IOERR);
    assert_eq!(rig.event(), io_error(DiskOperation::Write, ErrorAction::Report, libc::EIO, 0));
    assert!(filters.remove_fault(id));
    let start = Instant::now();
    assert_eq!(rig.write(0, &[1; 512]), OK);
    assert_eq!(rig.write(0, &[1; 512]), OK);
    assert!(start.elapsed() > Duration::from_millis(500), "{:?}", start.elapsed());
    // Changes reach the new image's engine, in its sleep as well.
    rig.send_write(0, &[1; 512]);
    filters.set_limits(ThrottleLimits::default()).unwrap();
    assert_eq!(rig.wait(), OK);
    assert!(start.elapsed() < Duration::from_secs(30));
}

fn one_byte_per_second() -> ThrottleLimits {
    let total = Rate { average: 1, ..Rate::default() };
    ThrottleLimits { bytes: Rates { total, ..Rates::default() }, ..ThrottleLimits::default() }
}

#[test]
fn an_image_has_filters_of_its_own_which_its_mirror_meets_and_its_guest_later() {
    let (mut rig, _) = filtered(|_| ());
    assert_eq!(rig.write(0, &[7; 65536]), OK);
    let filters = Filters::new().unwrap();
    let target = image(MIB);
    let attach = |rig: &Rig| {
        let disk = Disk::open(DiskOptions::path(target.path())).unwrap();
        let engine = EngineOptions { node_filters: Some(filters.clone()), ..EngineOptions::default() };
        let ticket = rig.backend.start_mirror(disk, &engine, MirrorOptions::default()).unwrap();
        ticket.wait(PATIENCE).unwrap();
    };
    let report = |rig: &Rig| match rig.event() {
        DiskEvent::Mirror { report, .. } => report,
        other @ DiskEvent::IoError { .. } => panic!("{other:?}"),
    };
    // It would take days, but who gives it up does not wait, nor who stops the VM.
    filters.set_limits(one_byte_per_second()).unwrap();
    attach(&rig);
    assert_eq!(rig.write(8, &[8; 512]), OK);
    let start = Instant::now();
    rig.backend.pause().wait(PATIENCE).unwrap();
    rig.backend.resume().wait(PATIENCE).unwrap();
    assert!(!rig.backend.mirror_status().unwrap().ready);
    rig.backend.mirror(MirrorOrder::Detach).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Detached);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());

    filters.set_limits(ThrottleLimits::default()).unwrap();
    let id = filters.add_fault(FaultRule { count: 1, ..eio_on_writes() }).unwrap();
    attach(&rig);
    let action = MirrorAction::Report;
    assert_eq!(report(&rig), MirrorReport::Error { is_read: false, action, nospace: false });
    assert!(matches!(report(&rig), MirrorReport::Failed(_)));
    assert_eq!(rig.write(8, &[9; 512]), OK);
    rig.backend.mirror(MirrorOrder::Detach).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Detached);

    assert!(filters.remove_fault(id));
    attach(&rig);
    assert_eq!(report(&rig), MirrorReport::Ready);
    rig.backend.mirror(MirrorOrder::Quiesce { limit: u64::MAX }).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Quiesced);
    rig.backend.mirror(MirrorOrder::Switch).wait(PATIENCE).unwrap();
    assert_eq!(report(&rig), MirrorReport::Switched);
    assert_eq!(rig.backend.facts().node_filters, Some(filters.clone()));
    filters.add_fault(eio_on_writes()).unwrap();
    assert_eq!(rig.write(0, &[1; 512]), IOERR);
}
