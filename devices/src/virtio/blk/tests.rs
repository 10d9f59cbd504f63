#![expect(clippy::cast_possible_truncation, reason = "small numbers, on 64-bit hosts")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use block::{CallKind, Disk, DiskOptions, EngineKind, EngineOptions, Errno, Fault, Faults};
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk as wire;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::testing::{Buffer, FakeDriver, INDIRECT, NEXT, PATIENCE, Random, Used, WILD_ADDRESS, WRITE};

mod backup;
mod filters;
mod mirror;

const MIB: usize = 1 << 20;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const ALL: u64 = u64::MAX;

/// The engines this host has.
fn engines() -> Vec<EngineKind> {
    let image = image(0);
    let disk = Disk::open(DiskOptions::path(image.path())).unwrap();
    let options = EngineOptions { kind: Some(EngineKind::Uring), ..EngineOptions::default() };
    match block::Engine::start(disk, &options) {
        Ok(_) => vec![EngineKind::Threads, EngineKind::Uring],
        Err(error) => {
            eprintln!("io_uring is not tested, the host refuses it: {error}");
            vec![EngineKind::Threads]
        }
    }
}

fn image(bytes: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes as u64).unwrap();
    file
}

/// Whether the file system has direct I/O (tmpfs since Linux 6.6).
fn direct_io() -> bool {
    let image = image(4096);
    let mut options = DiskOptions::path(image.path());
    options.direct = true;
    Disk::open(options).inspect_err(|error| eprintln!("Direct I/O is not tested: {error}")).is_ok()
}

fn seed() -> u64 {
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = std::env::var("SEED").map_or(clock, |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    seed
}

/// A disk with a machine. The machine goes first.
struct Rig {
    driver: FakeDriver,
    backend: BlkBackend,
    faults: Faults,
    events: mpsc::Receiver<DiskEvent>,
    image: NamedTempFile,
}

struct Setup {
    disk: DiskOptions,
    blk: BlkOptions,
    faults: Faults,
    image: NamedTempFile,
}

impl Setup {
    fn new(bytes: usize) -> Self {
        let image = image(bytes);
        let faults = Faults::new().unwrap();
        let mut blk = BlkOptions::new("disk0");
        blk.engine.faults = Some(faults.clone());
        Self { disk: DiskOptions::path(image.path()), blk, faults, image }
    }

    fn with(mut self, adjust: impl FnOnce(&mut DiskOptions, &mut BlkOptions)) -> Self {
        adjust(&mut self.disk, &mut self.blk);
        self
    }

    fn backend(self) -> (BlkBackend, Faults, mpsc::Receiver<DiskEvent>, NamedTempFile) {
        let disk = Disk::open(self.disk).unwrap();
        let (sender, events) = mpsc::channel();
        let backend = BlkBackend::start(disk, self.blk, move |event| {
            // The test may be over.
            let _ = sender.send(event);
        });
        (backend.unwrap(), self.faults, events, self.image)
    }

    fn start(self, features: u64) -> Rig {
        let (backend, faults, events, image) = self.backend();
        let mut driver = FakeDriver::new(Box::new(backend.device()));
        driver.start(features);
        Rig { driver, backend, faults, events, image }
    }
}

fn rig() -> Rig {
    Setup::new(MIB).start(ALL)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn status(used: &Used) -> u8 {
    *used.data.last().unwrap()
}

impl Rig {
    fn send_write(&mut self, sector: u64, data: &[u8]) -> u16 {
        let header = header(wire::VIRTIO_BLK_T_OUT, sector);
        self.driver.send(0, &[Buffer::Readable(&header), Buffer::Readable(data), Buffer::Writable(1)])
    }

    fn send_read(&mut self, sector: u64, length: u32) -> u16 {
        let header = header(wire::VIRTIO_BLK_T_IN, sector);
        self.driver.send(0, &[Buffer::Readable(&header), Buffer::Writable(length), Buffer::Writable(1)])
    }

    fn wait(&mut self) -> u8 {
        status(&self.driver.wait_used(0))
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.send_write(sector, data);
        self.wait()
    }

    fn read(&mut self, sector: u64, length: u32) -> Vec<u8> {
        self.send_read(sector, length);
        let used = self.driver.wait_used(0);
        assert_eq!((status(&used), used.len), (OK, length + 1));
        used.data[..length as usize].to_vec()
    }

    fn flush(&mut self) -> u8 {
        let header = header(wire::VIRTIO_BLK_T_FLUSH, 0);
        self.driver.send(0, &[Buffer::Readable(&header), Buffer::Writable(1)]);
        self.wait()
    }

    fn ranges(&mut self, kind: u32, ranges: &[u8]) -> u8 {
        let header = header(kind, 0);
        self.driver.send(0, &[Buffer::Readable(&header), Buffer::Readable(ranges), Buffer::Writable(1)]);
        self.wait()
    }

    /// Waits until `count` calls are in the engine.
    fn wait_in_flight(&self, count: usize) {
        await_that(|| self.faults.in_flight() == count);
    }

    fn event(&self) -> DiskEvent {
        self.events.recv_timeout(PATIENCE).unwrap()
    }
}

fn await_that(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "the condition does not come true");
        thread::yield_now();
    }
}

