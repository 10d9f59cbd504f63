//! A disk that is mirrored, seen by its guest and by its owner.

use block::{CopyMode, MirrorOptions};

use super::*;

struct Mirrored {
    rig: Rig,
    target: NamedTempFile,
}

fn start(options: MirrorOptions) -> Mirrored {
    let mut rig = rig();
    assert_eq!(rig.write(0, &[1; 4096]), OK);
    let target = image(MIB);
    attach(&rig, &target, options).unwrap();
    Mirrored { rig, target }
}

fn attach(rig: &Rig, target: &NamedTempFile, options: MirrorOptions) -> Result<(), BlkError> {
    let disk = Disk::open(DiskOptions::path(target.path())).unwrap();
    let ticket = rig.backend.start_mirror(disk, &EngineOptions::default(), options).unwrap();
    ticket.wait(PATIENCE)
}

impl Mirrored {
    fn order(&self, order: MirrorOrder) {
        self.rig.backend.mirror(order).wait(PATIENCE).unwrap();
    }

    fn report(&self) -> MirrorReport {
        match self.rig.event() {
            DiskEvent::Mirror { report, .. } => report,
            other @ DiskEvent::IoError { .. } => panic!("{other:?}"),
        }
    }

    fn quiesced(&self) {
        assert_eq!(self.report(), MirrorReport::Ready);
        self.order(MirrorOrder::Quiesce { limit: u64::MAX });
        assert_eq!(self.report(), MirrorReport::Quiesced);
    }

    fn source(&self) -> Vec<u8> {
        fs::read(self.rig.image.path()).unwrap()
    }

    fn target(&self) -> Vec<u8> {
        fs::read(self.target.path()).unwrap()
    }
}

#[test]
fn a_disk_moves_underneath_its_guest() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let mut mirrored = start(MirrorOptions { mode, ..MirrorOptions::default() });
        assert_eq!(mirrored.report(), MirrorReport::Ready);
        assert_eq!(mirrored.rig.write(64, &[2; 8192]), OK);
        mirrored.order(MirrorOrder::Quiesce { limit: u64::MAX });
        assert_eq!(mirrored.report(), MirrorReport::Quiesced);
        assert_eq!(mirrored.source(), mirrored.target());
        // Held until it is decided.
        mirrored.rig.send_write(128, &[3; 4096]);
        assert!(mirrored.rig.backend.mirror_status().unwrap().quiesced);
        mirrored.order(MirrorOrder::Switch);
        assert_eq!(mirrored.report(), MirrorReport::Switched);
        assert_eq!(mirrored.rig.wait(), OK);
        assert_eq!(mirrored.rig.backend.facts().image, mirrored.target.path().display().to_string());
        assert_eq!(mirrored.rig.backend.mirror_status(), None);
        assert_eq!(mirrored.rig.read(128, 4096), [3; 4096]);
        assert_eq!(mirrored.rig.read(64, 8192), [2; 8192]);
        assert_eq!(mirrored.rig.flush(), OK);
        let at = 128 * 512..128 * 512 + 4096;
        assert_eq!(mirrored.target()[at.clone()], [3; 4096]);
        assert_eq!(mirrored.source()[at], [0; 4096], "the source is left as it was");
    }
}

#[test]
fn a_release_lets_the_guest_go_on_with_its_mirror_and_a_detach_without() {
    let mut mirrored = start(MirrorOptions::default());
    mirrored.quiesced();
    mirrored.rig.send_write(8, &[7; 512]);
    mirrored.order(MirrorOrder::Release);
    assert_eq!(mirrored.rig.wait(), OK);
    mirrored.order(MirrorOrder::Quiesce { limit: u64::MAX });
    assert_eq!(mirrored.report(), MirrorReport::Quiesced);
    assert_eq!(mirrored.source(), mirrored.target());
    mirrored.rig.send_write(16, &[9; 512]);
    mirrored.order(MirrorOrder::Detach);
    assert_eq!(mirrored.report(), MirrorReport::Detached);
    assert_eq!(mirrored.rig.wait(), OK);
    assert_ne!(mirrored.source(), mirrored.target());
    // Its lock is gone with it: another mirror to the same image may follow.
    attach(&mirrored.rig, &mirrored.target, MirrorOptions::default()).unwrap();
    assert_eq!(mirrored.report(), MirrorReport::Ready);
}

#[test]
fn who_gives_up_a_target_that_hangs_waits_for_it_and_the_guest_does_not() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let mut rig = rig();
        assert_eq!(rig.write(0, &[1; 4096]), OK);
        let (target, faults) = (image(MIB), Faults::new().unwrap());
        let disk = Disk::open(DiskOptions::path(target.path())).unwrap();
        let engine = EngineOptions { faults: Some(faults.clone()), ..EngineOptions::default() };
        let options = MirrorOptions { mode, ..MirrorOptions::default() };
        rig.backend.start_mirror(disk, &engine, options).unwrap().wait(PATIENCE).unwrap();
        let mut mirrored = Mirrored { rig, target };
        assert_eq!(mirrored.report(), MirrorReport::Ready);
        faults.hold();
        // It goes to both images, or is copied at once.
        mirrored.rig.send_write(8, &[2; 4096]);
        await_that(|| faults.in_flight() > 0);
        let ended = mirrored.rig.backend.mirror(MirrorOrder::Detach);
        assert_eq!(mirrored.rig.wait(), OK);
        for sector in 0..64 {
            assert_eq!(mirrored.rig.write(8 * sector, &[3; 4096]), OK);
        }
        assert_eq!(mirrored.rig.flush(), OK);
        mirrored.rig.backend.pause().wait(PATIENCE).unwrap();
        mirrored.rig.backend.resume().wait(PATIENCE).unwrap();
        faults.release();
        ended.wait(PATIENCE).unwrap();
        assert_eq!(mirrored.report(), MirrorReport::Detached);
        assert_eq!(mirrored.rig.read(8, 512), [3; 512]);
    }
}

