//! The machine: everything the guest sees, as long as it runs. A reset drops it and builds another from the same
//! parts; what outlives it (disks with their locks and threads, sockets, the boot files) belongs to the VM.
//!
//! ```text
//!   builder ──▶ Machine { vCPU threads, buses → devices, guest memory, KVM VM }
//!      ▲          │ pause / resume / drop: always in this order
//!      │          ▼
//!      │        vCPUs stop ─▶ devices let go of guest memory ─▶ memory and VM go
//!      └──────────────── Kept { memory, clock } ◀── S3
//! ```
//!
//! # Sleeping
//!
//! In S3 a machine keeps its memory and loses everything else: so it does here. While the guest sleeps its machine
//! stands still; to wake it up, the machine is dropped as for a reset, and the next one is built around what S3 keeps
//! ([`Kept`]): vCPUs, interrupt controllers, timers and devices are as after power-on, which is what firmware would
//! make of them before it jumps to the guest's wake-up code. Nothing has to be brought back to that state register by
//! register, and nothing can be forgotten. The guest's drivers set their devices up again (Linux: `virtio_mmio`'s
//! freeze and restore, which reset the device themselves).
//!
//! Only the paravirtual clock goes on where it was. Linux numbers its log and its scheduler's time by it, and takes
//! it to be monotonic over S3; the time stamp counter begins again at 0, as on hardware.

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
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::wake;
use crate::vcpu::{VcpuCommand, VcpuError, VcpuHandle, command_all};

/// What S3 keeps of a machine.
pub struct Kept {
    /// RAM, as the guest left it.
    memory: GuestMemoryMmap,
    /// Where the guest's wake-up code is.
    vector: u32,
    /// The paravirtual clock, in nanoseconds since the guest booted.
    clock: u64,
    /// The power button was pressed.
    power_button: bool,
}

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
    memory: GuestMemoryMmap,
    /// The paravirtual clock when the vCPUs were stopped, in nanoseconds since the guest booted.
    stopped_at: Mutex<Option<u64>>,
    vm: VmFd,
}

impl Machine {
    /// Stops all vCPUs; acknowledged when it returns. The guest's clock stands still from then on: what its
    /// programs wait for, a freeze's lease for one, does not run out while they cannot run.
    ///
    /// # Errors
    ///
    /// One does not answer.
    pub fn pause_vcpus(&self) -> Result<(), VcpuError> {
        command_all(&self.vcpus, VcpuCommand::Pause)?;
        let mut stopped_at = self.stopped_at.lock();
        if stopped_at.is_none() {
            match self.vm.get_clock() {
                Ok(clock) => *stopped_at = Some(clock.clock),
                Err(error) => tracing::warn!(%error, "The guest's clock runs on while it is paused"),
            }
        }
        Ok(())
    }

    /// Lets all vCPUs run, and the guest's clock go on where it was.
    ///
    /// # Errors
    ///
    /// One does not answer.
    pub fn resume_vcpus(&self) -> Result<(), VcpuError> {
        if let Some(clock) = self.stopped_at.lock().take() {
            let clock = kvm_clock_data { clock, ..Default::default() };
            if let Err(error) = self.vm.set_clock(&clock) {
                tracing::warn!(%error, "The guest's clock has run on while it was paused");
            }
        }
        command_all(&self.vcpus, VcpuCommand::Resume)
    }

    /// Whether the guest has said where it wants to wake; otherwise no firmware could wake it.
    pub fn can_wake(&self) -> bool {
        wake::vector(&self.memory).is_some()
    }

    /// What is left of the machine when it sleeps, while its vCPUs stand still; `None` if it cannot wake.
    ///
    /// # Errors
    ///
    /// KVM does not tell its clock.
    pub fn keep(&self) -> Result<Option<Kept>, kvm_ioctls::Error> {
        let Some(vector) = wake::vector(&self.memory) else { return Ok(None) };
        let clock = match *self.stopped_at.lock() {
            Some(clock) => clock,
            None => self.vm.get_clock()?.clock,
        };
        let power_button = self.power.lock().is_power_button_pending();
        Ok(Some(Kept { memory: self.memory.clone(), vector, clock, power_button }))
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