fn io_error(operation: DiskOperation, action: ErrorAction, errno: i32, sector: u64) -> DiskEvent {
    let errno = Errno::new(errno);
    let nospace = errno.is_no_space();
    DiskEvent::IoError { disk: "disk0".into(), operation, action, nospace, errno, sector }
}

#[test]
fn what_is_written_can_be_read_back_and_is_in_the_image() {
    for kind in engines() {
        let mut rig = Setup::new(MIB).with(|_, blk| blk.engine.kind = Some(kind)).start(ALL);
        assert_eq!(rig.backend.facts().engine, kind);
        let data: Vec<u8> = (0..8192_u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(rig.write(3, &data), OK);
        assert_eq!(rig.read(3, 8192), data);
        assert_eq!(rig.read(2047, 512), [0; 512]);
        rig.faults.take_log();
        assert_eq!(rig.flush(), OK);
        assert_eq!(rig.faults.take_log(), [CallKind::Sync]);
        assert!(fs::read(rig.image.path()).unwrap()[1536..9728] == data);
        let seen = rig.backend.statistics();
        let expected = BlkStatistics {
            read_operations: 2,
            read_bytes: 8704,
            write_operations: 1,
            write_bytes: 8192,
            flush_operations: 1,
            in_flight: seen.in_flight,
            ..BlkStatistics::default()
        };
        assert_eq!(seen, expected);
        await_that(|| rig.backend.statistics().in_flight == 0);
    }
}

#[test]
fn random_requests_on_several_queues_agree_with_a_model() {
    const LANES: usize = 16;
    let seed = seed();
    let modes = [false, direct_io()];
    for (kind, direct) in engines().into_iter().flat_map(|kind| modes.map(|direct| (kind, direct))) {
        let mut random = Random::new(seed);
        let mut rig = Setup::new(4 * MIB)
            .with(|disk, blk| {
                blk.engine.kind = Some(kind);
                blk.queues = 4;
                disk.direct = direct;
            })
            .start(if direct { ALL } else { ALL & !(1 << 29) }); // with and without EVENT_IDX
        let mut model = vec![0; 4 * MIB];
        for _ in 0..60 {
            let mut expected = vec![Vec::new(); 4];
            for lane in 0..LANES {
                let queue = usize::from(random.below(4));
                let start = lane * (model.len() / LANES / 512) + usize::from(random.below(256));
                let length = (1 + usize::from(random.below(200))) * 512;
                let range = start * 512..start * 512 + length;
                let read = header(wire::VIRTIO_BLK_T_IN, start as u64);
                let write = header(wire::VIRTIO_BLK_T_OUT, start as u64);
                let zero = header(wire::VIRTIO_BLK_T_WRITE_ZEROES, 0);
                let (head, data) = match random.below(8) {
                    0..3 => {
                        let first = 1 + u32::from(random.below(512));
                        let rest = length as u32 - first;
                        let mut buffers = vec![Buffer::Readable(&read), Buffer::Writable(first)];
                        if rest > 0 {
                            buffers.push(Buffer::Writable(rest));
                        }
                        buffers.push(Buffer::Writable(1));
                        (rig.driver.add(queue, &buffers), model[range].to_vec())
                    }
                    3..7 => {
                        let data: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
                        model[range].copy_from_slice(&data);
                        let buffers =
                            [Buffer::Readable(&write), Buffer::Readable(&data), Buffer::Writable(1)];
                        (rig.driver.add_indirect(queue, &buffers), Vec::new())
                    }
                    _ => {
                        model[range].fill(0);
                        let flags = u32::from(random.below(2));
                        let body = super::tests::range(start as u64, (length / 512) as u32, flags);
                        let buffers = [Buffer::Readable(&zero), Buffer::Readable(&body), Buffer::Writable(1)];
                        (rig.driver.add(queue, &buffers), Vec::new())
                    }
                };
                expected[queue].push((head, data));
            }
            (0..4).for_each(|queue| {
                rig.driver.kick(queue);
            });
            for (queue, mut waiting) in expected.into_iter().enumerate() {
                while !waiting.is_empty() {
                    let used = rig.driver.wait_used(queue);
                    let at = waiting.iter().position(|(head, _)| *head == used.head).unwrap();
                    let (_, data) = waiting.swap_remove(at);
                    assert_eq!(status(&used), OK);
                    assert!(used.data[..used.data.len() - 1] == data, "stale or foreign data");
                }
            }
        }
        assert_eq!(rig.flush(), OK);
        assert!(fs::read(rig.image.path()).unwrap() == model);
        assert!(!rig.driver.needs_reset());
    }
}

#[test]
fn a_batch_of_requests_costs_few_interrupts() {
    let mut rig = rig();
    let read = header(wire::VIRTIO_BLK_T_IN, 0);
    rig.faults.hold();
    for _ in 0..64 {
        let buffers = [Buffer::Readable(&read), Buffer::Writable(512), Buffer::Writable(1)];
        rig.driver.add_indirect(0, &buffers);
    }
    let before = rig.driver.line().count();
    rig.driver.kick(0);
    rig.wait_in_flight(64);
    rig.faults.release();
    (0..64).for_each(|_| assert_eq!(rig.wait(), OK));
    let interrupts = rig.driver.line().count() - before;
    assert!(interrupts < 64, "{interrupts} interrupts");
}

#[test]
fn the_largest_request_that_is_announced_works() {
    let mut rig = rig();
    let segments = u32::from_le_bytes(rig.driver.config(12));
    let data: Vec<u8> = (0..512_u32).map(|i| (i % 250) as u8).collect();
    let write = header(wire::VIRTIO_BLK_T_OUT, 0);
    let mut buffers = vec![Buffer::Readable(&write)];
    buffers.extend((0..segments).map(|_| Buffer::Readable(&data)));
    buffers.push(Buffer::Writable(1));
    rig.driver.send(0, &buffers);
    assert_eq!(rig.wait(), OK);
    assert_eq!(rig.read(u64::from(segments) - 1, 512), data);
}

#[test]
fn the_configuration_space_and_the_features_tell_what_the_disk_is() {
    let mut rig = Setup::new(MIB).with(|_, blk| blk.queues = 3).start(ALL);
    assert_eq!(u64::from_le_bytes(rig.driver.config(0)), 2048);
    assert_eq!(u32::from_le_bytes(rig.driver.config(20)), 512);
    assert_eq!(u16::from_le_bytes(rig.driver.config(34)), 3);
    assert_eq!(rig.driver.config::<1>(56), [1]);
    assert_eq!(rig.driver.config::<8>(56), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.driver.config::<4>(4000), [0; 4]);

    let offered = |setup: Setup| {
        let (backend, ..) = setup.backend();
        backend.device().device_features()
    };
    let bits = |bits: &[u32]| bits.iter().fold(0_u64, |set, bit| set | 1 << bit);
    let always = bits(&[VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY]);
    let flush = bits(&[VIRTIO_BLK_F_FLUSH]);
    let ranges = bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    assert_eq!(offered(Setup::new(512)), always | flush | ranges);
    let several = Setup::new(512).with(|_, blk| blk.queues = 2);
    assert_eq!(offered(several), always | flush | ranges | bits(&[VIRTIO_BLK_F_MQ]));
    let read_only = Setup::new(512).with(|disk, _| disk.read_only = true);
    assert_eq!(offered(read_only), always | flush | bits(&[VIRTIO_BLK_F_RO]));
    let durable = Setup::new(512).with(|disk, _| disk.cache = Cache::Writethrough);
    assert_eq!(offered(durable), always | ranges);
    let keeps = Setup::new(512).with(|disk, _| disk.discard = false);
    assert_eq!(offered(keeps), always | flush | bits(&[VIRTIO_BLK_F_WRITE_ZEROES]));
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let refused = |adjust: fn(&mut BlkOptions)| {
        let image = image(512);
        let disk = Disk::open(DiskOptions::path(image.path())).unwrap();
        let mut options = BlkOptions::new("disk0");
        adjust(&mut options);
        matches!(BlkBackend::start(disk, options, |_| {}), Err(StartError::Option { .. }))
    };
    assert!(!refused(|_| {}));
    assert!(refused(|options| options.serial = "123456789012345678901".into()));
    assert!(refused(|options| options.serial = "ä".into()));
    assert!(refused(|options| options.queues = 0));
    assert!(refused(|options| options.queues = 33));
    assert!(refused(|options| options.id = "a\0b".into()));
}

#[test]
fn the_serial_number_is_the_users() {
    let mut rig = Setup::new(512).with(|_, blk| blk.serial = "tarn-0001".into()).start(ALL);
    let header = header(wire::VIRTIO_BLK_T_GET_ID, 0);
    let mut id = |length: u32| {
        rig.driver.send(0, &[Buffer::Readable(&header), Buffer::Writable(length), Buffer::Writable(1)]);
        let used = rig.driver.wait_used(0);
        assert_eq!(status(&used), OK);
        (used.len, used.data)
    };
    let (len, data) = id(20);
    assert_eq!((len, &data[..20]), (21, &b"tarn-0001\0\0\0\0\0\0\0\0\0\0\0"[..]));
    let (len, data) = id(4);
    assert_eq!((len, &data[..4]), (5, &b"tarn"[..]));
    // Nothing is known of what lies behind the ID.
    let (len, data) = id(24);
    assert_eq!((len, &data[20..24]), (20, &[0xaa; 4][..]));
}

#[test]
fn discards_and_zeroes_make_holes_in_the_image() {
    for kind in [wire::VIRTIO_BLK_T_DISCARD, wire::VIRTIO_BLK_T_WRITE_ZEROES] {
        let mut rig = rig();
        for sector in (0..2048).step_by(128) {
            assert_eq!(rig.write(sector, &[7; 65536]), OK);
        }
        assert_eq!(rig.flush(), OK);
        let blocks = |rig: &Rig| rig.image.as_file().metadata().unwrap().blocks();
        let full = blocks(&rig);
        let ranges = match kind {
            wire::VIRTIO_BLK_T_DISCARD => [range(8, 64, 0), range(1024, 128, 0)].concat(),
            _ => range(64, 192, wire::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
        };
        assert_eq!(rig.ranges(kind, &ranges), OK);
        assert_eq!(full - blocks(&rig), 192);
        let sector = if kind == wire::VIRTIO_BLK_T_DISCARD { 1024 } else { 64 };
        assert_eq!(rig.read(sector, 65536), [0; 65536]);
        let statistics = rig.backend.statistics();
        let writes = statistics.write_operations - 16;
        assert_eq!(statistics.discard_operations + writes, 1);
    }
}

#[test]
fn a_request_that_makes_no_sense_gets_its_status() {
    use wire::{
        VIRTIO_BLK_T_DISCARD as DISCARD, VIRTIO_BLK_T_FLUSH as FLUSH, VIRTIO_BLK_T_GET_ID as GET_ID,
        VIRTIO_BLK_T_IN as IN, VIRTIO_BLK_T_OUT as OUT, VIRTIO_BLK_T_WRITE_ZEROES as ZEROES,
    };
    let mut rig = rig();
    let sectors = 2048;
    let (r, w) = (vec![0; 512], 512);
    // type, sector, readable after the header, writable before the status, expected
    type Case = (u32, u64, Vec<u8>, u32, u8);
    let cases: Vec<Case> = vec![
        (IN, sectors, vec![], w, IOERR),
        (IN, sectors - 1, vec![], 2 * w, IOERR),
        (IN, u64::MAX, vec![], w, IOERR),
        (IN, u64::MAX / 512, vec![], w, IOERR),
        (IN, 1 << 55, vec![], w, IOERR),
        (IN, 0, vec![], w - 1, IOERR),
        (IN, 0, r.clone(), w, IOERR),
        (IN, 0, r.clone(), 0, IOERR),
        (OUT, sectors, r.clone(), 0, IOERR),
        (OUT, u64::MAX, r.clone(), 0, IOERR),
        (OUT, 0, r[1..].to_vec(), 0, IOERR),
        (OUT, 0, r.clone(), w, IOERR),
        (OUT, 0, vec![], w, IOERR),
        (FLUSH, 0, r.clone(), 0, IOERR),
        (FLUSH, 0, vec![], w, IOERR),
        (GET_ID, 0, r.clone(), 20, IOERR),
        (DISCARD, 0, vec![], 0, IOERR),
        (DISCARD, 0, vec![0; 15], 0, IOERR),
        (DISCARD, 0, vec![0; 16 * 65], 0, IOERR),
        (DISCARD, 0, range(sectors, 1, 0), 0, IOERR),
        (DISCARD, 0, range(u64::MAX, 1, 0), 0, IOERR),
        (DISCARD, 0, range(0, u32::MAX, 0), 0, IOERR),
        (DISCARD, 0, range(0, 1, 1), 0, UNSUPP),
        (DISCARD, 0, [range(0, 1, 0), range(sectors, 1, 0)].concat(), 0, IOERR),
        (ZEROES, 0, range(sectors - 1, 2, 0), 0, IOERR),
        (ZEROES, 0, range(0, 1, 2), 0, UNSUPP),
        (ZEROES, 0, [range(0, 1, 0), range(1, 1, 0)].concat(), 0, IOERR),
        (ZEROES, 0, range(0, 1, 0), w, IOERR),
        (3, 0, vec![], 0, UNSUPP),
        (14, 0, range(0, 1, 0), 0, UNSUPP),
        (u32::MAX, 0, r.clone(), w, UNSUPP),
        // These make sense, at the very edge.
        (IN, sectors - 1, vec![], w, OK),
        (IN, sectors, vec![], 0, OK),
        (OUT, sectors - 1, r.clone(), 0, OK),
        (FLUSH, u64::MAX, vec![], 0, OK),
        (DISCARD, 0, range(sectors, 0, 0), 0, OK),
        (ZEROES, 0, range(0, 2048, 1), 0, OK),
    ];
    for (kind, sector, readable, writable, expected) in cases {
        let header = header(kind, sector);
        let mut buffers = vec![Buffer::Readable(&header)];
        if !readable.is_empty() {
            buffers.push(Buffer::Readable(&readable));
        }
        if writable > 0 {
            buffers.push(Buffer::Writable(writable));
        }
        buffers.push(Buffer::Writable(1));
        rig.driver.send(0, &buffers);
        let used = rig.driver.wait_used(0);
        let what = format!("type {kind}, sector {sector}, {} in, {writable} out", readable.len());
        assert_eq!(status(&used), expected, "{what}");
        let complete = expected == OK || writable == 0;
        assert_eq!(used.len, if complete { writable + 1 } else { 0 }, "{what}");
    }
    assert_eq!(rig.image.as_file().metadata().unwrap().len(), MIB as u64);
    assert!(!rig.driver.needs_reset());
    assert_eq!(rig.write(0, &[1; 512]), OK);
}

#[test]
fn a_request_of_the_wrong_shape_gets_an_error() {
    let mut rig = rig();
    // More segments than announced.
    let read = header(wire::VIRTIO_BLK_T_IN, 0);
    let mut buffers = vec![Buffer::Readable(&read)];
    buffers.extend([Buffer::Writable(512); 255]);
    buffers.push(Buffer::Writable(1));
    rig.driver.add_indirect(0, &buffers);
    rig.driver.kick(0);
    assert_eq!(rig.wait(), IOERR);
    for length in [0, 1, 15] {
        let short = header(wire::VIRTIO_BLK_T_IN, 0);
        let mut buffers = vec![Buffer::Readable(&short[..length]), Buffer::Writable(513)];
        buffers.drain(..usize::from(length == 0));
        rig.driver.send(0, &buffers);
        assert_eq!(rig.wait(), IOERR, "a header of {length} bytes");
    }
    assert!(!rig.driver.needs_reset());
}

#[test]
fn header_data_and_status_may_share_descriptors() {
    let mut rig = rig();
    let whole = [header(wire::VIRTIO_BLK_T_OUT, 5), vec![9; 512]].concat();
    let (first, second) = whole.split_at(7);
    rig.driver.send(0, &[Buffer::Readable(first), Buffer::Readable(second), Buffer::Writable(1)]);
    assert_eq!(rig.wait(), OK);
    let read = header(wire::VIRTIO_BLK_T_IN, 5);
    rig.driver.send(0, &[Buffer::Readable(&read), Buffer::Writable(100), Buffer::Writable(413)]);
    let used = rig.driver.wait_used(0);
    assert_eq!((status(&used), used.len), (OK, 513));
    assert_eq!(used.data[..512], [9; 512]);
}

#[test]
fn what_was_not_negotiated_is_not_supported() {
    let mut rig = Setup::new(MIB).start(1 << 32);
    assert_eq!(rig.ranges(wire::VIRTIO_BLK_T_DISCARD, &range(0, 8, 0)), UNSUPP);
    assert_eq!(rig.ranges(wire::VIRTIO_BLK_T_WRITE_ZEROES, &range(0, 8, 0)), UNSUPP);
    assert_eq!(rig.write(0, &[1; 512]), OK);
    assert_eq!(rig.flush(), OK);
}

#[test]
fn a_read_only_disk_is_not_written_whatever_the_driver_believes() {
    let mut rig = Setup::new(MIB).with(|disk, _| disk.read_only = true).start(1 << 32);
    assert_eq!(rig.write(0, &[1; 512]), IOERR);
    assert_eq!(rig.flush(), OK);
    assert_eq!(rig.read(0, 512), [0; 512]);
    let written = rig.faults.take_log().contains(&CallKind::Write);
    assert!(!written);
}

#[test]
fn a_chain_without_room_for_a_status_needs_a_reset() {
    let mut rig = rig();
    let read = header(wire::VIRTIO_BLK_T_IN, 0);
    rig.driver.send(0, &[Buffer::Readable(&read)]);
    rig.driver.line().wait_for(1);
    assert!(rig.driver.needs_reset());
    rig.driver.reset();
    rig.driver.start(ALL);
    assert_eq!(rig.write(0, &[1; 512]), OK);
}

#[test]
fn hostile_chains_end_in_a_reset_and_never_in_a_stuck_thread() {
    let mut rig = rig();
    let header = rig.driver.allocate(16);
    let d = Descriptor::new;
    let tables: Vec<Vec<Descriptor>> = vec![
        vec![d(header, 16, NEXT, 0)],                                  // a loop
        vec![d(header, 16, NEXT, 5000)],                               // out of the table
        vec![d(WILD_ADDRESS, 16, NEXT, 1), d(header, 1, WRITE, 0)],    // wild address
        vec![d(header, 0, NEXT, 1), d(header, 1, WRITE, 0)],           // empty
        vec![d(header, u32::MAX, NEXT, 1), d(header, 1, WRITE, 0)],    // beyond memory
        vec![d(header, 16, NEXT | WRITE, 1), d(header, 1, 0, 0)],      // wrong order
        vec![d(header, 16, INDIRECT, 0)],                              // a table of rubbish
        vec![d(header, 17, INDIRECT, 0)],                              // a ragged table
        vec![d(header, 16, NEXT, 1), d(header, u32::MAX, WRITE, 0)],   // status beyond memory
        vec![d(u64::MAX, 16, NEXT, 1), d(u64::MAX - 5, 16, WRITE, 0)], // wraps
    ];
    for (index, table) in tables.iter().enumerate() {
        let interrupts = rig.driver.line().count();
        rig.driver.send_raw(0, table);
        rig.driver.line().wait_for(interrupts + 1);
        assert!(rig.driver.needs_reset(), "table {index}");
        rig.driver.reset();
        rig.driver.start(ALL);
        assert_eq!(rig.write(0, &[1; 512]), OK, "table {index}");
    }
}

#[test]
fn random_chains_never_stop_the_disk() {
    let seed = seed();
    let mut random = Random::new(seed);
    let mut rig = rig();
    let kinds = [0, 1, 4, 8, 11, 13, 2, u32::MAX];
    for round in 0..400 {
        let at = rig.driver.allocate(4096);
        let kind = random.pick(&kinds);
        let bits = random.bits();
        let sector = random.pick(&[0, 1, 2047, 2048, u64::MAX, bits]);
        rig.driver.memory().write_slice(&header(kind, sector), GuestAddress(at)).unwrap();
        let count = 1 + random.below(5);
        let descriptors: Vec<Descriptor> = (0..count)
            .map(|i| {
                let (bits, other) = (random.bits(), random.below(300));
                let addr = random.pick(&[at, at, at, at + 16, at + 4095, WILD_ADDRESS, bits]);
                let len = random.pick(&[1, 16, 16, 512, 512, 1024, 15, 0, u32::MAX, bits as u32]);
                let next = if i + 1 < count { NEXT } else { random.pick(&[0, 0, 0, NEXT]) };
                let flags = next | random.pick(&[0, 0, WRITE, WRITE, INDIRECT, bits as u16]);
                let address = if i == 0 { random.pick(&[at, at, at, addr]) } else { addr };
                Descriptor::new(address, len, flags, random.pick(&[i + 1, i + 1, i + 1, other]))
            })
            .collect();
        rig.driver.send_raw(0, &descriptors);
        if random.below(4) == 0 {
            let jump = random.below(600);
            let index = rig.driver.avail_idx(0).wrapping_add(jump);
            rig.driver.set_avail_idx(0, index);
            rig.driver.ring(0);
        }
        if round % 8 == 0 {
            rig.backend.pause().wait(PATIENCE).unwrap();
            rig.backend.resume().wait(PATIENCE).unwrap();
        }
        rig.driver.reset();
        rig.driver.start(ALL);
    }
    assert_eq!(rig.write(0, &[1; 512]), OK);
    assert_eq!(rig.image.as_file().metadata().unwrap().len(), MIB as u64);
}

#[test]
fn a_reset_waits_for_requests_in_flight_and_forgets_them() {
    for kind in engines() {
        let mut rig = Setup::new(MIB).with(|_, blk| blk.engine.kind = Some(kind)).start(ALL);
        rig.faults.hold();
        rig.send_write(0, &[5; 4096]);
        rig.send_read(8, 4096);
        rig.wait_in_flight(2);
        let faults = rig.faults.clone();
        let (sender, order) = mpsc::channel();
        let release = thread::spawn({
            let sender = sender.clone();
            move || {
                sender.send("released").unwrap();
                faults.release();
            }
        });
        rig.driver.reset();
        sender.send("reset").unwrap();
        release.join().unwrap();
        assert_eq!(order.try_iter().collect::<Vec<_>>(), ["released", "reset"]);
        assert_eq!(rig.faults.in_flight(), 0);
        rig.driver.start(ALL);
        assert_eq!(rig.read(0, 4096), [5; 4096]);
        assert!(rig.driver.drain_used(0).is_empty());
    }
}

#[test]
fn a_disk_survives_reboots_and_serves_one_machine_at_a_time() {
    let (backend, ..) = Setup::new(MIB).backend();
    let boot = || {
        let mut driver = FakeDriver::new(Box::new(backend.device()));
        driver.negotiate(ALL);
        driver.set_up_queues();
        driver.add_status(4);
        driver
    };
    let mut first = boot();
    assert!(!first.needs_reset());
    let mut second = boot();
    assert!(second.needs_reset(), "the disk is in use");
    drop(second);
    let write = header(wire::VIRTIO_BLK_T_OUT, 0);
    let chain = [Buffer::Readable(&write), Buffer::Readable(&[3; 512]), Buffer::Writable(1)];
    first.send(0, &chain);
    assert_eq!(status(&first.wait_used(0)), OK);
    drop(first);
    for _ in 0..20 {
        let mut next = boot();
        let read = header(wire::VIRTIO_BLK_T_IN, 0);
        next.send(0, &[Buffer::Readable(&read), Buffer::Writable(512), Buffer::Writable(1)]);
        let used = next.wait_used(0);
        assert_eq!((status(&used), &used.data[..512]), (OK, &[3; 512][..]));
    }
}

#[test]
fn a_pause_drains_flushes_and_takes_nothing_more() {
    for kind in engines() {
        let mut rig = Setup::new(MIB).with(|_, blk| blk.engine.kind = Some(kind)).start(ALL);
        rig.faults.hold();
        rig.send_write(0, &[5; 512]);
        rig.wait_in_flight(1);
        let pause = rig.backend.pause();
        rig.send_write(1, &[6; 512]);
        rig.faults.release();
        pause.wait(PATIENCE).unwrap();
        assert_eq!(rig.faults.take_log(), [CallKind::Write, CallKind::Sync]);
        assert_eq!(rig.wait(), OK);
        // Paused: neither the request from before nor a new one is looked at.
        rig.send_write(2, &[7; 512]);
        rig.backend.flush().wait(PATIENCE).unwrap();
        assert_eq!(rig.faults.take_log(), [CallKind::Sync]);
        assert!(rig.driver.drain_used(0).is_empty());
        // A second pause is no harm.
        rig.backend.pause().wait(PATIENCE).unwrap();
        rig.backend.resume().wait(PATIENCE).unwrap();
        assert_eq!([rig.wait(), rig.wait()], [OK, OK]);
        assert_eq!(rig.read(1, 1024), [[6; 512], [7; 512]].concat());
    }
}

#[test]
fn a_pause_fails_when_the_flush_does() {
    let mut rig = rig();
    assert_eq!(rig.write(0, &[5; 512]), OK);
    rig.faults.inject(CallKind::Sync, Fault::Error(libc::EIO), 1);
    let error = rig.backend.pause().wait(PATIENCE).unwrap_err();
    assert!(matches!(error, BlkError::Flush { source, .. } if source.get() == libc::EIO), "{error}");
    rig.send_write(0, &[6; 512]);
    let again = rig.backend.pause().wait(PATIENCE);
    assert!(matches!(again, Err(BlkError::Flush { .. })), "what the page cache has lost stays lost");
    assert!(rig.driver.drain_used(0).is_empty(), "paused all the same");
    rig.backend.resume().wait(PATIENCE).unwrap();
    assert_eq!(rig.wait(), OK);
}

#[test]
fn every_wait_ends() {
    let mut rig = rig();
    rig.faults.hold();
    rig.send_write(0, &[5; 512]);
    rig.wait_in_flight(1);
    let error = rig.backend.pause().wait(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, BlkError::Timeout { command: "pause", .. }), "{error}");
    let overtaken = rig.backend.pause();
    rig.backend.resume().wait(PATIENCE).unwrap();
    let error = overtaken.wait(PATIENCE).unwrap_err();
    assert!(matches!(error, BlkError::Dropped { command: "pause", .. }), "{error}");
    rig.faults.release();
    assert_eq!(rig.wait(), OK);
}

#[test]
fn a_backend_that_is_dropped_finishes_what_is_in_flight() {
    let mut rig = rig();
    rig.faults.hold();
    rig.send_write(0, &[5; 512]);
    rig.wait_in_flight(1);
    let Rig { driver, backend, faults, image, .. } = rig;
    let dropping = thread::spawn(move || drop(backend));
    faults.release();
    dropping.join().unwrap();
    assert!(fs::read(image.path()).unwrap()[..512] == [5; 512]);
    // A machine that outlives its disk is not held up by it.
    drop(driver);
    Disk::open(DiskOptions::path(image.path())).unwrap();
}

#[test]
fn a_full_disk_holds_requests_until_there_is_room() {
    for kind in engines() {
        let mut rig = Setup::new(MIB).with(|_, blk| blk.engine.kind = Some(kind)).start(ALL);
        rig.faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), 2);
        rig.faults.hold();
        rig.send_write(10, &[1; 512]);
        rig.send_write(11, &[2; 512]);
        rig.wait_in_flight(2);
        rig.faults.release();
        let mut sectors = Vec::new();
        for _ in 0..2 {
            let event = rig.event();
            let DiskEvent::IoError { sector, .. } = &event else { panic!("{event:?}") };
            sectors.push(*sector);
            assert_eq!(event, io_error(DiskOperation::Write, ErrorAction::Stop, libc::ENOSPC, *sector));
        }
        sectors.sort_unstable();
        assert_eq!(sectors, [10, 11]);
        // Stopped: held requests are not answered, new ones not taken, and the VM can be paused.
        rig.send_read(11, 512);
        rig.backend.pause().wait(PATIENCE).unwrap();
        assert!(rig.driver.drain_used(0).is_empty());
        assert_eq!(rig.backend.statistics().failed_writes, 2);
        // Still full.
        rig.faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), 1);
        rig.backend.resume().wait(PATIENCE).unwrap();
        assert!(matches!(rig.event(), DiskEvent::IoError { action: ErrorAction::Stop, .. }));
        rig.backend.resume().wait(PATIENCE).unwrap();
        let done: Vec<u8> = (0..3).map(|_| rig.wait()).collect();
        assert_eq!(done, [OK; 3]);
        assert_eq!(rig.read(10, 1024), [[1; 512], [2; 512]].concat());
        assert_eq!(rig.backend.statistics().write_operations, 2);
    }
}

