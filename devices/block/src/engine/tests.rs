#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers, on 64-bit hosts"
)]

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::time::Instant;

use tempfile::NamedTempFile;

use super::*;
use crate::engine::fault::Fault;
use crate::error::ResizeError;
use crate::options::DiskOptions;

const TIMEOUT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// The engines this host has.
pub(super) fn kinds() -> Vec<EngineKind> {
    let mut kinds = vec![EngineKind::Threads];
    match uring::Uring::new(8) {
        Ok(_) => kinds.push(EngineKind::Uring),
        Err(error) => eprintln!("io_uring is not tested, the host refuses it: {error}"),
    }
    kinds
}

pub(super) fn image(bytes: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes as u64).unwrap();
    file
}

/// Without direct I/O, and with it where the file system has it (tmpfs since Linux 6.6).
fn direct_modes() -> Vec<bool> {
    let image = image(4096);
    let mut options = DiskOptions::path(image.path());
    options.direct = true;
    match Disk::open(options) {
        Ok(_) => vec![false, true],
        Err(error) => {
            eprintln!("Direct I/O is not tested: {error}");
            vec![false]
        }
    }
}

pub(super) fn all_modes() -> impl Iterator<Item = (EngineKind, bool)> {
    kinds().into_iter().flat_map(|kind| direct_modes().into_iter().map(move |direct| (kind, direct)))
}

pub(super) struct Rig {
    pub(super) engine: Engine,
    pub(super) faults: Faults,
    next: u64,
}

impl Rig {
    pub(super) fn new(
        kind: EngineKind,
        image: &NamedTempFile,
        adjust: impl FnOnce(&mut DiskOptions),
    ) -> Self {
        let mut options = DiskOptions::path(image.path());
        adjust(&mut options);
        let disk = Disk::open(options).unwrap();
        let faults = Faults::new().unwrap();
        let options = EngineOptions {
            kind: Some(kind),
            depth: 16,
            faults: Some(faults.clone()),
            filters: None,
            node_filters: None,
        };
        Self { engine: Engine::start(disk, &options).unwrap(), faults, next: 0 }
    }

    pub(super) fn queue(&mut self, operation: Operation) -> u64 {
        self.next += 1;
        // SAFETY: every test keeps its buffers until the operation was waited for.
        unsafe { self.engine.queue(self.next, operation) };
        self.next
    }

    /// Submits, and waits for everything.
    pub(super) fn finish(&mut self) -> Vec<Completion> {
        let deadline = Instant::now() + TIMEOUT;
        let mut completions = Vec::new();
        self.engine.submit().unwrap();
        loop {
            self.engine.reap(&mut completions).unwrap();
            if self.engine.in_flight() == 0 {
                return completions;
            }
            assert!(Instant::now() < deadline, "operations are stuck");
            self.engine.wait(Duration::from_secs(1));
        }
    }

    pub(super) fn run(&mut self, operation: Operation) -> Result<(), Errno> {
        let token = self.queue(operation);
        let completions = self.finish();
        assert_eq!(completions.len(), 1);
        assert_eq!(completions[0].token, token);
        completions[0].result
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        self.run(Operation::Write { offset, buffers: vec![buffer(bytes)] })
    }

    pub(super) fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        self.run(Operation::Read { offset, buffers: vec![buffer(bytes)] })
    }
}

pub(super) fn buffer(bytes: &mut [u8]) -> Buffer {
    Buffer::new(bytes.as_mut_ptr(), bytes.len())
}

pub(super) fn errno(code: i32) -> Result<(), Errno> {
    Err(Errno::new(code))
}

/// xorshift64*, for repeatable tests.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

