//! Mirrors of real files.

#![expect(unsafe_code, reason = "hands memory to a drive")]

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::drive::{
    AttachReason, CopyMode, Drive, MirrorAction, MirrorEvent, MirrorOperation, MirrorOptions, MirrorRefusal,
    MirrorStatus, MirrorSync, OnError, Side,
};
use crate::event::wait_readable;
use crate::{
    Buffer, CallKind, Completion, Disk, DiskOptions, Engine, EngineKind, EngineOptions, Errno, Fault, Faults,
    Operation,
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
    Engine::start(options, &EngineOptions { kind: None, depth: 64, faults: Some(faults.clone()) }).unwrap()
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
        let both = crate::engine::fault::both_readable(self.drive.event(), target).unwrap();
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
    fn abort(&mut self) -> Engine {
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
