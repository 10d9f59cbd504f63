//! What a virtio device is to the transport, and what the transport hands to a device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::irq::InterruptLine;

/// A device's way to tell its driver something: shared by the transport (which shows the registers)
/// and whoever serves the queues, on any thread, without a lock.
pub struct Interrupt {
    line: Box<dyn InterruptLine>,
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    /// Violations since the machine was built; only for the log.
    violations: AtomicU32,
}

impl Interrupt {
    /// A quiet device on `line`.
    pub fn new(line: Box<dyn InterruptLine>) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            violations: AtomicU32::new(0),
        }
    }

    /// Buffers were put on a used ring. Call only when the driver asked to be told
    /// (`Queue::needs_notification`).
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration space has changed: the generation goes up, the driver is told.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The driver broke the rules (virtio 1.2, section 2.1.2): DEVICE_NEEDS_RESET is set until it
    /// resets the device, which serves no queue until then. Idempotent.
    pub fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// [`Self::needs_reset`], with the reason in the log. A driver that goes on and on cannot flood it.
    pub fn violated(&self, reason: &(dyn std::error::Error + 'static)) {
        let count = self.violations.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            tracing::warn!(
                error = reason,
                count,
                "A virtio driver broke the rules: the device needs a reset"
            );
        }
        self.needs_reset();
    }

    /// Whether [`Self::needs_reset`] was called since the last reset.
    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The InterruptACK register.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// The ConfigGeneration register.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// The driver has reset the device: pending causes are gone, the generation goes on.
    pub fn reset(&self) {
        let Self { line: _, status, config_generation: _, needs_reset, violations: _ } = self;
        status.store(0, Ordering::Release);
        needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.line.trigger() {
            tracing::warn!(%error, "Cannot raise a virtio interrupt");
        }
    }
}

/// A queue the driver has set up, with the doorbell it rings. The transport has checked that the
/// rings are enabled, aligned and inside guest memory.
pub struct ActiveQueue {
    /// The split virtqueue.
    pub queue: Queue,
    /// Readable when the driver has rung. Created once with the transport, so that the VMM can register it as an
    /// ioeventfd and an event loop can watch it for the life of the machine.
    pub doorbell: Arc<EventFd>,
}

/// Everything a device needs to start working: handed over at DRIVER_OK.
pub struct Activation {
    /// Guest memory; clones share the mappings.
    pub memory: GuestMemoryMmap,
    /// The features both sides agreed on.
    pub features: u64,
    /// One entry per queue index; `None` for a queue the driver left disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// To tell the driver.
    pub interrupt: Arc<Interrupt>,
}

impl Activation {
    /// Whether feature bit `bit` was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// A device behind the transport.
///
/// The transport enforces the status and feature protocol: `activate` is called once between two
/// resets, with features that are a subset of [`Self::device_features`]. The device validates queue
/// contents, which the transport never looks at.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.2, section 5).
    fn device_id(&self) -> u32;

    /// Feature bits offered, without the transport's own (VERSION_1 and the ring features EVENT_IDX and INDIRECT_DESC
    /// are added by the transport).
    fn device_features(&self) -> u64;

    /// The largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the device (DRIVER_OK).
    ///
    /// # Errors
    ///
    /// An error turns into DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Stops the device and forgets everything the driver has set up. When it returns `Ok`, no thread touches
    /// the guest memory or the queues of the last activation any more. Called on an inactive device too.
    ///
    /// # Errors
    ///
    /// The device could not be stopped in bounded time; the transport keeps DEVICE_NEEDS_RESET.
    fn reset(&mut self) -> io::Result<()>;
}
