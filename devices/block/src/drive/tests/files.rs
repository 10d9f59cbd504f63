//! Mirrors of real files.

#![expect(unsafe_code, reason = "hands memory to a drive")]

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::drive::{
    AttachReason, CopyMode, Drive, Former, MirrorAction, MirrorEvent, MirrorOperation, MirrorOptions,
    MirrorRefusal, MirrorStatus, MirrorSync, OnError, Side,
};
use crate::event::wait_readable;
use crate::{
    Buffer, CallKind, Completion, Disk, DiskOptions, Engine, EngineOptions, Errno, Fault, FaultOperation,
    FaultRule, Faults, Filters, Operation,
};

const TIMEOUT: Duration = Duration::from_secs(60);
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn image(bytes: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(bytes, 0).unwrap();
    file
}

/// An image of this size that is one hole.
fn hole(size: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(size as u64).unwrap();
    file
}

/// Bytes that repeat late.
fn pattern(length: usize, seed: u32) -> Vec<u8> {
    (0..length)
        .map(|i| u32::try_from(i % 1_000_003).unwrap().wrapping_mul(seed | 1).to_le_bytes()[2] | 1)
        .collect()
}

fn content(file: &NamedTempFile) -> Vec<u8> {
    std::fs::read(file.path()).unwrap()
}

fn engine(file: &NamedTempFile, faults: &Faults, adjust: impl FnOnce(&mut DiskOptions)) -> Engine {
    let mut options = DiskOptions::path(file.path());
    adjust(&mut options);
    let options = Disk::open(options).unwrap();
    Engine::start(
        options,
        &EngineOptions {
            kind: None,
            depth: 64,
            faults: Some(faults.clone()),
            filters: None,
            node_filters: None,
        },
    )
    .unwrap()
}

struct Rig {
    drive: Drive,
    source_faults: Faults,
    target_faults: Faults,
    events: Vec<MirrorEvent>,
    next: u64,
}

impl Rig {
    fn new(source: &NamedTempFile) -> Self {
        let (source_faults, target_faults) = (Faults::new().unwrap(), Faults::new().unwrap());
        let drive = Drive::new(engine(source, &source_faults, |_| {}));
        Self { drive, source_faults, target_faults, events: Vec::new(), next: 0 }
    }

    /// Mirrors to `target`.
    fn mirror(&mut self, target: &NamedTempFile, options: &MirrorOptions) {
        let target = engine(target, &self.target_faults, |_| {});
        self.drive.attach_mirror(target, options).unwrap();
    }

    fn status(&self) -> MirrorStatus {
        self.drive.mirror_status().unwrap()
    }

    /// One round of a worker's.
    fn round(&mut self, now: Instant, completions: &mut Vec<Completion>) -> Option<Instant> {
        self.drive.submit().unwrap();
        self.drive.reap(completions).unwrap();
        let next = self.drive.advance(now).unwrap();
        self.events.append(&mut self.drive.take_events());
        next
    }

    /// Works until `done` says so.
    fn until(&mut self, mut done: impl FnMut(&mut Self, &[Completion]) -> bool) -> Vec<Completion> {
        let deadline = Instant::now() + TIMEOUT;
        let mut completions = Vec::new();
        loop {
            let now = Instant::now();
            let next = self.round(now, &mut completions);
            if done(self, &completions) {
                return completions;
            }
            assert!(now < deadline, "stuck: {:?}", self.drive.mirror_status());
            let wait = next.map_or(TIMEOUT, |next| next.saturating_duration_since(now));
            if !wait.is_zero() {
                self.wait(wait);
            }
        }
    }

    /// For either event, as a worker's epoll does.
    fn wait(&self, timeout: Duration) {
        let Some(target) = self.drive.target_event() else {
            wait_readable(self.drive.event(), timeout);
            return;
        };
        let both = crate::event::any_readable(&[self.drive.event(), target]).unwrap();
        wait_readable(std::os::fd::AsFd::as_fd(&both), timeout);
    }

    fn until_event(&mut self, event: MirrorEvent) {
        self.until(|rig, _| rig.events.contains(&event));
        self.events.retain(|other| *other != event);
    }

    /// A guest's request, from its beginning to its end.
    fn guest(&mut self, operation: Operation) -> Result<(), Errno> {
        self.next += 1;
        let token = self.next;
        // SAFETY: the caller's memory lives until this has seen the completion.
        unsafe { self.drive.queue(token, operation) };
        let completions = self.until(|_, completions| !completions.is_empty());
        assert_eq!((completions.len(), completions[0].token), (1, token));
        completions[0].result
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let mut bytes = bytes.to_vec();
        let buffers = vec![Buffer::new(bytes.as_mut_ptr(), bytes.len())];
        self.guest(Operation::Write { offset: offset as u64, buffers })
    }