pub(super) fn seed() -> u64 {
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    let seed = std::env::var("SEED").map_or(clock, |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    seed
}

/// Random operations in batches, checked against a model; ranges of one batch are apart.
fn agree_with_a_model(kind: EngineKind, seed: u64, unit: usize, adjust: impl FnOnce(&mut DiskOptions)) {
    let mut random = Random(seed);
    let size = 2 * MIB;
    let image = image(size);
    let mut rig = Rig::new(kind, &image, adjust);
    let mut model = vec![0_u8; size];
    for batch in 0..60 {
        let lanes = 1 + random.below(24);
        let lane = size / lanes / 512 * 512;
        let mut memory: Vec<Vec<u8>> = Vec::new();
        let mut reads = Vec::new();
        for i in 0..lanes {
            let at = i * lane + random.below(lane / 512) / unit * unit * 512;
            let room = (i + 1) * lane - at;
            let length = (1 + random.below(room / 512)) * 512;
            let range = at..at + length;
            let mut bytes = vec![0; length + 8];
            bytes.iter_mut().for_each(|b| *b = random.below(256) as u8);
            let skew = random.below(8);
            let mut rest = &mut bytes[skew..skew + length];
            let mut buffers = Vec::new();
            while !rest.is_empty() {
                let (piece, next) = rest.split_at_mut(1 + random.below(rest.len()));
                buffers.push(buffer(piece));
                rest = next;
            }
            let offset = at as u64;
            match random.below(10) {
                0..4 => {
                    rig.queue(Operation::Read { offset, buffers });
                    reads.push((memory.len(), skew, range));
                }
                4..8 => {
                    model[range].copy_from_slice(&bytes[skew..skew + length]);
                    rig.queue(Operation::Write { offset, buffers });
                }
                8 => {
                    let unmap = random.below(2) == 0;
                    model[range].fill(0);
                    rig.queue(Operation::WriteZeroes { offset, length: length as u64, unmap });
                }
                _ => {
                    rig.queue(Operation::Flush);
                }
            }
            memory.push(bytes);
        }
        for completion in rig.finish() {
            assert_eq!(completion.result, Ok(()), "batch {batch}");
        }
        for (index, skew, range) in reads {
            let length = range.len();
            assert!(memory[index][skew..skew + length] == model[range.clone()], "batch {batch}, {range:?}");
        }
    }
    drop(rig);
    assert!(std::fs::read(image.path()).unwrap() == model);
}

#[test]
fn random_operations_agree_with_a_model() {
    let seed = seed();
    for kind in kinds() {
        agree_with_a_model(kind, seed, 1, |_| {});
        agree_with_a_model(kind, seed, 1, |options| options.cache = Cache::Writethrough);
    }
}

#[test]
fn direct_io_bounces_what_does_not_suit_it_and_agrees_with_a_model() {
    let seed = seed();
    for kind in kinds() {
        for direct in direct_modes() {
            agree_with_a_model(kind, seed, 1, |options| options.direct = direct);
            agree_with_a_model(kind, seed, 8, |options| options.direct = direct);
        }
    }
}

#[test]
fn short_transfers_are_continued() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        let mut bytes: Vec<u8> = (0..8192).map(|i| (i % 251) as u8).collect();
        let expected = bytes.clone();
        rig.faults.inject(CallKind::Write, Fault::Short(700), 3);
        let (a, b) = bytes.split_at_mut(1000);
        let buffers = vec![buffer(a), buffer(b)];
        assert_eq!(rig.run(Operation::Write { offset: 512, buffers }), Ok(()));
        assert_eq!(rig.faults.take_log(), [CallKind::Write; 4]);
        let mut back = vec![0; 8192];
        rig.faults.inject(CallKind::Read, Fault::Short(1), 2);
        assert_eq!(rig.read(512, &mut back), Ok(()));
        assert!(back == expected);
    }
}

#[test]
fn interruptions_are_retried_and_errors_are_told() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        rig.faults.inject(CallKind::Read, Fault::Error(libc::EINTR), 2);
        rig.faults.inject(CallKind::Read, Fault::Error(libc::EAGAIN), 2);
        assert_eq!(rig.read(0, &mut [1; 512]), Ok(()));
        for code in [libc::ENOSPC, libc::EIO] {
            rig.faults.inject(CallKind::Write, Fault::Error(code), 1);
            assert_eq!(rig.write(0, &mut [1; 512]), errno(code));
        }
    }
}

#[test]
fn a_flush_that_failed_is_not_forgotten_where_the_page_cache_may_have_lost_data() {
    for (kind, direct) in all_modes() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |options| options.direct = direct);
        rig.faults.inject(CallKind::Sync, Fault::Error(libc::EIO), 1);
        assert_eq!(rig.run(Operation::Flush), errno(libc::EIO));
        let after = rig.run(Operation::Flush);
        assert_eq!(after, if direct { Ok(()) } else { errno(libc::EIO) });
        assert_eq!(rig.write(0, &mut [1; 512]), Ok(()));
    }
}

