//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//!   status:  0 ──ACKNOWLEDGE──▶ ──DRIVER──▶ ──FEATURES_OK──▶ ──DRIVER_OK──▶ live
//!            ▲                  features     queues are        (device activated, doorbells rung once)
//!            │                  are written  set up
//!            └────────── write 0: device.reset(), everything forgotten ◀── DEVICE_NEEDS_RESET
//! ```
//!
//! The peer is Linux's `drivers/virtio/virtio_mmio.c`. It writes 0 to the status register and goes on without
//! reading it back, so a reset is complete when the write returns; and it writes 0 to QueueReady of queues that
//! a reset has disabled before, which must do nothing.
//!
//! What a driver may not do, it does in vain (registers written in the wrong state keep their value) unless the
//! device could not go on safely: then DEVICE_NEEDS_RESET is set (section 2.1.2).
//!
//! Ring features are the transport's: it offers VERSION_1, EVENT_IDX and INDIRECT_DESC for every device.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_SHM_SEL,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use super::queue::ring;
use crate::bus::{Action, BusDevice};

/// Size of a device's register window in bytes.
pub const WINDOW: u64 = 0x1000;
/// Offset of the QueueNotify register: where the doorbells are to be registered as ioeventfds, 4 bytes wide, the
/// queue's index as datamatch.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "TARN"; nobody registers vendor IDs for virtio-mmio.
const VENDOR: u32 = 0x4e52_4154;
/// What the transport itself offers.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How a driver can break the transport's rules so badly that the device needs a reset.
#[derive(Debug, thiserror::Error)]
enum Violation {
    #[error("Status {from:#x} cannot be followed by {to:#x}")]
    Status { from: u32, to: u32 },
    #[error("Queue {index} has a bad size or rings outside guest memory")]
    Queue { index: usize },
    #[error("Queue {index} was reconfigured while in use")]
    LiveQueue { index: usize },
    #[error("Device cannot be activated")]
    Activate(#[source] io::Error),
    #[error("Device cannot be reset")]
    Reset(#[source] io::Error),
}

/// A queue as the driver describes it, until it is handed to the device.
#[derive(Debug, Default, Clone)]
struct QueueSetup {
    size: u32,
    desc: u64,
    avail: u64,
    used: u64,
    /// Validated; nothing above changes any more until the reset.
    ready: bool,
}

/// One virtio device in its register window.
pub struct MmioTransport {
    // Fixed.
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    doorbells: Vec<Arc<EventFd>>,
    offered: u64,

    // Volatile: all of it goes with a reset.
    /// What the driver has written, without DEVICE_NEEDS_RESET, which lives in `interrupt`.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

impl MmioTransport {
    /// Puts `device` behind registers, and creates its doorbells.
    ///
    /// # Errors
    ///
    /// No eventfd can be created, or the device asks for a queue size that is no power of two up to 32768.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Self> {
        let sizes = device.queue_max_sizes();
        for &size in sizes {
            Queue::new(size).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        }
        let doorbells = sizes
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let queues = vec![QueueSetup::default(); doorbells.len()];
        Ok(Self {
            offered: device.device_features() | TRANSPORT_FEATURES,
            device,
            memory,
            interrupt,
            doorbells,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
        })
    }

    /// The doorbell of each queue, for the life of the transport: to be registered as ioeventfds at
    /// [`QUEUE_NOTIFY`] and watched by whoever serves the queues. A doorbell may also be readable when nothing is
    /// there: spurious wake-ups are harmless.
    pub fn doorbells(&self) -> &[Arc<EventFd>] {
        &self.doorbells
    }

    /// Resets the device, as a driver does by writing 0 to the status register: also before a machine is torn
    /// down, so that nobody touches guest memory any more.
    ///
    /// # Errors
    ///
    /// The device could not be stopped in bounded time. It keeps DEVICE_NEEDS_RESET, which refuses every driver
    /// until a later reset succeeds.
    pub fn reset(&mut self) -> io::Result<()> {
        let Self {
            device,
            memory: _,
            interrupt,
            doorbells: _,
            offered: _,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        *status = 0;
        *device_features_sel = 0;
        *driver_features_sel = 0;
        *driver_features = 0;
        *queue_sel = 0;
        queues.fill(QueueSetup::default());
        device.reset().inspect_err(|_| interrupt.needs_reset())?;
        interrupt.reset();
        Ok(())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.selected().map(|index| &self.queues[index]);
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.selected().map_or(0, |index| u32::from(self.device.queue_max_sizes()[index]))
            }
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS if self.interrupt.is_reset_needed() => self.status | NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            // "If no region has this ID, reading returns -1" (section 4.2.2): there are no shared memory regions.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => {
                tracing::debug!(offset, "Read of a write-only or reserved virtio-mmio register");
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Result<(), Violation> {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM => self.configure(|queue| queue.size = value)?,
            VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value)?,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(doorbell) = self.doorbells.get(value as usize) {
                    ring(doorbell);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value)?,
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.configure(|queue| set_low(&mut queue.desc, value))?,
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.configure(|queue| set_high(&mut queue.desc, value))?,
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.configure(|queue| set_low(&mut queue.avail, value))?,
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.configure(|queue| set_high(&mut queue.avail, value))?,
            VIRTIO_MMIO_QUEUE_USED_LOW => self.configure(|queue| set_low(&mut queue.used, value))?,
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.configure(|queue| set_high(&mut queue.used, value))?,
            VIRTIO_MMIO_SHM_SEL => {}
            _ => tracing::debug!(offset, "Write to a read-only or reserved virtio-mmio register"),
        }
        Ok(())
    }

    /// Index of the selected queue, if there is such a queue.
    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok().filter(|&index| index < self.queues.len())
    }