    fn finish(&mut self) {
        self.drive.finish(u64::MAX).unwrap();
        self.until_event(MirrorEvent::Quiesced);
    }

    /// Ends the mirror without the target.
    fn abort(&mut self) -> Former {
        self.drive.pause().unwrap();
        let mut target = None;
        self.until(|rig, _| match rig.drive.detach() {
            Ok(engine) => {
                target = Some(engine);
                true
            }
            Err(MirrorRefusal::Busy) => false,
            Err(error) => panic!("{error}"),
        });
        target.unwrap()
    }
}

const MODES: [CopyMode; 2] = [CopyMode::Background, CopyMode::WriteBlocking];

fn mode(mode: CopyMode) -> MirrorOptions {
    MirrorOptions { mode, ..MirrorOptions::default() }
}

#[test]
fn a_disk_moves_to_its_mirror_and_the_old_image_stays_as_it_was() {
    for copy_mode in MODES {
        let mut expected = pattern(16 * MIB, 7);
        let (source, target) = (image(&expected), hole(16 * MIB));
        let mut rig = Rig::new(&source);
        rig.mirror(&target, &mode(copy_mode));
        rig.until_event(MirrorEvent::Ready);
        let status = rig.status();
        assert_eq!((status.done, status.remaining, status.total), (16 << 20, 0, 16 << 20));
        assert_eq!(status.actively_synced, copy_mode == CopyMode::WriteBlocking);
        rig.write(MIB, &pattern(64 * KIB, 9)).unwrap();
        expected[MIB..MIB + 64 * KIB].copy_from_slice(&pattern(64 * KIB, 9));
        rig.finish();
        assert!(content(&target) == expected);
        let old = rig.drive.switch().unwrap();
        assert_eq!(
            (old.disk().name(), rig.drive.target().is_none()),
            (source.path().to_str().unwrap(), true)
        );
        assert_eq!(rig.drive.disk().name(), target.path().to_str().unwrap());
        drop(old);
        rig.write(2 * MIB, &[3; 512]).unwrap();
        assert!(content(&source) == expected);
        expected[2 * MIB..2 * MIB + 512].fill(3);
        assert!(content(&target) == expected);
    }
}

#[test]
fn an_aborted_mirror_leaves_the_disk_where_it_was() {
    let mut expected = pattern(8 * MIB, 7);
    let (source, target) = (image(&expected), hole(8 * MIB));
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &MirrorOptions { speed: 65536, ..MirrorOptions::default() });
    rig.write(MIB, &[9; 4096]).unwrap();
    expected[MIB..MIB + 4096].fill(9);
    assert_eq!(rig.abort().disk().name(), target.path().to_str().unwrap());
    assert!(!rig.events.contains(&MirrorEvent::Ready));
    rig.write(2 * MIB, &[8; 512]).unwrap();
    expected[2 * MIB..2 * MIB + 512].fill(8);
    assert!(content(&source) == expected);
    assert!(content(&target)[MIB..2 * MIB + 512].iter().all(|byte| *byte == 0));
}

#[test]
fn odd_sizes_and_all_granularities_are_copied() {
    for (size, granularity) in [
        (0, 65536),
        (512, 65536),
        (512, 512),
        (MIB + 512, 65536),
        (MIB + 512, 512),
        (3 * MIB + 1536, 4096),
        (9 * MIB + 512, 64 << 20),
        (9 * MIB + 512, 4 << 20),
    ] {
        for extra in [0, 8192] {
            let expected = pattern(size, 5);
            let (source, target) = (image(&expected), image(&vec![0xaa; size + extra]));
            let mut rig = Rig::new(&source);
            rig.mirror(&target, &MirrorOptions { granularity, ..MirrorOptions::default() });
            rig.until_event(MirrorEvent::Ready);
            rig.finish();
            let copied = content(&target);
            assert!(copied[..size] == expected, "{size} bytes in chunks of {granularity}");
            assert!(copied[size..].iter().all(|byte| *byte == 0xaa));
        }
    }
}