#[test]
fn held_requests_are_done_again_in_the_order_they_came() {
    if !direct_io() {
        return;
    }
    let mut rig = Setup::new(MIB)
        .with(|disk, blk| {
            // Else a flush that failed would fail for good.
            disk.direct = true;
            blk.write_error = ErrorPolicy::Stop;
            blk.engine.kind = Some(EngineKind::Threads);
            blk.engine.depth = 1;
        })
        .start(ALL);
    rig.faults.inject(CallKind::Write, Fault::Error(libc::EIO), 5);
    rig.faults.inject(CallKind::Sync, Fault::Error(libc::EIO), 1);
    rig.faults.hold();
    (0..5).for_each(|i| {
        rig.send_write(0, &[i; 4096]);
    });
    let flush = header(wire::VIRTIO_BLK_T_FLUSH, 0);
    rig.driver.send(0, &[Buffer::Readable(&flush), Buffer::Writable(1)]);
    await_that(|| rig.backend.statistics().in_flight == 6);
    rig.faults.release();
    for _ in 0..6 {
        let DiskEvent::IoError { action, .. } = rig.event() else { panic!("no I/O error") };
        assert_eq!(action, ErrorAction::Stop);
    }
    rig.backend.resume().wait(PATIENCE).unwrap();
    (0..6).for_each(|_| assert_eq!(rig.wait(), OK));
    // One at a time, so the last one in order has won.
    assert_eq!(rig.read(0, 512), [4; 512]);
}