    fn write_features(&mut self, value: u32) {
        if self.status & DRIVER == 0 || self.status & FEATURES_OK != 0 {
            tracing::debug!(status = self.status, "Driver features written outside of negotiation");
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // Bits 64 and up: none is offered, and only writing some is wrong, which FEATURES_OK cannot see here.
            _ => {}
        }
    }

    /// Changes the selected queue, if this is the time for it: features are agreed on, the queue is not in use.
    fn configure(&mut self, change: impl FnOnce(&mut QueueSetup)) -> Result<(), Violation> {
        let Some(index) = self.selected() else { return Ok(()) };
        if self.status & DRIVER_OK != 0 {
            return Err(Violation::LiveQueue { index });
        }
        let queue = &mut self.queues[index];
        if self.status & FEATURES_OK == 0 || queue.ready {
            tracing::debug!(index, status = self.status, "Queue written at the wrong time");
            return Ok(());
        }
        change(queue);
        Ok(())
    }

    fn write_queue_ready(&mut self, value: u32) -> Result<(), Violation> {
        let Some(index) = self.selected() else { return Ok(()) };
        if value & 1 == 0 {
            if !self.queues[index].ready {
                return Ok(());
            }
            if self.status & DRIVER_OK != 0 {
                return Err(Violation::LiveQueue { index });
            }
            self.queues[index].ready = false;
            return Ok(());
        }
        let ready = self.build_queue(index).is_some();
        self.configure(|queue| queue.ready = ready)?;
        if ready { Ok(()) } else { Err(Violation::Queue { index }) }
    }