#[test]
fn holes_stay_holes() {
    for (granularity, target_is_zero) in [(65536, false), (65536, true), (64 << 20, true), (512, false)] {
        let source = hole(64 * MIB);
        source.as_file().write_all_at(&pattern(100 * KIB, 3), 3 * MIB as u64).unwrap();
        source.as_file().write_all_at(&pattern(4096, 4), 40 * MIB as u64).unwrap();
        let target = if target_is_zero { hole(64 * MIB) } else { image(&vec![0xaa; 64 * MIB]) };
        let mut rig = Rig::new(&source);
        rig.mirror(&target, &MirrorOptions { granularity, target_is_zero, ..MirrorOptions::default() });
        rig.until_event(MirrorEvent::Ready);
        rig.finish();
        assert!(content(&target) == content(&source));
        let kib = target.as_file().metadata().unwrap().blocks() / 2;
        assert!(kib < 400, "{kib} KiB in chunks of {granularity}");
    }
}

#[test]
fn a_write_that_is_done_is_in_both_images_of_a_write_blocking_mirror() {
    let mut expected = pattern(4 * MIB, 7);
    let (source, target) = (image(&expected), hole(4 * MIB));
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &mode(CopyMode::WriteBlocking));
    rig.until_event(MirrorEvent::Ready);
    for (offset, length) in [(MIB + 42, 1), (512, 1024), (65536, 65536), (2 * MIB, MIB + 4096)] {
        let bytes = pattern(length, 99);
        rig.write(offset, &bytes).unwrap();
        expected[offset..offset + length].copy_from_slice(&bytes);
        assert!(content(&target) == expected);
        assert!(rig.status().actively_synced);
    }
    rig.guest(Operation::WriteZeroes { offset: 1000, length: 3000, unmap: true }).unwrap();
    expected[1000..4000].fill(0);
    assert!(content(&target) == expected && content(&source) == expected);
    // A flush concerns both.
    rig.target_faults.take_log();
    rig.guest(Operation::Flush).unwrap();
    assert_eq!(rig.target_faults.take_log(), [CallKind::Sync]);
    // A discard is copied later, as what it has left.
    rig.guest(Operation::Discard { offset: 65536, length: 65536 }).unwrap();
    rig.finish();
    assert!(content(&target) == content(&source));
}

#[test]
fn direct_io_of_either_image_is_served() {
    let direct = |options: &mut DiskOptions| options.direct = true;
    let probe = hole(4096);
    let mut options = DiskOptions::path(probe.path());
    direct(&mut options);
    if let Err(error) = Disk::open(options) {
        eprintln!("Direct I/O is not tested: {error}");
        return;
    }
    for (copy_mode, direct_source, direct_target) in
        MODES.into_iter().flat_map(|mode| [(mode, true, true), (mode, true, false), (mode, false, true)])
    {
        let mut expected = pattern(4 * MIB, 7);
        let (source, target) = (image(&expected), hole(4 * MIB));
        let faults = Faults::new().unwrap();
        let mut rig = Rig::new(&hole(0));
        rig.drive = Drive::new(engine(&source, &faults, |options| options.direct = direct_source));
        let target_engine = engine(&target, &faults, |options| options.direct = direct_target);
        rig.drive
            .attach_mirror(target_engine, &MirrorOptions { granularity: 512, ..mode(copy_mode) })
            .unwrap();
        for (offset, length) in [(512, 512), (1536, 3 * 512), (MIB, 65536)] {
            let bytes = pattern(length, 33);
            rig.write(offset, &bytes).unwrap();
            expected[offset..offset + length].copy_from_slice(&bytes);
        }
        rig.until_event(MirrorEvent::Ready);
        rig.finish();
        assert!(content(&target) == expected);
    }
}

#[test]
fn a_mirror_sees_what_is_not_flushed_and_a_switch_leaves_nothing_behind() {
    let cached = |engine: &mut Engine, seed| {
        let filters = Filters::new().unwrap();
        let rule = FaultRule { seed, ..FaultRule::new(FaultOperation::VolatileCache) };
        filters.add_fault(rule).unwrap();
        engine.set_filters(None, Some(filters)).unwrap();
    };
    for (copy_mode, seed) in MODES.into_iter().zip([None, Some(5)]) {
        let mut expected = vec![0; 8 * MIB];
        let (source, target) = (hole(8 * MIB), image(&vec![0xaa; 8 * MIB]));
        let mut rig = Rig::new(&hole(0));
        let [mut from, mut to] = [&source, &target].map(|file| engine(file, &rig.source_faults, |_| {}));
        cached(&mut from, seed);
        cached(&mut to, seed);
        rig.drive = Drive::new(from);
        let write = |rig: &mut Rig, expected: &mut [u8], offset, length, seed| {
            rig.write(offset, &pattern(length, seed)).unwrap();
            expected[offset..offset + length].copy_from_slice(&pattern(length, seed));
        };
        write(&mut rig, &mut expected, 3 * MIB, 64 * KIB, 3);
        write(&mut rig, &mut expected, 5 * MIB, MIB, 5);
        rig.drive.attach_mirror(to, &mode(copy_mode)).unwrap();
        rig.until_event(MirrorEvent::Ready);
        write(&mut rig, &mut expected, MIB, 4096, 7);
        rig.guest(Operation::Discard { offset: 5 << 20, length: 65536 }).unwrap();
        expected[5 * MIB..5 * MIB + 65536].fill(0);
        if seed.is_none() {
            assert!(content(&source) == vec![0; 8 * MIB], "the source was not flushed");
        }
        rig.finish();
        assert!(content(&target) == expected, "the target is flushed at the end");
        drop(rig.drive.switch().unwrap());
        assert!(content(&source) == expected, "an image is closed in order");
        // The target's cache has come along.
        let before = content(&target);
        write(&mut rig, &mut expected, 2 * MIB, 4096, 9);
        assert!(seed.is_some() || content(&target) == before);
        rig.guest(Operation::Flush).unwrap();
        assert!(content(&target) == expected);
    }
}