#[test]
fn held_requests_are_forgotten_when_the_machine_is_reset() {
    let mut rig = rig();
    rig.faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), 1);
    rig.send_write(0, &[1; 512]);
    rig.event();
    rig.driver.reset();
    rig.driver.start(ALL);
    rig.send_read(0, 512);
    rig.backend.resume().wait(PATIENCE).unwrap();
    assert_eq!(rig.wait(), OK);
    assert_eq!(rig.read(0, 512), [0; 512]);
    assert_eq!(rig.faults.take_log(), [CallKind::Write, CallKind::Read, CallKind::Read]);
}

#[test]
fn errors_are_reported_or_ignored_as_the_policy_says() {
    let mut rig = rig();
    rig.faults.inject(CallKind::Read, Fault::Error(libc::EIO), 1);
    rig.send_read(4, 1024);
    let used = rig.driver.wait_used(0);
    assert_eq!((status(&used), used.len), (IOERR, 0));
    assert_eq!(rig.event(), io_error(DiskOperation::Read, ErrorAction::Report, libc::EIO, 4));
    rig.faults.inject(CallKind::Write, Fault::Error(libc::EIO), 1);
    assert_eq!(rig.write(7, &[1; 512]), IOERR);
    assert_eq!(rig.event(), io_error(DiskOperation::Write, ErrorAction::Report, libc::EIO, 7));
    rig.faults.inject(CallKind::Sync, Fault::Error(libc::EIO), 1);
    assert_eq!(rig.flush(), IOERR);
    assert_eq!(rig.event(), io_error(DiskOperation::Flush, ErrorAction::Report, libc::EIO, 0));
    rig.faults.inject(CallKind::PunchHole, Fault::Error(libc::EIO), 1);
    assert_eq!(rig.ranges(wire::VIRTIO_BLK_T_DISCARD, &range(9, 8, 0)), IOERR);
    assert_eq!(rig.event(), io_error(DiskOperation::Discard, ErrorAction::Report, libc::EIO, 9));
    let statistics = rig.backend.statistics();
    let BlkStatistics { failed_reads, failed_writes, failed_flushes, failed_discards, .. } = statistics;
    assert_eq!([failed_reads, failed_writes, failed_flushes, failed_discards], [1; 4]);

    let ignore = Setup::new(MIB).with(|_, blk| {
        blk.read_error = ErrorPolicy::Ignore;
        blk.write_error = ErrorPolicy::Ignore;
    });
    let mut rig = ignore.start(ALL);
    assert_eq!(rig.write(0, &[1; 16384]), OK);
    rig.faults.inject(CallKind::Read, Fault::Error(libc::EIO), 1);
    assert_eq!(rig.read(0, 16384), [0; 16384], "zeroes, not what happened to be in memory");
    assert_eq!(rig.event(), io_error(DiskOperation::Read, ErrorAction::Ignore, libc::EIO, 0));
    rig.faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), 1);
    assert_eq!(rig.write(0, &[2; 512]), OK);
    assert_eq!(rig.read(0, 512), [1; 512]);
}