#[test]
fn one_sync_at_a_time_so_that_no_other_swallows_its_error() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        for (fault, expected) in [(None, Ok(())), (Some(libc::ENOSPC), errno(libc::EIO))] {
            if let Some(code) = fault {
                rig.faults.inject(CallKind::Sync, Fault::Error(code), 1);
            }
            rig.faults.hold();
            let first = rig.queue(Operation::Flush);
            rig.engine.submit().unwrap();
            // Both wait for the first, and share the next.
            let others = [rig.queue(Operation::Flush), rig.queue(Operation::Flush)];
            rig.engine.submit().unwrap();
            assert_eq!(rig.engine.in_flight(), 3);
            rig.faults.release();
            let mut completions = rig.finish();
            completions.sort_by_key(|completion| completion.token);
            let told: Vec<_> =
                completions.iter().map(|completion| (completion.token, completion.result)).collect();
            let first_told = fault.map_or(Ok(()), errno);
            assert_eq!(told, [(first, first_told), (others[0], expected), (others[1], expected)]);
            assert_eq!(rig.engine.in_flight(), 0);
            // After a failure nobody asks the kernel again: it has forgotten.
            let syncs = if fault.is_some() { 1 } else { 2 };
            assert_eq!(rig.faults.take_log(), vec![CallKind::Sync; syncs]);
        }
    }
}

#[test]
fn no_offset_or_length_panics_or_grows_the_image() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        let end = MIB as u64;
        for offset in [end, end - 511, end + 512, i64::MAX as u64, u64::MAX - 511, u64::MAX] {
            assert_eq!(rig.read(offset, &mut [0; 512]), errno(libc::EINVAL), "{offset}");
            assert_eq!(rig.write(offset, &mut [0; 512]), errno(libc::EINVAL), "{offset}");
            for length in [512, end + 1, u64::MAX] {
                let discard = Operation::Discard { offset, length };
                assert_eq!(rig.run(discard), errno(libc::EINVAL), "{offset}+{length}");
                let zeroes = Operation::WriteZeroes { offset, length, unmap: true };
                assert_eq!(rig.run(zeroes), errno(libc::EINVAL), "{offset}+{length}");
            }
        }
        let huge = vec![Buffer::new(std::ptr::null_mut(), usize::MAX); 3];
        assert_eq!(rig.run(Operation::Read { offset: 0, buffers: huge.clone() }), errno(libc::EINVAL));
        assert_eq!(rig.run(Operation::Write { offset: 0, buffers: huge }), errno(libc::EINVAL));
        assert_eq!(rig.run(Operation::Write { offset: end, buffers: Vec::new() }), Ok(()));
        assert_eq!(rig.faults.take_log(), []);
        assert_eq!(image.as_file().metadata().unwrap().len(), end);
    }
}

/// Dirty pages of a file in the page cache, where the host can tell (Linux 6.5).
fn dirty_pages(file: &File) -> Option<u64> {
    const CACHESTAT: libc::c_long = 451;
    let range = [0_u64, 0];
    let mut stat = [0_u64; 5]; // cache, dirty, writeback, evicted, recently evicted
    // SAFETY: cachestat reads two u64 and writes five.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
    (result == 0).then_some(stat[1] + stat[2])
}

#[test]
fn a_flush_reaches_fdatasync_and_the_disk() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        assert_eq!(rig.write(0, &mut [7; 65536]), Ok(()));
        let before = dirty_pages(image.as_file());
        assert_eq!(rig.run(Operation::Flush), Ok(()));
        assert_eq!(rig.faults.take_log(), [CallKind::Write, CallKind::Sync]);
        match before {
            // tmpfs pages are always or never dirty.
            Some(0) | None => eprintln!("This host or file system does not show dirty pages"),
            Some(_) => assert_eq!(dirty_pages(image.as_file()), Some(0)),
        }
    }
}