fn failed(side: Side, operation: MirrorOperation, action: MirrorAction) -> impl Fn(&MirrorEvent) -> bool {
    move |event| {
        matches!(event, MirrorEvent::Error { error, action: taken }
            if error.side == side && error.operation == operation && *taken == action)
    }
}

#[test]
fn an_error_that_is_reported_ends_the_mirror_and_nothing_else() {
    for copy_mode in MODES {
        for (side, kind, operation) in [
            (Side::Source, CallKind::Read, MirrorOperation::Read),
            (Side::Target, CallKind::Write, MirrorOperation::Write),
            (Side::Target, CallKind::Sync, MirrorOperation::Flush),
        ] {
            let mut expected = pattern(4 * MIB, 7);
            let (source, target) = (image(&expected), hole(4 * MIB));
            let mut rig = Rig::new(&source);
            rig.mirror(&target, &mode(copy_mode));
            let faults = if side == Side::Source { &rig.source_faults } else { &rig.target_faults };
            faults.inject(kind, Fault::Error(libc::EIO), 1);
            let told = failed(side, operation, MirrorAction::Report);
            rig.until(|rig, _| rig.events.iter().any(&told));
            assert_eq!(rig.write(MIB, &[1; 4096]), Ok(()));
            expected[MIB..MIB + 4096].fill(1);
            let status = rig.status();
            assert!(status.failed && !status.ready, "{status:?}");
            assert_eq!(status.error.map(|error| error.errno), Some(Errno::new(libc::EIO)));
            rig.drive.resume().unwrap();
            assert!(matches!(rig.drive.finish(u64::MAX), Err(MirrorRefusal::Failed(_))));
            rig.abort();
            assert!(content(&source) == expected);
        }
    }
}

#[test]
fn a_mirror_stops_on_a_full_target_and_goes_on_when_it_is_resumed() {
    for copy_mode in MODES {
        let (source, target) = (image(&pattern(4 * MIB, 7)), hole(4 * MIB));
        let mut rig = Rig::new(&source);
        let options = MirrorOptions { on_target_error: OnError::Enospc, ..mode(copy_mode) };
        rig.mirror(&target, &options);
        rig.target_faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), u32::MAX);
        let told = failed(Side::Target, MirrorOperation::Write, MirrorAction::Stop);
        rig.until(|rig, _| rig.events.iter().any(&told));
        assert!(rig.status().stopped);
        assert_eq!(rig.drive.finish(u64::MAX), Err(MirrorRefusal::Paused));
        // The guest does not notice.
        assert_eq!(rig.write(MIB, &[1; 4096]), Ok(()));
        rig.target_faults.clear();
        rig.drive.resume().unwrap();
        rig.until_event(MirrorEvent::Ready);
        rig.finish();
        assert!(content(&target) == content(&source));
    }
}

#[test]
fn an_error_that_is_ignored_is_tried_again_and_told_once_each_time() {
    for copy_mode in MODES {
        let (source, target) = (image(&pattern(4 * MIB, 7)), hole(4 * MIB));
        let mut rig = Rig::new(&source);
        let options = MirrorOptions { on_target_error: OnError::Ignore, ..mode(copy_mode) };
        rig.mirror(&target, &options);
        rig.target_faults.inject(CallKind::Write, Fault::Error(libc::EIO), 10);
        assert_eq!(rig.write(MIB, &[1; 4096]), Ok(()));
        rig.until(|rig, _| rig.events.contains(&MirrorEvent::Ready));
        let told = failed(Side::Target, MirrorOperation::Write, MirrorAction::Ignore);
        let count = rig.events.iter().filter(|event| told(event)).count();
        assert!((1..=10).contains(&count), "{count}");
        rig.finish();
        assert!(content(&target) == content(&source));
    }
}

