//! The driver itself.

mod dishonest;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Buffer, FakeLine, INDIRECT, MEMORY_SIZE, NEXT, PATIENCE, Used, WRITE};
use crate::bus::BusDevice as _;
use crate::virtio::device::{Interrupt, VirtioDevice};
use crate::virtio::mmio::MmioTransport;

/// Each queue has its rings in a window of its own…
const RINGS: u64 = 1 << 20;
const RINGS_SIZE: u64 = 0x1_0000;
const AVAIL_OFFSET: u64 = 0x8000;
const USED_OFFSET: u64 = 0xa000;
/// … and buffers come after the windows of 64 queues.
const DATA: u64 = 8 << 20;
/// What writable buffers hold before the device writes them.
const FILLER: u8 = 0xaa;

struct Submitted {
    descriptors: Vec<u16>,
    writable: Vec<(GuestAddress, u32)>,
}

struct DriverQueue {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    /// The available index at the last [`FakeDriver::kick`].
    kicked_idx: u16,
    last_used: u16,
    free: Vec<u16>,
    /// Chains that the device has, by head.
    submitted: Vec<Option<Submitted>>,
}

/// A guest with one virtio device.
pub struct FakeDriver {
    transport: MmioTransport,
    memory: GuestMemoryMmap,
    line: FakeLine,
    queues: Vec<DriverQueue>,
    event_idx: bool,
    next_buffer: u64,
}

impl FakeDriver {
    /// Plugs `device` into a fresh guest. Nothing has been probed yet.
    ///
    /// # Panics
    ///
    /// When the host refuses memory or eventfds.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let size = usize::try_from(MEMORY_SIZE).expect("64-bit host");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("guest memory");
        let line = FakeLine::default();
        let interrupt = Arc::new(Interrupt::new(Box::new(line.clone())));
        let transport = MmioTransport::new(device, memory.clone(), interrupt).expect("transport");
        Self { transport, memory, line, queues: Vec::new(), event_idx: false, next_buffer: DATA }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The device's interrupt line.
    pub fn line(&self) -> &FakeLine {
        &self.line
    }

    /// The transport, for what the VMM would do with it.
    pub fn transport(&mut self) -> &mut MmioTransport {
        &mut self.transport
    }

    /// The doorbell of a queue, as an event loop sees it.
    pub fn doorbell(&self, queue: usize) -> Arc<EventFd> {
        Arc::clone(&self.transport.doorbells()[queue])
    }

    /// Whether the doorbell was rung since the last call.
    pub fn take_doorbell(&self, queue: usize) -> bool {
        self.transport.doorbells()[queue].read().is_ok()
    }
}

/// Registers and configuration.
impl FakeDriver {
    /// Reads a register.
    pub fn read(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, register: u32, value: u32) {
        self.transport.write(u64::from(register), &value.to_le_bytes());
    }

    /// Reads `N` bytes of the configuration space.
    pub fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read(u64::from(reg::VIRTIO_MMIO_CONFIG) + offset, &mut data);
        data
    }

    /// The status register.
    pub fn status(&mut self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    /// Whether the device has given up on this driver.
    pub fn needs_reset(&mut self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    /// Sets further status bits, as Linux does: on top of what it reads.
    pub fn add_status(&mut self, bits: u32) {
        let status = self.status();
        self.write(reg::VIRTIO_MMIO_STATUS, status | bits);
    }

    /// Reads and acknowledges the interrupt status, as an interrupt handler does.
    pub fn acknowledge(&mut self) -> u32 {
        let status = self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    /// The feature bits on offer.
    pub fn offered_features(&mut self) -> u64 {
        self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES)) << 32;
        self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        high | u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
    }

    /// Writes the accepted feature bits, offered or not.
    pub fn write_features(&mut self, features: u64) {
        let [low, high] = [features & u64::from(u32::MAX), features >> 32]
            .map(|half| u32::try_from(half).expect("half of 64 bits"));
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, high);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, low);
        self.event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
    }
}

/// Probing.
impl FakeDriver {
    /// Probes the device in Linux's order and brings it to DRIVER_OK with all its queues, with those of the
    /// `wanted` features that it offers. Returns the features agreed on.
    ///
    /// # Panics
    ///
    /// When the device refuses.
    pub fn start(&mut self, wanted: u64) -> u64 {
        let features = self.negotiate(wanted);
        self.set_up_queues();
        self.add_status(DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, "status after probing");
        features
    }

