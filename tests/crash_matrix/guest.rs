//! A guest without a processor: a thread that drives virtio-blk devices as Linux would, and keeps a log of what it was
//! promised.
//!
//! ```text
//!   every half millisecond:  used ring ─▶ log: A, F, and S of what comes next ─▶ available ring ─▶ doorbell
//! ```

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use devices::testing::{Buffer, FakeDriver, Random, Used};

use crate::records::{Record, SECTOR, SECTORS};

/// Between two looks at the devices: the guest is no faster than that, so that mirrors converge.
const TICK: Duration = Duration::from_micros(500);
/// Requests of a disk at a time.
const DEPTH: usize = 4;
/// Sectors that a write stays within, and of which one write at a time is under way.
const SLOT: u64 = 8;
const OK: u8 = 0;
const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;

/// What the guest is told.
enum Order {
    /// As vCPUs that are stopped: acknowledged, nothing more is begun.
    Stop(Sender<()>),
    Go,
    /// So many writes more on each disk, and a flush; then it says so.
    Burst(usize, Sender<()>),
}

/// The guest, from outside. It ends with the process.
pub(crate) struct Guest {
    orders: Sender<Order>,
    /// By disk: the VMM works on the target by now.
    pub(crate) on_target: Arc<[AtomicBool]>,
    /// Its filesystems are frozen: it writes nothing.
    pub(crate) frozen: Arc<AtomicBool>,
}

impl Guest {
    /// Starts the load on disks that are up.
    pub(crate) fn start(drivers: Vec<FakeDriver>, log: File, seed: u64) -> io::Result<Self> {
        let (orders, receiver) = channel();
        let on_target: Arc<[AtomicBool]> = drivers.iter().map(|_| AtomicBool::new(false)).collect();
        let disks = (0..).zip(drivers).map(|(number, driver)| Disk::new(number, driver)).collect();
        let frozen = Arc::new(AtomicBool::new(false));
        let random = Random::new(seed);
        let shared = (Arc::clone(&on_target), Arc::clone(&frozen));
        let mut load = Load { disks, log, random, on_target: shared.0, frozen: shared.1 };
        thread::Builder::new().name("guest".into()).spawn(move || load.run(&receiver))?;
        Ok(Self { orders, on_target, frozen })
    }

    /// Returns when nothing more is begun.
    pub(crate) fn stop(&self) {
        let (done, stopped) = channel();
        if self.orders.send(Order::Stop(done)).is_ok() {
            let _ = stopped.recv();
        }
    }

    pub(crate) fn go(&self) {
        let _ = self.orders.send(Order::Go);
    }

    /// How [`Self::burst`] is asked for from another thread.
    pub(crate) fn bursts(&self) -> impl Fn(usize) + Send + use<> {
        let orders = self.orders.clone();
        move |writes| {
            let (done, over) = channel();
            if orders.send(Order::Burst(writes, done)).is_ok() {
                let _ = over.recv();
            }
        }
    }
}

/// A request that is about to be made.
struct Planned {
    kind: u32,
    sector: u64,
    data: Vec<u8>,
    pending: Pending,
}

/// A request under way.
enum Pending {
    Write {
        number: u64,
        sector: u64,
        count: u64,
    },
    /// Acknowledged writes before it.
    Flush {
        acknowledged: u64,
    },
    Read {
        sector: u64,
        count: u64,
    },
}

struct Disk {
    number: u64,
    driver: FakeDriver,
    planned: Vec<Planned>,
    pending: HashMap<u16, Pending>,
    /// Slots in which something is under way.
    busy: HashSet<u64>,
    writes: u64,
    acknowledged: u64,
    /// By sector: the last write, unless it failed.
    content: HashMap<u64, u64>,
    /// Of a burst: acknowledged writes and flushes that are still wanted.
    wanted: Option<(u64, bool)>,
}

impl Disk {
    fn new(number: u64, driver: FakeDriver) -> Self {
        let (planned, pending, busy, content) = (vec![], HashMap::new(), HashSet::new(), HashMap::new());
        Self { number, driver, planned, pending, busy, writes: 0, acknowledged: 0, content, wanted: None }
    }
}

struct Load {
    disks: Vec<Disk>,
    log: File,
    random: Random,
    on_target: Arc<[AtomicBool]>,
    frozen: Arc<AtomicBool>,
}