#[test]
fn a_flush_that_failed_for_good_is_not_ignored_and_never_becomes_ready() {
    let (source, target) = (image(&pattern(MIB, 7)), hole(MIB));
    for policy in [OnError::Ignore, OnError::Stop] {
        let mut rig = Rig::new(&source);
        rig.mirror(&target, &MirrorOptions { on_target_error: policy, ..MirrorOptions::default() });
        rig.target_faults.inject(CallKind::Sync, Fault::Error(libc::EIO), 1);
        let action = if policy == OnError::Ignore { MirrorAction::Report } else { MirrorAction::Stop };
        for _ in 0..2 {
            let told = failed(Side::Target, MirrorOperation::Flush, action);
            rig.until(|rig, _| rig.events.iter().any(&told));
            assert_eq!(
                rig.status().remaining,
                if policy == OnError::Stop { MIB as u64 } else { rig.status().remaining }
            );
            if policy == OnError::Ignore {
                break;
            }
            rig.events.clear();
            rig.drive.resume().unwrap();
        }
        assert!(!rig.events.contains(&MirrorEvent::Ready));
        rig.abort();
    }
}

#[test]
fn a_target_that_hangs_keeps_the_guest_waiting_no_longer_than_until_the_pause() {
    let (source, target) = (image(&pattern(MIB, 7)), hole(MIB));
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &mode(CopyMode::WriteBlocking));
    rig.until_event(MirrorEvent::Ready);
    rig.target_faults.hold();
    let mut bytes = [1_u8; 512];
    let buffers = |bytes: &mut [u8; 512]| vec![Buffer::new(bytes.as_mut_ptr(), 512)];
    // The first is on its way to the target, the second waits for it, the flush for the target.
    for token in [1, 2] {
        // SAFETY: `bytes` outlives the requests, which are waited for.
        unsafe { rig.drive.queue(token, Operation::Write { offset: 0, buffers: buffers(&mut bytes) }) };
    }
    rig.drive.queue_flush(3);
    rig.until(|rig, _| rig.target_faults.in_flight() > 1);
    let mut completions = Vec::new();
    rig.round(Instant::now(), &mut completions);
    assert_eq!(completions, []);
    rig.drive.pause().unwrap();
    let mut tokens: Vec<_> = rig
        .until(|_, completions| completions.len() == 2)
        .iter()
        .map(|completion| completion.token)
        .collect();
    tokens.sort_unstable();
    assert_eq!(tokens, [2, 3]);
    assert_eq!(rig.write(4096, &[2; 512]), Ok(()));
    rig.target_faults.release();
    rig.until(|_, completions| completions.len() == 1);
    rig.drive.resume().unwrap();
    rig.finish();
    assert!(content(&target) == content(&source));
}

#[test]
fn copies_keep_to_their_speed() {
    let (source, target) = (image(&pattern(16 * MIB, 7)), hole(16 * MIB));
    for granularity in [65536, 4096] {
        let mut rig = Rig::new(&source);
        rig.mirror(&target, &MirrorOptions { speed: 1 << 20, granularity, ..MirrorOptions::default() });
        let mut now = Instant::now();
        let end = now + Duration::from_secs(5);
        while now < end {
            // All that can happen at this moment, whatever time it takes.
            let mut completions = Vec::new();
            while rig.round(now, &mut completions) == Some(now) || rig.status().in_flight > 0 {
                rig.wait(Duration::from_millis(1));
            }
            now += Duration::from_millis(10);
        }
        let done = rig.status().done;
        assert!((4 << 20..6 << 20).contains(&done), "{done} bytes in 5 s at 1 MiB/s");
        assert!(rig.status().remaining_time.unwrap() > Duration::from_secs(5));
        rig.drive.set_speed(0).unwrap();
        rig.until_event(MirrorEvent::Ready);
        assert_eq!(rig.status().remaining_time, Some(Duration::ZERO));
        rig.round(Instant::now(), &mut Vec::new());
        assert!(rig.status().expected_hold.is_some());
    }
}

#[test]
fn a_pause_stops_copies_and_an_end_waits_for_nothing_that_cannot_come() {
    let (source, target) = (image(&pattern(8 * MIB, 7)), hole(8 * MIB));
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &MirrorOptions { speed: 2 << 20, ..MirrorOptions::default() });
    rig.until(|rig, _| rig.status().done > 0);
    rig.drive.pause().unwrap();
    rig.until(|rig, _| rig.status().in_flight == 0);
    let done = rig.status().done;
    assert_eq!(rig.round(Instant::now() + Duration::from_secs(9), &mut Vec::new()), None);
    assert_eq!(rig.status().done, done);
    assert_eq!(rig.drive.finish(u64::MAX), Err(MirrorRefusal::Paused));
    rig.drive.resume().unwrap();
    assert!(matches!(rig.drive.finish(MIB as u64), Err(MirrorRefusal::NotConverged { .. })));
    // The last pass knows no speed.
    rig.finish();
    rig.drive.switch().unwrap();
    assert!(content(&target) == content(&source));
}