#[test]
fn a_resize_tells_the_guest() {
    let mut rig = rig();
    let capacity = |rig: &mut Rig| u64::from_le_bytes(rig.driver.config(0));
    rig.driver.acknowledge();
    assert_eq!(rig.backend.resize(2 * MIB as u64).wait(PATIENCE).unwrap(), 2 * MIB as u64);
    assert_eq!(rig.driver.acknowledge() & 2, 2, "a configuration interrupt");
    assert_eq!(capacity(&mut rig), 4096);
    assert_eq!(rig.write(4095, &[1; 512]), OK);

    rig.image.as_file().set_len(3 * MIB as u64).unwrap();
    assert_eq!(rig.backend.refresh_size().wait(PATIENCE).unwrap(), 3 * MIB as u64);
    assert_eq!(capacity(&mut rig), 6144);
    assert_eq!(rig.backend.size(), 3 * MIB as u64);

    // To shrink, requests in flight are waited for.
    rig.faults.hold();
    rig.send_write(6143, &[1; 512]);
    rig.wait_in_flight(1);
    let shrink = rig.backend.resize(MIB as u64);
    rig.faults.release();
    assert_eq!(shrink.wait(PATIENCE).unwrap(), MIB as u64);
    assert_eq!(rig.wait(), OK);
    assert_eq!(rig.write(2048, &[1; 512]), IOERR);
    assert_eq!(rig.image.as_file().metadata().unwrap().len(), MIB as u64);

    let interrupts = rig.driver.line().count();
    assert!(matches!(rig.backend.resize(1000).wait(PATIENCE), Err(BlkError::Resize { .. })));
    assert_eq!(rig.backend.refresh_size().wait(PATIENCE).unwrap(), MIB as u64);
    assert_eq!(rig.driver.line().count(), interrupts, "nothing has changed");
}