    /// The first half of [`Self::start`], up to FEATURES_OK.
    ///
    /// # Panics
    ///
    /// When the device refuses.
    pub fn negotiate(&mut self, wanted: u64) -> u64 {
        assert_eq!(self.read(reg::VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
        assert_eq!(self.read(reg::VIRTIO_MMIO_VERSION), 2);
        assert_ne!(self.read(reg::VIRTIO_MMIO_DEVICE_ID), 0);
        self.reset();
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        let features = self.offered_features() & wanted;
        self.write_features(features);
        self.add_status(FEATURES_OK);
        assert_ne!(self.status() & FEATURES_OK, 0, "features {features:#x} were refused");
        features
    }

    /// Resets the device and forgets its queues.
    pub fn reset(&mut self) {
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        self.queues.clear();
        self.event_idx = false;
    }

    /// Sets up every queue at its largest size.
    pub fn set_up_queues(&mut self) {
        for index in 0..self.transport.doorbells().len() {
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, u32::try_from(index).expect("few queues"));
            let max = self.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX);
            self.set_up_queue(index, u16::try_from(max).expect("a 16-bit queue size"));
        }
    }

    /// Sets up queue `index` (all below it must be) with `size` descriptors.
    ///
    /// # Panics
    ///
    /// When the queue is in use already, or the device refuses.
    pub fn set_up_queue(&mut self, index: usize, size: u16) {
        assert_eq!(index, self.queues.len(), "queues are set up in order");
        let desc = RINGS + RINGS_SIZE * index as u64;
        let (avail, used) = (desc + AVAIL_OFFSET, desc + USED_OFFSET);
        let zeroes = vec![0; usize::try_from(RINGS_SIZE).expect("64-bit host")];
        self.memory.write_slice(&zeroes, GuestAddress(desc)).expect("rings are in memory");

        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, u32::try_from(index).expect("few queues"));
        assert_eq!(self.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "queue {index} is in use");
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, u32::from(size));
        self.write_ring_addresses([desc, avail, used]);
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.read(reg::VIRTIO_MMIO_QUEUE_READY), 1, "queue {index} was refused");
        self.queues.push(DriverQueue {
            size,
            desc,
            avail,
            used,
            avail_idx: 0,
            kicked_idx: 0,
            last_used: 0,
            free: (0..size).rev().collect(),
            submitted: (0..size).map(|_| None).collect(),
        });
    }

    /// Writes the addresses of the descriptor table, the available and the used ring of the selected queue.
    pub fn write_ring_addresses(&mut self, addresses: [u64; 3]) {
        let registers = [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, reg::VIRTIO_MMIO_QUEUE_DESC_HIGH),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, reg::VIRTIO_MMIO_QUEUE_USED_HIGH),
        ];
        for ((low, high), address) in registers.into_iter().zip(addresses) {
            self.write(low, u32::try_from(address & u64::from(u32::MAX)).expect("masked"));
            self.write(high, u32::try_from(address >> 32).expect("shifted"));
        }
    }
}

/// Buffers out, buffers back.
impl FakeDriver {
    /// Makes a chain of `buffers` available and rings the doorbell if the device asked for it. Returns the head.
    pub fn send(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let head = self.add(queue, buffers);
        self.kick(queue);
        head
    }