#[test]
fn only_what_is_written_is_copied_when_asked_so() {
    let (source, target) = (image(&pattern(MIB, 7)), image(&pattern(MIB, 8)));
    let mut rig = Rig::new(&source);
    rig.mirror(
        &target,
        &MirrorOptions { sync: MirrorSync::None, granularity: 512, ..MirrorOptions::default() },
    );
    rig.until_event(MirrorEvent::Ready);
    rig.write(512, &[1; 1024]).unwrap();
    rig.finish();
    let mut expected = pattern(MIB, 8);
    expected[512..1536].fill(1);
    assert!(content(&target) == expected);
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_has_changed() {
    let (source, target) = (image(&pattern(MIB, 7)), hole(MIB));
    let mut rig = Rig::new(&source);
    assert_eq!(rig.drive.switch().err(), Some(MirrorRefusal::NotMirrored));
    assert_eq!(rig.drive.detach().err(), Some(MirrorRefusal::NotMirrored));
    assert_eq!(rig.drive.pause(), Err(MirrorRefusal::NotMirrored));
    assert_eq!(rig.drive.finish(0), Err(MirrorRefusal::NotMirrored));
    let refused = |rig: &mut Rig, target: Engine, options: &MirrorOptions| {
        rig.drive.attach_mirror(target, options).unwrap_err()
    };
    let faults = Faults::new().unwrap();
    let small = refused(&mut rig, engine(&hole(512), &faults, |_| {}), &MirrorOptions::default());
    assert_eq!(small.reason, AttachReason::TooSmall { target: 512, disk: MIB as u64 });
    assert_eq!(small.reason.to_string(), "The target has 512 bytes, fewer than the source's 1048576");
    let read_only = engine(&target, &faults, |options| options.read_only = true);
    assert_eq!(refused(&mut rig, read_only, &MirrorOptions::default()).reason, AttachReason::ReadOnly);
    for granularity in [0, 511, 65537, 128 << 20] {
        let options = MirrorOptions { granularity, ..MirrorOptions::default() };
        let error = refused(&mut rig, engine(&target, &faults, |_| {}), &options);
        assert_eq!(error.reason, AttachReason::Granularity { granularity });
    }
    let vast = 600 << 30;
    let mut large = Rig::new(&hole(vast));
    let options = MirrorOptions { granularity: 512, ..MirrorOptions::default() };
    let error = refused(&mut large, engine(&hole(vast), &faults, |_| {}), &options);
    assert_eq!(error.reason, AttachReason::TooFine { granularity: 512, disk: vast as u64 });
    rig.source_faults.hold();
    rig.drive.queue_flush(1);
    rig.drive.submit().unwrap();
    let busy = refused(&mut rig, engine(&target, &faults, |_| {}), &MirrorOptions::default());
    assert_eq!(busy.reason, AttachReason::Busy);
    rig.source_faults.release();
    rig.until(|_, completions| completions.len() == 1);
    rig.drive.attach_mirror(busy.target, &MirrorOptions::default()).unwrap();
    let second = hole(MIB);
    let error = refused(&mut rig, engine(&second, &faults, |_| {}), &MirrorOptions::default());
    assert_eq!(error.reason, AttachReason::Mirrored);
    rig.until_event(MirrorEvent::Ready);
    assert_eq!(rig.drive.switch().err(), Some(MirrorRefusal::NotQuiesced));
    rig.source_faults.hold();
    rig.drive.queue_flush(2);
    rig.drive.submit().unwrap();
    assert_eq!(rig.drive.finish(0), Err(MirrorRefusal::Busy));
    assert_eq!(rig.drive.detach().err(), Some(MirrorRefusal::Busy));
    rig.source_faults.release();
    rig.until(|_, completions| completions.len() == 1);
    rig.finish();
    // A write takes it back.
    rig.write(0, &[1; 512]).unwrap();
    assert_eq!(rig.events, [MirrorEvent::Unfinished]);
    assert_eq!(rig.drive.switch().err(), Some(MirrorRefusal::NotQuiesced));
    rig.finish();
    rig.drive.switch().unwrap();
    assert!(content(&target) == content(&source));
}

#[test]
fn a_disk_is_copied_in_few_large_steps_and_what_is_known_is_not_asked_again() {
    let source = hole(64 * MIB);
    source.as_file().write_all_at(&pattern(8 * MIB, 3), 16 * MIB as u64).unwrap();
    let target = hole(64 * MIB);
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &MirrorOptions { target_is_zero: true, ..MirrorOptions::default() });
    rig.until_event(MirrorEvent::Ready);
    let count = |log: &[CallKind], kind| log.iter().filter(|call| **call == kind).count();
    let (source_log, target_log) = (rig.source_faults.take_log(), rig.target_faults.take_log());
    assert_eq!((count(&source_log, CallKind::Read), count(&target_log, CallKind::Write)), (8, 8));
    assert!(count(&source_log, CallKind::Extent) <= 6, "{source_log:?}");
    assert_eq!(target_log.len(), 9, "{target_log:?}");
    rig.finish();
    assert!(content(&target) == content(&source));
}

