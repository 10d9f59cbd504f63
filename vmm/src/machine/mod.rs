//! The machine: everything the guest sees, as long as it runs. A reset drops it and builds another from the same
//! parts; what outlives it (disks with their locks and threads, sockets, the boot files) belongs to the VM.
//!
//! ```text
//!   builder ──▶ Machine { vCPU threads, buses → devices, guest memory, KVM VM }
//!                 │ pause / resume / drop: always in this order
//!                 ▼
//!               vCPUs stop ─▶ devices let go of guest memory ─▶ memory and VM go
//! ```

pub mod builder;
pub mod irq;
pub mod layout;
pub mod memory;
pub mod notify;

use std::sync::Arc;

use devices::legacy::acpi_pm::AcpiPm;
use devices::legacy::serial::SerialPort;
use devices::virtio::console::ConsoleHandle;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::rng::RngHandle;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::vcpu::{VcpuCommand, VcpuError, VcpuHandle, command_all};

/// Doorbells that the control loop serves.
pub struct Doorbells {
    /// Of the virtio-serial device, by queue.
    pub console: Vec<Arc<EventFd>>,
    /// Of the entropy device.
    pub rng: Arc<EventFd>,
}

/// A built machine. Field order is drop order: vCPUs first, the VM last.
pub struct Machine {
    vcpus: Vec<VcpuHandle>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    /// virtio-serial.
    pub console: ConsoleHandle,
    /// virtio-rng.
    pub rng: RngHandle,
    /// COM1.
    pub serial: Arc<Mutex<SerialPort>>,
    /// Power button and sleep states.
    pub power: Arc<Mutex<AcpiPm>>,
    /// What the control loop listens to.
    pub doorbells: Doorbells,
    _memory: GuestMemoryMmap,
    _vm: VmFd,
}

impl Machine {
    /// Stops all vCPUs; acknowledged when it returns.
    ///
    /// # Errors
    ///
    /// One does not answer.
    pub fn pause_vcpus(&self) -> Result<(), VcpuError> {
        command_all(&self.vcpus, VcpuCommand::Pause)
    }

    /// Lets all vCPUs run.
    ///
    /// # Errors
    ///
    /// One does not answer.
    pub fn resume_vcpus(&self) -> Result<(), VcpuError> {
        command_all(&self.vcpus, VcpuCommand::Resume)
    }

    /// Host thread IDs by vCPU.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.vcpus.iter().map(VcpuHandle::thread_id).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus.clear();
        for transport in &self.transports {
            if let Err(error) = transport.lock().reset() {
                tracing::error!(%error, "A device does not let go of guest memory");
            }
        }
    }
}