    /// The queue as the device will use it, or `None` when the driver's description is not valid: the size is no
    /// power of two up to the maximum, or a ring is misaligned or not all in guest memory.
    fn build_queue(&self, index: usize) -> Option<Queue> {
        let QueueSetup { size, desc, avail, used, ready: _ } = self.queues[index];
        let mut queue = Queue::new(self.device.queue_max_sizes()[index]).ok()?;
        queue.try_set_size(u16::try_from(size).ok()?).ok()?;
        queue.try_set_desc_table_address(GuestAddress(desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(avail)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(used)).ok()?;
        queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(true);
        // Section 2.7. `Queue::is_valid` checks the same, and lets the guest fill the log with complaints.
        let fits = |addr, len| self.memory.check_range(GuestAddress(addr), len);
        let entries = usize::from(queue.size());
        // `virtio-queue` takes an available ring at address 0 for a queue that was reset.
        let valid = avail != 0
            && fits(desc, 16 * entries)
            && fits(avail, 6 + 2 * entries)
            && fits(used, 6 + 8 * entries);
        valid.then_some(queue)
    }

    fn write_status(&mut self, value: u32) -> Result<(), Violation> {
        if value == 0 {
            return self.reset().map_err(Violation::Reset);
        }
        // The driver writes back what it has read, and does not own this bit.
        let to = value & !NEEDS_RESET;
        let wrong = Violation::Status { from: self.status, to };
        if self.status & !to != 0 {
            return Err(wrong);
        }
        self.status |= to & (ACKNOWLEDGE | FAILED);
        let added = to & !self.status;
        for (bit, before) in [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)] {
            if added & bit == 0 {
                continue;
            }
            if self.status & before == 0 {
                return Err(wrong);
            }
            match bit {
                FEATURES_OK if !self.features_are_acceptable() => {}
                DRIVER_OK => self.activate()?,
                _ => self.status |= bit,
            }
        }
        Ok(())
    }

    fn features_are_acceptable(&self) -> bool {
        let acceptable = self.driver_features & !self.offered == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
            && !self.interrupt.is_reset_needed();
        if !acceptable {
            tracing::debug!(
                offered = format_args!("{:#x}", self.offered),
                accepted = format_args!("{:#x}", self.driver_features),
                "Feature negotiation refused"
            );
        }
        acceptable
    }

    /// DRIVER_OK: hands the queues to the device. A device that needs a reset stays as it is.
    fn activate(&mut self) -> Result<(), Violation> {
        if self.interrupt.is_reset_needed() {
            return Ok(());
        }
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, doorbell) in self.doorbells.iter().enumerate() {
            let queue = match self.queues[index].ready {
                true => Some(self.build_queue(index).ok_or(Violation::Queue { index })?),
                false => None,
            };
            queues.push(queue.map(|queue| ActiveQueue { queue, doorbell: Arc::clone(doorbell) }));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
        };
        self.status |= DRIVER_OK;
        self.device.activate(activation).map_err(Violation::Activate)?;
        // Buffers may have been made available, and the doorbell rung in vain, before there was anyone to look.
        let ready = self.queues.iter().zip(&self.doorbells).filter(|(queue, _)| queue.ready);
        ready.for_each(|(_, doorbell)| ring(doorbell));
        Ok(())
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        } else {
            tracing::debug!(offset, "Virtio-mmio register not read as 4 aligned bytes");
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let Some(offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.device.write_config(offset, data);
        } else if let Ok(&data) = <&[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            if let Err(violation) = self.write_register(offset, u32::from_le_bytes(data)) {
                self.interrupt.violated(&violation);
            }
        } else {
            tracing::debug!(offset, "Virtio-mmio register not written as 4 aligned bytes");
        }
        Action::None
    }
}