impl Load {
    fn run(&mut self, orders: &Receiver<Order>) {
        let mut burst: Option<Sender<()>> = None;
        loop {
            match orders.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) | Ok(Order::Go) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(Order::Stop(done)) => {
                    let _ = done.send(());
                    // A burst that is asked for meanwhile begins when the guest goes on.
                    loop {
                        match orders.recv() {
                            Err(_) => return,
                            Ok(Order::Go) => break,
                            Ok(Order::Stop(done)) => drop(done.send(())),
                            Ok(Order::Burst(writes, done)) => burst = Some(self.want(writes, done)),
                        }
                    }
                }
                Ok(Order::Burst(writes, done)) => burst = Some(self.want(writes, done)),
            }
            self.tick();
            if self.disks.iter().all(|disk| disk.wanted.is_none())
                && let Some(done) = burst.take()
            {
                let _ = done.send(());
            }
        }
    }

    fn want(&mut self, writes: usize, done: Sender<()>) -> Sender<()> {
        for disk in &mut self.disks {
            disk.wanted = Some((disk.acknowledged + writes as u64, false));
        }
        done
    }

    fn tick(&mut self) {
        let mut text = String::new();
        let Self { disks, random, on_target, frozen, .. } = self;
        let frozen = frozen.load(Ordering::SeqCst);
        for (disk, on_target) in disks.iter_mut().zip(on_target.iter()) {
            for used in disk.driver.drain_used(0) {
                disk.complete(&used, &mut text);
            }
            let on_target = on_target.load(Ordering::SeqCst);
            while !frozen
                && disk.pending.len() + disk.planned.len() < DEPTH
                && let Some(planned) = disk.plan(random, on_target, &mut text)
            {
                disk.planned.push(planned);
            }
        }
        // Said before it is done: whatever is found on a disk was announced.
        self.log.write_all(text.as_bytes()).expect("a log");
        self.disks.iter_mut().for_each(Disk::submit);
    }
}

impl Disk {
    fn complete(&mut self, used: &Used, text: &mut String) {
        let status = used.data.last().copied();
        let pending = self.pending.remove(&used.head).expect("a request");
        let d = self.number;
        match pending {
            Pending::Write { number, sector, count } => {
                self.busy.remove(&(sector / SLOT));
                let sectors = sector..sector + count;
                if status == Some(OK) {
                    self.acknowledged += 1;
                    self.content.extend(sectors.map(|sector| (sector, number)));
                    *text += &format!("A {d} {number}\n");
                } else {
                    self.content.retain(|sector, _| !sectors.contains(sector));
                    *text += &format!("E {d} {number}\n");
                }
            }
            Pending::Flush { acknowledged } if status == Some(OK) => {
                *text += &format!("F {d} {acknowledged}\n");
                self.wanted = self.wanted.filter(|(writes, _)| acknowledged < *writes);
            }
            Pending::Flush { .. } => *text += &format!("E {d} flush\n"),
            Pending::Read { sector, count } => {
                self.busy.remove(&(sector / SLOT));
                if status == Some(OK) {
                    self.compare(sector..sector + count, &used.data, text);
                }
            }
        }
        if let Some((writes, flushing)) = &mut self.wanted {
            *flushing = self.acknowledged >= *writes;
        }
    }

    /// What was read is what was written.
    fn compare(&self, sectors: std::ops::Range<u64>, data: &[u8], text: &mut String) {
        for (sector, bytes) in sectors.zip(data.chunks_exact(SECTOR)) {
            let Some(number) = self.content.get(&sector) else { continue };
            let found = Record::decode(bytes);
            let right = |record: Record| {
                (record.disk, record.sector, record.number) == (self.number, sector, *number)
            };
            if !found.ok().flatten().is_some_and(right) {
                *text += &format!("X {} {sector} {number} {found:?}\n", self.number);
            }
        }
    }

    /// What to do next, if anything; writes are announced in `text`.
    fn plan(&mut self, random: &mut Random, on_target: bool, text: &mut String) -> Option<Planned> {
        let d = self.number;
        let flushing = self.wanted.is_some_and(|(_, flushing)| flushing);
        let dice = random.below(16);
        if flushing || dice == 0 {
            let planned = self.planned.iter().map(|planned| &planned.pending);
            let mut all = self.pending.values().chain(planned);
            if all.any(|pending| matches!(pending, Pending::Flush { .. })) {
                return None;
            }
            let pending = Pending::Flush { acknowledged: self.acknowledged };
            return Some(Planned { kind: VIRTIO_BLK_T_FLUSH, sector: 0, data: vec![], pending });
        }
        let limit = u16::try_from(SECTORS / SLOT).expect("a small disk");
        let slot = u64::from(random.below(limit));
        if !self.busy.insert(slot) {
            return None;
        }
        let first = random.below(8);
        let sector = slot * SLOT + u64::from(first);
        let count = u64::from(1 + random.below(8 - first));
        if dice < 3 {
            let pending = Pending::Read { sector, count };
            return Some(Planned { kind: VIRTIO_BLK_T_IN, sector, data: vec![], pending });
        }
        self.writes += 1;
        let number = self.writes;
        let record = |sector| Record { disk: d, sector, number, on_target }.encode();
        let data = (sector..sector + count).flat_map(record).collect();
        *text += &format!("S {d} {number} {sector} {count}\n");
        let pending = Pending::Write { number, sector, count };
        Some(Planned { kind: VIRTIO_BLK_T_OUT, sector, data, pending })
    }

    /// What was planned. A disk that is at work takes it at once, doorbell or not.
    fn submit(&mut self) {
        for Planned { kind, sector, data, pending } in std::mem::take(&mut self.planned) {
            let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
            let (header, status) = (Buffer::Readable(&header), Buffer::Writable(1));
            let head = match &pending {
                Pending::Write { .. } => self.driver.add(0, &[header, Buffer::Readable(&data), status]),
                Pending::Flush { .. } => self.driver.add(0, &[header, status]),
                Pending::Read { count, .. } => {
                    let length = u32::try_from(*count).expect("few") * 512;
                    self.driver.add(0, &[header, Buffer::Writable(length), status])
                }
            };
            self.pending.insert(head, pending);
        }
        self.driver.kick(0);
    }
}