#[test]
fn writethrough_is_durable_without_a_flush_and_unsafe_never() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |options| options.cache = Cache::Writethrough);
        assert_eq!(rig.write(0, &mut [7; 512]), Ok(()));
        assert_eq!(rig.run(Operation::Discard { offset: 0, length: 4096 }), Ok(()));
        let log = rig.faults.take_log();
        assert_eq!(log, [CallKind::Write, CallKind::Sync, CallKind::PunchHole, CallKind::Sync]);
        assert_eq!(rig.run(Operation::WriteZeroes { offset: 0, length: 4096, unmap: true }), Ok(()));
        assert_eq!(rig.faults.take_log(), [CallKind::PunchHole, CallKind::Sync]);
        drop(rig);

        let mut rig = Rig::new(kind, &image, |options| options.cache = Cache::Unsafe);
        assert_eq!(rig.write(0, &mut [7; 512]), Ok(()));
        assert_eq!(rig.run(Operation::Flush), Ok(()));
        assert_eq!(rig.faults.take_log(), [CallKind::Write]);
    }
}

#[test]
fn discards_and_unmapping_zeroes_give_space_back() {
    for kind in kinds() {
        for discard in [true, false] {
            let image = image(MIB);
            let mut rig = Rig::new(kind, &image, |_| {});
            assert_eq!(rig.write(0, &mut vec![7; MIB]), Ok(()));
            rig.run(Operation::Flush).unwrap();
            let blocks = || image.as_file().metadata().unwrap().blocks();
            let full = blocks();
            let (offset, length) = (65536, 262_144);
            let operation = match discard {
                true => Operation::Discard { offset, length },
                false => Operation::WriteZeroes { offset, length, unmap: true },
            };
            assert_eq!(rig.run(operation), Ok(()));
            assert_eq!(full - blocks(), length / 512);
            let mut back = vec![1; length as usize];
            assert_eq!(rig.read(offset, &mut back), Ok(()));
            assert!(back.iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn an_image_tells_where_it_has_holes() {
    for kind in kinds() {
        let image = image(MIB);
        image.as_file().write_all_at(&[7; 65536], 256 << 10).unwrap();
        let mut rig = Rig::new(kind, &image, |_| {});
        let mut extent = |offset: u64, faults: Option<i32>| {
            if let Some(code) = faults {
                rig.faults.inject(CallKind::Extent, Fault::Error(code), 1);
            }
            let mut told = Extent::UNKNOWN;
            let answer = Buffer::new((&raw mut told).cast(), size_of::<Extent>());
            (rig.run(Operation::Extent { offset, answer }), told)
        };
        assert_eq!(extent(0, None), (Ok(()), Extent { hole: true, end: 256 << 10 }));
        assert_eq!(extent(512, None), (Ok(()), Extent { hole: true, end: 256 << 10 }));
        assert_eq!(extent(300 << 10, None), (Ok(()), Extent { hole: false, end: 320 << 10 }));
        assert_eq!(extent(320 << 10, None), (Ok(()), Extent { hole: true, end: u64::MAX }));
        assert_eq!(extent(MIB as u64, None), (errno(libc::EINVAL), Extent::UNKNOWN));
        assert_eq!(extent(0, Some(libc::EIO)), (errno(libc::EIO), Extent::UNKNOWN));
    }
}

#[test]
fn what_is_done_aside_is_done() {
    for (kind, direct) in all_modes() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |options| options.direct = direct);
        let mut bytes = vec![5; 65536];
        let aside = |rig: &mut Rig, operation| {
            // SAFETY: `bytes` outlives the operation, which is waited for.
            unsafe { rig.engine.queue_aside(9, operation) };
            assert_eq!(rig.finish(), [Completion { token: 9, result: Ok(()) }]);
        };
        let buffers = vec![buffer(&mut bytes)];
        aside(&mut rig, Operation::Write { offset: 512, buffers: buffers.clone() });
        bytes.fill(0);
        aside(&mut rig, Operation::Read { offset: 512, buffers });
        assert!(bytes.iter().all(|byte| *byte == 5));
        aside(&mut rig, Operation::WriteZeroes { offset: 0, length: 4096, unmap: true });
        aside(&mut rig, Operation::Flush);
    }
}

#[test]
fn a_disk_that_keeps_discards_makes_no_holes() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |options| options.discard = false);
        assert_eq!(rig.write(0, &mut [7; 8192]), Ok(()));
        assert_eq!(rig.run(Operation::Discard { offset: 0, length: 4096 }), Ok(()));
        assert_eq!(rig.run(Operation::WriteZeroes { offset: 0, length: 8192, unmap: true }), Ok(()));
        assert!(!rig.faults.take_log().contains(&CallKind::PunchHole));
        let mut back = [1; 8192];
        assert_eq!(rig.read(0, &mut back), Ok(()));
        assert_eq!(back, [0; 8192]);
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    for kind in kinds() {
        let image = image(4 * MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        assert_eq!(rig.write(0, &mut vec![7; 4 * MIB]), Ok(()));
        rig.faults.take_log();
        rig.faults.inject(CallKind::PunchHole, Fault::Error(libc::EOPNOTSUPP), 1);
        rig.faults.inject(CallKind::ZeroRange, Fault::Error(libc::EOPNOTSUPP), 1);
        let length = (2 * MIB + 512) as u64;
        let zeroes = Operation::WriteZeroes { offset: 512, length, unmap: true };
        assert_eq!(rig.run(zeroes.clone()), Ok(()));
        use CallKind::{PunchHole, Write, ZeroRange};
        assert_eq!(rig.faults.take_log(), [PunchHole, ZeroRange, Write, Write, Write]);
        let mut back = vec![1; 4 * MIB];
        assert_eq!(rig.read(0, &mut back), Ok(()));
        let end = 512 + length as usize;
        assert!(back[512..end].iter().all(|b| *b == 0));
        assert!(back[..512].iter().chain(&back[end..]).all(|b| *b == 7));
        // Asked once, remembered.
        rig.faults.take_log();
        assert_eq!(rig.run(zeroes), Ok(()));
        assert_eq!(rig.faults.take_log(), [Write, Write, Write]);
    }
}

#[test]
fn a_discard_that_the_host_does_not_know_is_done() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        rig.faults.inject(CallKind::PunchHole, Fault::Error(libc::EOPNOTSUPP), 1);
        for _ in 0..2 {
            assert_eq!(rig.run(Operation::Discard { offset: 0, length: 4096 }), Ok(()));
        }
        assert_eq!(rig.faults.take_log(), [CallKind::PunchHole]);
    }
}