/// The 32 bits that a selector register chooses; there are none beyond the second half.
fn half(value: u64, selector: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match selector {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !u64::from(u32::MAX) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & u64::from(u32::MAX) | u64::from(high) << 32;
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_LOW;

    use super::*;
    use crate::testing::{Buffer, FakeDriver, MEMORY_SIZE, Random, WILD_ADDRESS};

    const SIZES: [u16; 2] = [64, 8];
    const OWN_FEATURE: u64 = 1 << 5;

    #[derive(Default)]
    struct Log {
        activation: Option<Activation>,
        activations: u32,
        resets: u32,
        config: (u64, Vec<u8>),
        refuse_activation: bool,
        refuse_reset: bool,
    }

    #[derive(Clone, Default)]
    struct Probe(Arc<Mutex<Log>>);

    impl VirtioDevice for Probe {
        fn device_id(&self) -> u32 {
            42
        }
        fn device_features(&self) -> u64 {
            OWN_FEATURE
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &SIZES
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            for (at, byte) in (offset..).zip(data) {
                *byte = u8::try_from(at % 256).unwrap();
            }
        }
        fn write_config(&mut self, offset: u64, data: &[u8]) {
            self.0.lock().config = (offset, data.to_vec());
        }
        fn activate(&mut self, activation: Activation) -> io::Result<()> {
            let mut log = self.0.lock();
            log.activations += 1;
            log.activation = Some(activation);
            if log.refuse_activation { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        }
        fn reset(&mut self) -> io::Result<()> {
            let mut log = self.0.lock();
            log.resets += 1;
            log.activation = None;
            if log.refuse_reset { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        }
    }

    fn plug() -> (FakeDriver, Probe) {
        let probe = Probe::default();
        (FakeDriver::new(Box::new(probe.clone())), probe)
    }

    fn started() -> (FakeDriver, Probe) {
        let (mut driver, probe) = plug();
        driver.start(u64::MAX);
        (driver, probe)
    }

    #[test]
    fn a_driver_that_probes_like_linux_gets_a_live_device() {
        let (mut driver, probe) = plug();
        assert_eq!(driver.start(u64::MAX), OWN_FEATURE | TRANSPORT_FEATURES);
        let log = probe.0.lock();
        let activation = log.activation.as_ref().unwrap();
        assert_eq!((log.activations, log.resets), (1, 1));
        assert!(activation.has(VIRTIO_F_VERSION_1) && activation.has(5) && !activation.has(6));
        let sizes: Vec<_> = activation.queues.iter().map(|q| q.as_ref().unwrap().queue.size()).collect();
        assert_eq!(sizes, SIZES);
        assert!(activation.queues.iter().flatten().all(|q| q.queue.event_idx_enabled()));
    }

    #[test]
    fn a_queue_left_disabled_is_not_handed_over_and_features_may_be_declined() {
        let (mut driver, probe) = plug();
        driver.negotiate(1 << VIRTIO_F_VERSION_1);
        driver.set_up_queue(0, 16);
        driver.add_status(DRIVER_OK);
        let log = probe.0.lock();
        let activation = log.activation.as_ref().unwrap();
        assert_eq!(activation.features, 1 << VIRTIO_F_VERSION_1);
        assert_eq!(activation.queues[0].as_ref().unwrap().queue.size(), 16);
        assert!(!activation.queues[0].as_ref().unwrap().queue.event_idx_enabled());
        assert!(activation.queues[1].is_none());
    }

    #[test]
    fn the_identity_registers_say_what_the_specification_says() {
        let (mut driver, _) = plug();
        assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 42);
        assert_eq!(driver.read(VIRTIO_MMIO_VENDOR_ID).to_le_bytes(), *b"TARN");
        for register in (VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH).step_by(4) {
            assert_eq!(driver.read(register), u32::MAX);
        }
        driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
        assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 2);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn registers_answer_only_to_four_aligned_bytes_and_the_configuration_space_to_any_width() {
        let (mut driver, probe) = plug();
        let transport = driver.transport();
        for (offset, width) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x6f, 4), (0xfe, 4)] {
            let mut data = vec![0x55; width];
            transport.read(offset, &mut data);
            assert_eq!(data, vec![0; width], "{offset:#x} in {width} bytes");
        }
        transport.write(u64::from(VIRTIO_MMIO_STATUS), &[1]);
        transport.write(u64::from(VIRTIO_MMIO_STATUS), &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.config::<1>(3), [3]);
        assert_eq!(driver.config::<8>(8), [8, 9, 10, 11, 12, 13, 14, 15]);
        driver.transport().write(0x102, &[7, 8]);
        assert_eq!(probe.0.lock().config, (2, vec![7, 8]));
    }

    #[test]
    fn every_offset_of_the_window_takes_every_access() {
        let (mut driver, _) = plug();
        for offset in 0..WINDOW {
            for width in [1, 2, 4, 8] {
                driver.transport().read(offset, &mut [0; 8][..width]);
                driver.transport().write(offset, &[0xff; 8][..width]);
            }
        }
    }

    #[test]
    fn random_register_traffic_never_panics_and_a_reset_always_helps() {
        let mut random = Random::new(7);
        for _ in 0..500 {
            let (mut driver, _) = plug();
            for _ in 0..random.below(200) {
                let register = u32::from(random.below(0x40)) * 4;
                let wild = random.bits().to_le_bytes();
                let wild = u32::from_le_bytes([wild[0], wild[1], wild[2], wild[3]]);
                let sane = [0, 1, 2, 3, 7, 8, 11, 15, 64, 0x10_0000, 0x10_8000, 0x10_a000, u32::MAX];
                let value = if random.below(8) == 0 { wild } else { random.pick(&sane) };
                driver.write(register, value);
                driver.read(register);
            }
            driver.start(u64::MAX);
        }
    }

    #[test]
    fn features_that_were_not_offered_or_lack_version_1_are_refused() {
        for features in [0, OWN_FEATURE, TRANSPORT_FEATURES | 1 << 6, 1 << VIRTIO_F_VERSION_1 | 1 << 63] {
            let (mut driver, _) = plug();
            driver.add_status(ACKNOWLEDGE);
            driver.add_status(DRIVER);
            driver.write_features(features);
            driver.add_status(FEATURES_OK);
            assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
            // It may think again.
            driver.write_features(1 << VIRTIO_F_VERSION_1);
            driver.add_status(FEATURES_OK);
            assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        }
    }

    #[test]
    fn features_are_fixed_outside_of_negotiation() {
        let (mut driver, probe) = plug();
        driver.write_features(OWN_FEATURE);
        driver.negotiate(1 << VIRTIO_F_VERSION_1);
        driver.write_features(OWN_FEATURE | 1 << VIRTIO_F_VERSION_1);
        driver.add_status(DRIVER_OK);
        assert_eq!(probe.0.lock().activation.as_ref().unwrap().features, 1 << VIRTIO_F_VERSION_1);
    }

    #[test]
    fn a_status_out_of_order_needs_a_reset() {
        let steps: [&[u32]; 5] = [
            &[DRIVER],
            &[ACKNOWLEDGE, ACKNOWLEDGE | FEATURES_OK],
            &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | DRIVER_OK],
            &[ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK],
            &[ACKNOWLEDGE | DRIVER, ACKNOWLEDGE],
        ];
        for steps in steps {
            let (mut driver, probe) = plug();
            steps.iter().for_each(|&status| driver.write(VIRTIO_MMIO_STATUS, status));
            assert!(driver.needs_reset(), "{steps:?}");
            assert_eq!(probe.0.lock().activations, 0);
            driver.reset();
            assert_eq!(driver.status(), 0);
            driver.start(u64::MAX);
        }
    }

    #[test]
    fn a_driver_that_gives_up_is_left_in_peace() {
        let (mut driver, _) = plug();
        driver.add_status(FAILED);
        assert_eq!(driver.status(), FAILED);
        driver.start(u64::MAX);
    }

    #[test]
    fn a_queue_with_a_bad_size_or_bad_rings_is_refused() {
        let good = [0x10_0000, 0x10_8000, 0x10_a000];
        let cases = [
            (0, good),
            (3, good),
            (128, good),
            (0x1_0040, good),
            (u32::MAX, good),
            (64, [good[0] + 8, good[1], good[2]]),
            (64, [good[0], good[1] + 1, good[2]]),
            (64, [good[0], good[1], good[2] + 2]),
            (64, [WILD_ADDRESS, good[1], good[2]]),
            (64, [good[0], WILD_ADDRESS, good[2]]),
            (64, [good[0], good[1], WILD_ADDRESS]),
            (64, [good[0], 0, good[2]]),
            (64, [MEMORY_SIZE - 16, good[1], good[2]]),
            (64, [good[0], MEMORY_SIZE - 2, good[2]]),
            (64, [good[0], good[1], MEMORY_SIZE - 4]),
            (64, [MEMORY_SIZE - 16 * 63, good[1], good[2]]),
            (64, [good[0], MEMORY_SIZE - 4 - 2 * 64, good[2]]),
            (64, [good[0], good[1], MEMORY_SIZE - 4 - 8 * 64]),
            (64, [u64::MAX - 15, good[1], good[2]]),
            (64, [good[0], u64::MAX - 1, good[2]]),
            (64, [good[0], good[1], u64::MAX - 3]),
        ];
        for (size, rings) in cases {
            let (mut driver, _) = plug();
            driver.negotiate(u64::MAX);
            driver.write(VIRTIO_MMIO_QUEUE_NUM, size);
            driver.write_ring_addresses(rings);
            driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0, "{size} {rings:x?}");
            assert!(driver.needs_reset(), "{size} {rings:x?}");
        }
    }

    #[test]
    fn rings_may_end_where_memory_ends() {
        let ends = [MEMORY_SIZE - 16 * 64, MEMORY_SIZE - 6 - 2 * 64, MEMORY_SIZE - 8 - 8 * 64];
        for at in 0..3 {
            let (mut driver, _) = plug();
            driver.negotiate(u64::MAX);
            let mut rings = [0x10_0000, 0x10_8000, 0x10_a000];
            rings[at] = ends[at];
            driver.write(VIRTIO_MMIO_QUEUE_NUM, 64);
            driver.write_ring_addresses(rings);
            driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1, "{rings:x?}");
        }
    }

    #[test]
    fn a_device_that_needs_a_reset_is_not_activated() {
        let (mut driver, probe) = plug();
        driver.negotiate(u64::MAX);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert!(driver.needs_reset());
        driver.add_status(DRIVER_OK);
        assert_eq!(driver.status() & DRIVER_OK, 0);
        assert_eq!(probe.0.lock().activations, 0);
    }

    #[test]
    fn queues_wait_for_the_features_and_are_frozen_once_ready() {
        let (mut driver, probe) = plug();
        driver.add_status(ACKNOWLEDGE);
        driver.write(VIRTIO_MMIO_QUEUE_NUM, 8);
        driver.write_ring_addresses([0x10_0000, 0x10_8000, 0x10_a000]);
        driver.add_status(DRIVER);
        driver.write_features(TRANSPORT_FEATURES);
        driver.add_status(FEATURES_OK);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert!(driver.needs_reset(), "it has no size and no rings yet");
        driver.negotiate(u64::MAX);
        driver.set_up_queue(0, 64);
        driver.write(VIRTIO_MMIO_QUEUE_NUM, 8);
        driver.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0);
        driver.add_status(DRIVER_OK);
        let log = probe.0.lock();
        let queue = &log.activation.as_ref().unwrap().queues[0].as_ref().unwrap().queue;
        assert_eq!((queue.size(), queue.desc_table()), (64, 0x10_0000));
    }

    #[test]
    fn a_queue_can_be_taken_back_before_the_device_is_live_but_not_after() {
        let (mut driver, probe) = plug();
        driver.negotiate(u64::MAX);
        driver.set_up_queues();
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        driver.add_status(DRIVER_OK);
        assert!(probe.0.lock().activation.as_ref().unwrap().queues[0].is_none());
        assert!(!driver.needs_reset());
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
        assert!(driver.needs_reset());
    }

    #[test]
    fn a_reset_forgets_everything_and_the_device_can_be_probed_again() {
        let (mut driver, probe) = started();
        driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
        driver.reset();
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64, "queue 0 is selected");
        driver.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        driver.add_status(FEATURES_OK);
        assert_eq!(driver.status() & FEATURES_OK, 0, "the features of the last driver do not count");
        driver.reset();
        for queue in 0..2 {
            driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
            assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
            // vm_del_vq() does this after every reset.
            driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        }
        assert_eq!((driver.status(), driver.acknowledge()), (0, 0));
        driver.start(u64::MAX);
        assert_eq!(probe.0.lock().activations, 2);
    }

    #[test]
    fn a_device_that_will_not_stop_refuses_every_driver_until_it_does() {
        let (mut driver, probe) = started();
        probe.0.lock().refuse_reset = true;
        driver.reset();
        assert_eq!(driver.status(), NEEDS_RESET);
        assert!(driver.transport().reset().is_err());
        driver.add_status(ACKNOWLEDGE);
        driver.add_status(DRIVER);
        driver.write_features(TRANSPORT_FEATURES);
        driver.add_status(FEATURES_OK);
        assert_eq!(driver.status(), NEEDS_RESET | ACKNOWLEDGE | DRIVER);
        probe.0.lock().refuse_reset = false;
        driver.start(u64::MAX);
    }

    #[test]
    fn a_device_that_cannot_be_activated_needs_a_reset() {
        let (mut driver, probe) = plug();
        probe.0.lock().refuse_activation = true;
        driver.negotiate(u64::MAX);
        driver.add_status(DRIVER_OK);
        assert!(driver.needs_reset());
        assert_eq!(driver.line().count(), 1);
        assert_eq!(driver.acknowledge(), 2);
    }

    #[test]
    fn a_doorbell_is_rung_by_the_register_and_once_by_the_activation() {
        let (mut driver, _) = started();
        assert!(driver.take_doorbell(0) && driver.take_doorbell(1));
        driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        assert!(!driver.take_doorbell(0) && driver.take_doorbell(1));
        for nonsense in [2, u32::MAX] {
            driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, nonsense);
        }
        assert!(!driver.take_doorbell(0) && !driver.take_doorbell(1));
        assert!(!driver.needs_reset());
    }

    #[test]
    fn interrupt_status_and_configuration_generation_are_shown_until_acknowledged() {
        let (mut driver, probe) = started();
        let interrupt = Arc::clone(&probe.0.lock().activation.as_ref().unwrap().interrupt);
        interrupt.used_buffers();
        let before = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
        interrupt.config_changed();
        assert_ne!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
        assert_eq!(driver.line().count(), 2);
        driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        assert_eq!(driver.acknowledge(), 2);
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }

    #[test]
    fn needs_reset_is_told_once_and_survives_the_driver_writing_it_back() {
        let (mut driver, probe) = started();
        let interrupt = Arc::clone(&probe.0.lock().activation.as_ref().unwrap().interrupt);
        interrupt.needs_reset();
        interrupt.needs_reset();
        assert_eq!(driver.line().count(), 1);
        driver.add_status(FAILED);
        assert!(driver.needs_reset());
        driver.start(u64::MAX);
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_device_with_an_impossible_queue_size_is_not_built() {
        struct Odd;
        impl VirtioDevice for Odd {
            fn device_id(&self) -> u32 {
                1
            }
            fn device_features(&self) -> u64 {
                0
            }
            fn queue_max_sizes(&self) -> &[u16] {
                &[12]
            }
            fn read_config(&self, _: u64, _: &mut [u8]) {}
            fn activate(&mut self, _: Activation) -> io::Result<()> {
                Ok(())
            }
            fn reset(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (driver, probe) = plug();
        let interrupt = Arc::new(Interrupt::new(Box::new(driver.line().clone())));
        assert!(MmioTransport::new(Box::new(Odd), driver.memory().clone(), Arc::clone(&interrupt)).is_err());
        assert!(MmioTransport::new(Box::new(probe), driver.memory().clone(), interrupt).is_ok());
    }

    #[test]
    fn buffers_made_available_before_the_device_is_live_ring_at_activation() {
        let (mut driver, _) = plug();
        driver.negotiate(u64::MAX);
        driver.set_up_queues();
        driver.send(0, &[Buffer::Writable(8)]);
        assert!(driver.take_doorbell(0), "rung, and taken by nobody who could look");
        driver.add_status(DRIVER_OK);
        assert!(driver.take_doorbell(0));
    }
}