    /// Makes a chain available without ringing. Returns the head.
    ///
    /// # Panics
    ///
    /// When the queue has not enough free descriptors.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let placed = self.place(buffers);
        let q = &mut self.queues[queue];
        let descriptors: Vec<u16> = placed.iter().map(|_| q.free.pop().expect("a free descriptor")).collect();
        for (at, &(addr, len, flags)) in placed.iter().enumerate() {
            let next = descriptors.get(at + 1).copied();
            let flags = flags | next.map_or(0, |_| NEXT);
            let descriptor = Descriptor::new(addr, len, flags, next.unwrap_or(0));
            self.write_descriptor(queue, descriptors[at], descriptor);
        }
        self.publish_chain(queue, descriptors, &placed)
    }

    /// Like [`Self::add`], through an indirect table.
    ///
    /// # Panics
    ///
    /// When the queue has no free descriptor.
    pub fn add_indirect(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let placed = self.place(buffers);
        let entries: Vec<Descriptor> = (1u16..)
            .zip(&placed)
            .map(|(next, &(addr, len, flags))| {
                let last = usize::from(next) == placed.len();
                Descriptor::new(
                    addr,
                    len,
                    if last { flags } else { flags | NEXT },
                    if last { 0 } else { next },
                )
            })
            .collect();
        let (table, len) = self.write_table(&entries);
        let head = self.queues[queue].free.pop().expect("a free descriptor");
        self.write_descriptor(queue, head, Descriptor::new(table, len, INDIRECT, 0));
        self.publish_chain(queue, vec![head], &placed)
    }

    /// Rings the doorbell if the device asked for it since the last kick. Returns whether it did.
    pub fn kick(&mut self, queue: usize) -> bool {
        // The index must be out before the device's wish is read.
        fence(Ordering::SeqCst);
        let q = &mut self.queues[queue];
        let wanted = if self.event_idx {
            let event: u16 = load(&self.memory, q.used + 4 + 8 * u64::from(q.size));
            // vring_need_event() of include/uapi/linux/virtio_ring.h
            q.avail_idx.wrapping_sub(event).wrapping_sub(1) < q.avail_idx.wrapping_sub(q.kicked_idx)
        } else {
            load(&self.memory, q.used) & 1 == 0
        };
        q.kicked_idx = q.avail_idx;
        if wanted {
            self.ring(queue);
        }
        wanted
    }

    /// Rings the doorbell, asked or not.
    pub fn ring(&mut self, queue: usize) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, u32::try_from(queue).expect("few queues"));
    }

    /// Takes the next chain off the used ring.
    ///
    /// # Panics
    ///
    /// When the device returns what it was not given.
    pub fn take_used(&mut self, queue: usize) -> Option<Used> {
        let q = &mut self.queues[queue];
        let used_idx: u16 = load(&self.memory, q.used + 2);
        if used_idx == q.last_used {
            // virtqueue_enable_cb(): interrupt me at the next one.
            store(&self.memory, q.avail + 4 + 2 * u64::from(q.size), q.last_used);
            fence(Ordering::SeqCst);
            if load(&self.memory, q.used + 2) == q.last_used {
                return None;
            }
        }
        let slot = q.used + 4 + 8 * u64::from(q.last_used % q.size);
        let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).expect("used ring");
        q.last_used = q.last_used.wrapping_add(1);
        let head = u16::try_from(id).expect("a descriptor index");
        let chain = q.submitted[usize::from(head)].take().expect("a chain the device was given");
        q.free.extend(chain.descriptors.into_iter().rev());
        let mut data = Vec::new();
        for (addr, len) in chain.writable {
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, addr).expect("buffers are in memory");
            data.extend(bytes);
        }
        assert!(len as usize <= data.len(), "{len} bytes written into {}", data.len());
        Some(Used { head, len, data })
    }

    /// Takes everything off the used ring.
    pub fn drain_used(&mut self, queue: usize) -> Vec<Used> {
        std::iter::from_fn(|| self.take_used(queue)).collect()
    }

    /// Waits for the next used chain of a device that works on another thread. The wait is for interrupts, so a
    /// device that forgets one is found out.
    ///
    /// # Panics
    ///
    /// When none comes within [`PATIENCE`].
    pub fn wait_used(&mut self, queue: usize) -> Used {
        let start = Instant::now();
        loop {
            let seen = self.line.count();
            if let Some(used) = self.take_used(queue) {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "no used buffer on queue {queue}");
            self.line.wait_for(seen + 1);
        }
    }

    /// Asks the device not to interrupt (only without EVENT_IDX), or to do so again.
    pub fn suppress_interrupts(&self, queue: usize, suppress: bool) {
        store(&self.memory, self.queues[queue].avail, u16::from(suppress));
    }

    /// Guest-physical memory for `len` bytes, filled with `0xaa`. It is reused after some 50 MiB.
    ///
    /// # Panics
    ///
    /// When `len` is more than there is.
    pub fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len).next_multiple_of(16);
        assert!(len <= MEMORY_SIZE - DATA, "{len} bytes are too many");
        if self.next_buffer + len > MEMORY_SIZE {
            self.next_buffer = DATA;
        }
        let addr = self.next_buffer;
        self.next_buffer += len;
        let filler = vec![FILLER; usize::try_from(len).expect("64-bit host")];
        self.memory.write_slice(&filler, GuestAddress(addr)).expect("buffers are in memory");
        addr
    }

    /// Puts buffers into memory: (address, length, flags) of each.
    fn place(&mut self, buffers: &[Buffer<'_>]) -> Vec<(u64, u32, u16)> {
        let mut place = |buffer: &Buffer<'_>| match *buffer {
            Buffer::Readable(bytes) => {
                let len = u32::try_from(bytes.len()).expect("less than 4 GiB");
                let addr = self.allocate(len);
                self.memory.write_slice(bytes, GuestAddress(addr)).expect("buffers are in memory");
                (addr, len, 0)
            }
            Buffer::Writable(len) => (self.allocate(len), len, WRITE),
        };
        buffers.iter().map(&mut place).collect()
    }

    fn publish_chain(&mut self, queue: usize, descriptors: Vec<u16>, placed: &[(u64, u32, u16)]) -> u16 {
        let head = descriptors[0];
        let writable = placed.iter().filter(|(.., flags)| flags & WRITE != 0);
        let writable = writable.map(|&(addr, len, _)| (GuestAddress(addr), len)).collect();
        self.queues[queue].submitted[usize::from(head)] = Some(Submitted { descriptors, writable });
        self.publish(queue, head);
        head
    }
}

fn load(memory: &GuestMemoryMmap, addr: u64) -> u16 {
    memory.load(GuestAddress(addr), Ordering::Acquire).expect("rings are in memory")
}

fn store(memory: &GuestMemoryMmap, addr: u64, value: u16) {
    memory.store(value, GuestAddress(addr), Ordering::Release).expect("rings are in memory");
}