#[test]
fn nothing_is_written_to_a_read_only_disk() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |options| options.read_only = true);
        assert_eq!(rig.write(0, &mut [0; 512]), errno(libc::EROFS));
        assert_eq!(rig.run(Operation::Discard { offset: 0, length: 512 }), errno(libc::EROFS));
        let zeroes = Operation::WriteZeroes { offset: 0, length: 512, unmap: false };
        assert_eq!(rig.run(zeroes), errno(libc::EROFS));
        assert_eq!(rig.run(Operation::Flush), Ok(()));
        assert_eq!(rig.read(0, &mut [0; 512]), Ok(()));
        assert_eq!(rig.faults.take_log(), [CallKind::Read]);
    }
}

#[test]
fn more_operations_than_slots_and_more_segments_than_one_call_takes() {
    for kind in kinds() {
        let image = image(4 * MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        let mut bytes: Vec<u8> = (0..4 * MIB).map(|i| (i / 512) as u8).collect();
        for (i, sector) in bytes.chunks_mut(512).enumerate() {
            rig.queue(Operation::Write { offset: i as u64 * 512, buffers: vec![buffer(sector)] });
        }
        let completions = rig.finish();
        assert_eq!(completions.len(), 8192);
        assert!(completions.iter().all(|c| c.result.is_ok()));
        let mut back = vec![0; 4 * MIB];
        rig.faults.take_log();
        let buffers = back.chunks_mut(512).map(buffer).collect();
        assert_eq!(rig.run(Operation::Read { offset: 0, buffers }), Ok(()));
        assert_eq!(rig.faults.take_log().len(), 8);
        assert!(back == bytes);
    }
}

#[test]
fn ragged_writes_to_one_block_do_not_undo_each_other() {
    for (kind, direct) in all_modes() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |options| options.direct = direct);
        // As on a disk with 4 KiB blocks.
        rig.engine.target.geometry.offset_alignment = 4096;
        let mut bytes: Vec<u8> = (0..MIB).map(|i| (i / 512 % 255) as u8).collect();
        for (i, sector) in bytes.chunks_mut(512).enumerate() {
            rig.queue(Operation::Write { offset: i as u64 * 512, buffers: vec![buffer(sector)] });
        }
        assert!(rig.finish().iter().all(|c| c.result.is_ok()));
        let middle = Operation::WriteZeroes { offset: 512, length: 1024, unmap: false };
        rig.faults.inject(CallKind::ZeroRange, Fault::Error(libc::EOPNOTSUPP), 1);
        assert_eq!(rig.run(middle), Ok(()));
        bytes[512..1536].fill(0);
        let mut back = vec![0; MIB - 1024];
        assert_eq!(rig.read(512, &mut back), Ok(()));
        assert!(back == bytes[512..MIB - 512]);
    }
}