#[test]
fn a_pause_of_the_vm_passes_through_a_held_disk() {
    let mut mirrored = start(MirrorOptions::default());
    mirrored.quiesced();
    mirrored.rig.send_write(8, &[7; 512]);
    mirrored.rig.backend.pause().wait(PATIENCE).unwrap();
    mirrored.rig.backend.resume().wait(PATIENCE).unwrap();
    assert!(mirrored.rig.backend.mirror_status().unwrap().quiesced);
    mirrored.order(MirrorOrder::Switch);
    assert_eq!(mirrored.report(), MirrorReport::Switched);
    assert_eq!(mirrored.rig.wait(), OK);
}

#[test]
fn a_switch_before_the_end_is_refused_and_changes_nothing() {
    let mut mirrored = start(MirrorOptions { speed: 512, ..MirrorOptions::default() });
    let refused = mirrored.rig.backend.mirror(MirrorOrder::Switch).wait(PATIENCE).unwrap_err();
    assert!(matches!(refused, BlkError::Mirror { source: block::MirrorRefusal::NotQuiesced, .. }));
    assert_eq!(mirrored.rig.write(0, &[5; 512]), OK);
    mirrored.order(MirrorOrder::Detach);
    assert_eq!(mirrored.report(), MirrorReport::Detached);
    let none = mirrored.rig.backend.mirror(MirrorOrder::Pause).wait(PATIENCE).unwrap_err();
    assert!(matches!(none, BlkError::Mirror { source: block::MirrorRefusal::NotMirrored, .. }));
}

#[test]
fn a_target_that_is_too_small_or_a_second_one_is_refused() {
    let mirrored = start(MirrorOptions::default());
    assert_eq!(mirrored.report(), MirrorReport::Ready);
    let second = attach(&mirrored.rig, &image(MIB), MirrorOptions::default()).unwrap_err();
    assert!(matches!(second, BlkError::Attach { source: block::AttachReason::Mirrored, .. }));
    let rig = rig();
    let small = attach(&rig, &image(MIB / 2), MirrorOptions::default()).unwrap_err();
    assert!(matches!(small, BlkError::Attach { source: block::AttachReason::TooSmall { .. }, .. }));
}

#[test]
fn a_machine_that_is_reset_leaves_its_disk_mirrored() {
    let mut mirrored = start(MirrorOptions::default());
    assert_eq!(mirrored.report(), MirrorReport::Ready);
    mirrored.rig.driver = FakeDriver::new(Box::new(mirrored.rig.backend.device()));
    mirrored.rig.driver.start(ALL);
    assert_eq!(mirrored.rig.write(32, &[4; 4096]), OK);
    mirrored.order(MirrorOrder::Quiesce { limit: u64::MAX });
    assert_eq!(mirrored.report(), MirrorReport::Quiesced);
    assert_eq!(mirrored.source(), mirrored.target());
}

#[test]
fn a_guest_that_writes_all_the_time_loses_nothing_in_a_row_of_pivots() {
    let seed = seed();
    let mut random = Random::new(seed);
    let mut mirrored = start(MirrorOptions::default());
    let mut model = mirrored.source();
    let mut images = vec![];
    for round in 0..6 {
        let mut pending = 0;
        let mut scribble = |rig: &mut Rig, model: &mut Vec<u8>, pending: &mut u32| {
            let sector = u64::from(random.below((MIB / 512 - 64) as u16));
            let data = vec![random.below(255) as u8; 512 * (1 + random.below(63) as usize)];
            let at = sector as usize * 512;
            // Overlapping writes in flight have no order: one after the other.
            while *pending > 0 {
                assert_eq!(rig.wait(), OK);
                *pending -= 1;
            }
            model[at..at + data.len()].copy_from_slice(&data);
            rig.send_write(sector, &data);
            *pending += 1;
        };
        for _ in 0..20 {
            scribble(&mut mirrored.rig, &mut model, &mut pending);
        }
        assert_eq!(mirrored.report(), MirrorReport::Ready);
        mirrored.order(MirrorOrder::Quiesce { limit: u64::MAX });
        assert_eq!(mirrored.report(), MirrorReport::Quiesced);
        while pending > 0 {
            assert_eq!(mirrored.rig.wait(), OK);
            pending -= 1;
        }
        scribble(&mut mirrored.rig, &mut model, &mut pending);
        mirrored.order(if round % 3 == 2 { MirrorOrder::Detach } else { MirrorOrder::Switch });
        mirrored.report();
        assert_eq!(mirrored.rig.wait(), OK);
        images.push(std::mem::replace(&mut mirrored.target, image(MIB)));
        attach(&mirrored.rig, &mirrored.target, MirrorOptions::default()).unwrap();
    }
    for chunk in 0..MIB / 32768 {
        let read = mirrored.rig.read(chunk as u64 * 64, 32768);
        assert!(read == model[chunk * 32768..][..32768], "chunk {chunk}, seed {seed}");
    }
}