#[test]
fn copies_are_small_while_the_guest_works_and_one_begun_then_goes_on_in_its_memory() {
    let (source, target) = (image(&pattern(4 * MIB, 5)), hole(4 * MIB));
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &MirrorOptions::default());
    rig.source_faults.hold();
    let mut bytes = vec![0; 512];
    let buffers = vec![Buffer::new(bytes.as_mut_ptr(), bytes.len())];
    // SAFETY: `bytes` outlives the request, which is waited for.
    unsafe { rig.drive.queue(1, Operation::Read { offset: 0, buffers }) };
    let mut completions = Vec::new();
    let a_moment_ago = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
    rig.round(a_moment_ago, &mut completions);
    rig.until(|rig, _| rig.source_faults.in_flight() == 2);
    rig.source_faults.release();
    rig.until_event(MirrorEvent::Ready);
    let writes = rig.target_faults.take_log().iter().filter(|call| **call == CallKind::Write).count();
    // The first MiB in quarters, in the memory that there was for it, then one after the other.
    assert_eq!(writes, 4 + 3);
    rig.finish();
    assert!(content(&target) == content(&source));
}

#[test]
fn a_write_wider_than_the_bounce_memory_and_many_at_once_are_served() {
    let (source, target) = (image(&pattern(4 * MIB, 7)), hole(4 * MIB));
    let mut rig = Rig::new(&source);
    rig.mirror(&target, &MirrorOptions { buf_size: 100_000, ..mode(CopyMode::WriteBlocking) });
    rig.until_event(MirrorEvent::Ready);
    rig.write(512, &pattern(MIB, 9)).unwrap();
    rig.until(|rig, _| rig.status().actively_synced);
    assert!(content(&target) == content(&source));
    let mut memory = pattern(64 * 20 * KIB, 5);
    for (token, bytes) in memory.chunks_mut(20 * KIB).enumerate() {
        let buffers = vec![Buffer::new(bytes.as_mut_ptr(), bytes.len())];
        let operation = Operation::Write { offset: (token * 40 * KIB) as u64, buffers };
        // SAFETY: `memory` outlives the requests, which are waited for.
        unsafe { rig.drive.queue(token as u64, operation) };
    }
    assert_eq!(rig.drive.in_flight(), 64);
    let completions = rig.until(|_, completions| completions.len() == 64);
    assert!(completions.iter().all(|completion| completion.result.is_ok()));
    assert!(rig.status().actively_synced);
    assert!(content(&target) == content(&source));
}

#[test]
fn a_drive_may_be_dropped_at_any_moment() {
    for copy_mode in MODES {
        let (source, target) = (image(&pattern(4 * MIB, 7)), hole(4 * MIB));
        let mut rig = Rig::new(&source);
        rig.mirror(&target, &mode(copy_mode));
        let mut bytes = [1_u8; 512];
        let buffers = vec![Buffer::new(bytes.as_mut_ptr(), 512)];
        // SAFETY: `bytes` outlives the drive.
        unsafe { rig.drive.queue(1, Operation::Write { offset: 0, buffers }) };
        rig.round(Instant::now(), &mut Vec::new());
        drop(rig);
        assert_eq!(bytes, [1; 512]);
    }
}