#[test]
fn an_image_that_shrank_gives_errors_instead_of_made_up_data() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        image.as_file().set_len(4096).unwrap();
        assert_eq!(rig.read(0, &mut [0; 8192]), errno(libc::EIO));
        assert_eq!(rig.engine.resize(None).unwrap(), 4096);
        assert_eq!(rig.read(0, &mut [0; 4096]), Ok(()));
        assert_eq!(rig.read(4096, &mut [0; 512]), errno(libc::EINVAL));
        rig.engine.resize(Some(MIB as u64)).unwrap();
        assert_eq!(rig.read(4096, &mut [0; 512]), Ok(()));
    }
}

#[test]
fn an_engine_that_is_dropped_waits_for_what_is_in_flight() {
    for kind in kinds() {
        let image = image(MIB);
        let mut rig = Rig::new(kind, &image, |_| {});
        let mut bytes = vec![9; 65536];
        rig.faults.hold();
        rig.queue(Operation::Write { offset: 0, buffers: vec![buffer(&mut bytes)] });
        rig.engine.submit().unwrap();
        let faults = rig.faults.clone();
        let dropping = std::thread::spawn(move || drop(rig));
        assert_eq!(faults.in_flight(), 1);
        faults.release();
        dropping.join().unwrap();
        assert_eq!(faults.in_flight(), 0);
        let mut back = vec![0; 65536];
        image.as_file().read_exact_at(&mut back, 0).unwrap();
        assert!(back == bytes);
    }
}

/// `TEST_BLOCK_DEVICE` names a device whose content may be lost, say a loop device of 4 KiB sectors.
#[test]
fn a_block_device_is_read_written_zeroed_and_discarded() {
    let Ok(device) = std::env::var("TEST_BLOCK_DEVICE") else {
        eprintln!("Block devices are not tested: TEST_BLOCK_DEVICE is not set");
        return;
    };
    for (kind, direct) in kinds().into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let mut options = DiskOptions::path(&device);
        options.direct = direct;
        let disk = Disk::open(options).unwrap();
        assert!(disk.geometry().is_block_device);
        println!("{kind:?} {:?}", disk.geometry());
        let end = disk.size();
        let faults = Faults::new().unwrap();
        let options = EngineOptions {
            kind: Some(kind),
            depth: 16,
            faults: Some(faults.clone()),
            filters: None,
            node_filters: None,
        };
        let mut rig = Rig { engine: Engine::start(disk, &options).unwrap(), faults, next: 0 };
        let mut bytes = vec![7; 256 << 10];
        let offset = end - bytes.len() as u64;
        assert_eq!(rig.write(offset, &mut bytes), Ok(()));
        let zeroes = |offset, length| Operation::WriteZeroes { offset, length, unmap: length == 65536 };
        assert_eq!(rig.run(zeroes(offset, 65536)), Ok(()));
        assert_eq!(rig.run(zeroes(offset + 65536 + 512, 8192)), Ok(()));
        assert_eq!(rig.run(Operation::Discard { offset: offset + 131_072, length: 65536 }), Ok(()));
        assert_eq!(rig.run(Operation::Flush), Ok(()));
        println!("{:?}", rig.faults.take_log());
        let mut back = vec![1; bytes.len()];
        assert_eq!(rig.read(offset, &mut back), Ok(()));
        bytes[..65536].fill(0);
        bytes[66048..74240].fill(0);
        assert!(back[..131_072] == bytes[..131_072]);
        assert!(back[196_608..] == bytes[196_608..]);
        assert!(matches!(rig.engine.resize(Some(end + 4096)), Err(ResizeError::Device { .. })));
    }
}