#[test]
fn a_backup_is_the_disk_as_it_was_when_it_began() {
    for speed in [0, 1] {
        let before = pattern(4 * MIB, 7);
        let (source, target) = (image(&before), image(&vec![0xaa; 4 * MIB]));
        let mut rig = Rig::new(&source);
        let options = MirrorOptions { speed, ..MirrorOptions::default() };
        rig.drive.attach_backup(engine(&target, &rig.target_faults, |_| {}), &options).unwrap();
        rig.drive.pause().unwrap();
        // A paused backup saves what the guest changes.
        rig.write(MIB + 42, &pattern(100 * KIB, 9)).unwrap();
        rig.guest(Operation::Discard { offset: 2 << 20, length: 1 << 20 }).unwrap();
        rig.guest(Operation::WriteZeroes { offset: 512, length: 512, unmap: true }).unwrap();
        let part = content(&target);
        assert!(part[MIB..MIB + 128 * KIB] == before[MIB..MIB + 128 * KIB]);
        assert!(part[2 * MIB..3 * MIB] == before[2 * MIB..3 * MIB]);
        rig.drive.resume().unwrap();
        rig.drive.set_speed(0).unwrap();
        rig.until_event(MirrorEvent::Ready);
        assert_eq!(rig.drive.finish(u64::MAX), Err(MirrorRefusal::Backup));
        assert_eq!(rig.drive.set_mode(CopyMode::WriteBlocking), Err(MirrorRefusal::Backup));
        rig.write(0, &[1; 4096]).unwrap();
        assert_eq!(rig.status().remaining, 0);
        drop(rig.abort());
        assert!(content(&target) == before);
        assert!(content(&source)[..4096] == [1; 4096]);
    }
}

#[test]
fn a_backup_of_changes_alone_saves_nothing_else() {
    let before = pattern(4 * MIB, 7);
    let (source, target) = (image(&before), hole(4 * MIB));
    let mut rig = Rig::new(&source);
    let options = MirrorOptions { sync: MirrorSync::None, ..MirrorOptions::default() };
    rig.drive.attach_backup(engine(&target, &rig.target_faults, |_| {}), &options).unwrap();
    for _ in 0..2 {
        rig.write(MIB + 512, &[1; 512]).unwrap();
    }
    rig.round(Instant::now() + Duration::from_secs(1), &mut Vec::new());
    drop(rig.abort());
    let mut expected = vec![0; 4 * MIB];
    expected[MIB..MIB + 64 * KIB].copy_from_slice(&before[MIB..MIB + 64 * KIB]);
    assert!(content(&target) == expected);
}

#[test]
fn a_backup_that_cannot_save_what_the_guest_changes_fails_and_the_guest_does_not() {
    for policy in [OnError::Ignore, OnError::Stop] {
        let (source, target) = (image(&pattern(MIB, 7)), hole(MIB));
        let mut rig = Rig::new(&source);
        let options =
            MirrorOptions { sync: MirrorSync::None, on_target_error: policy, ..MirrorOptions::default() };
        rig.drive.attach_backup(engine(&target, &rig.target_faults, |_| {}), &options).unwrap();
        rig.target_faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), 1);
        assert_eq!(rig.write(512, &[1; 512]), Ok(()));
        let told = failed(Side::Target, MirrorOperation::Write, MirrorAction::Report);
        assert!(rig.events.iter().any(told), "{:?}", rig.events);
        assert_eq!(rig.write(MIB / 2, &[1; 512]), Ok(()));
        assert_eq!(rig.target_faults.take_log(), [CallKind::Write]);
        drop(rig.abort());
    }
}

#[test]
fn a_prepared_end_has_nothing_left_to_flush() {
    for copy_mode in MODES {
        let (source, target) = (image(&pattern(16 * MIB, 7)), hole(16 * MIB));
        let mut rig = Rig::new(&source);
        rig.mirror(&target, &mode(copy_mode));
        assert_eq!(rig.drive.prepare(), Err(MirrorRefusal::NotReady));
        rig.until_event(MirrorEvent::Ready);
        rig.write(MIB, &pattern(8 * MIB, 9)).unwrap();
        rig.until(|rig, _| rig.status().remaining == 0);
        rig.target_faults.take_log();
        rig.drive.prepare().unwrap();
        rig.until_event(MirrorEvent::Prepared);
        assert_eq!(rig.target_faults.take_log(), [CallKind::Sync]);
        rig.finish();
        assert_eq!(rig.target_faults.take_log(), []);
        rig.write(MIB, &[1; 512]).unwrap();
        rig.finish();
        let log = rig.target_faults.take_log();
        assert_eq!(log.last(), Some(&CallKind::Sync));
        // An error of a preparation is one.
        rig.target_faults.inject(CallKind::Sync, Fault::Error(libc::EIO), 1);
        rig.drive.reopen().unwrap();
        rig.drive.prepare().unwrap();
        rig.until_event(MirrorEvent::Unfinished);
        assert!(matches!(rig.drive.prepare(), Err(MirrorRefusal::Failed(_))));
    }
}
