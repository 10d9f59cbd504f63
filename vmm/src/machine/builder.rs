//! Builds a [`Machine`], step by step: for a guest that boots, or for one that wakes.

use std::io;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice, Overlap};
use devices::irq::InterruptLine;
use devices::legacy::acpi_pm::AcpiPm;
use devices::legacy::pvpanic::Pvpanic;
use devices::legacy::reset::{KeyboardController, ResetControl};
use devices::legacy::serial::SerialPort;
use devices::virtio::blk::BlkBackend;
use devices::virtio::console::{self, Console};
use devices::virtio::device::{Interrupt, VirtioDevice};
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use devices::virtio::rng::Rng;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use parking_lot::Mutex;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::irq::IrqFd;
use super::memory::{self, MemoryError};
use super::notify::Notifier;
use super::{Doorbells, Kept, Machine, layout};
use crate::boot::acpi::VirtioMmio;
use crate::boot::{self, BootError, BootFiles, Entry};
use crate::config::VmSpec;
use crate::vcpu::{Buses, VcpuError, VcpuHandle};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A KVM call failed.
    #[error("Cannot {what} with KVM")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// KVM's words.
        source: kvm_ioctls::Error,
    },
    /// No guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU thread cannot be started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device cannot be made.
    #[error("Cannot make device {name}")]
    Device {
        /// Which one.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// More devices than interrupts.
    #[error("{count} virtio devices are too many: there are interrupts for {}", layout::VIRTIO_GSIS.len())]
    TooManyDevices {
        /// Asked for.
        count: usize,
    },
    /// The ports of the virtio-serial device are not possible.
    #[error(transparent)]
    Ports(#[from] console::SpecError),
    /// Our own address map is wrong.
    #[error(transparent)]
    Layout(#[from] Overlap),
}

/// What a machine is built from, and outlives it.
pub struct Parts<'a> {
    /// The configuration.
    pub spec: &'a VmSpec,
    /// /dev/kvm.
    pub kvm: &'a Kvm,
    /// Kernel, initrd, command line.
    pub boot: &'a BootFiles,
    /// Disks in order.
    pub disks: &'a [BlkBackend],
    /// Ports of the virtio-serial device.
    pub ports: &'a [console::PortSpec],
    /// Where vCPUs report.
    pub events: &'a Notifier,
}

/// The first instruction of a guest.
enum Begin {
    /// The kernel's.
    Boot(Entry),
    /// That of the wake-up code.
    Wake { vector: u32 },
}

/// Builds the machine; its vCPUs wait. With `kept`, the guest will wake where it fell asleep, and boot without.
///
/// # Errors
///
/// See [`MachineError`]. Nothing is left behind.
pub fn build(parts: &Parts<'_>, kept: Option<&Kept>) -> Result<Machine, MachineError> {
    let spec = parts.spec;
    let guest_memory = match kept {
        Some(kept) => kept.memory.clone(),
        None => memory::allocate(&spec.memory)?,
    };
    let vm = parts.kvm.create_vm().map_err(kvm("create a virtual machine"))?;
    // Memory first: it waits until nobody reads the VM's tables any more. Behind the interrupt controllers, which leave
    // KVM such a wait to do at its leisure (one tick of the host's clock), it would wait for theirs as well.
    memory::register(&vm, &guest_memory)?;
    create_platform(&vm)?;
    let mut hardware = Hardware::new(vm, guest_memory);

    let (console, console_handle) = Console::new(parts.ports.to_vec())?;
    let console_doorbells = hardware.add_virtio("virtio-serial", Box::new(console))?;
    let (rng, rng_handle) = Rng::new();
    let rng_doorbells = hardware.add_virtio("virtio-rng", Box::new(rng))?;
    for disk in parts.disks {
        hardware.add_virtio("virtio-blk", Box::new(disk.device()))?;
    }
    let serial = hardware.add_serial()?;
    let power = hardware.add_power_management()?;
    hardware.add_reset_and_panic_ports()?;

    let begin = match kept {
        Some(&Kept { memory: _, vector, clock, power_button }) => {
            set_clock(&hardware.vm, clock)?;
            power.lock().wake(power_button);
            Begin::Wake { vector }
        }
        None => {
            boot::acpi::write_tables(&hardware.memory, spec.cpus, &hardware.virtio)?;
            Begin::Boot(parts.boot.load(&hardware.memory, spec.memory.size)?)
        }
    };
    let (vm, memory, buses, transports) = hardware.finish();
    let vcpus = create_vcpus(parts, &vm, &memory, &buses, &begin)?;
    Ok(Machine {
        vcpus,
        transports,
        console: console_handle,
        rng: rng_handle,
        serial,
        power,
        doorbells: Doorbells { console: console_doorbells, rng: Arc::clone(&rng_doorbells[0]) },
        memory,
        vm,
        stopped_at: Mutex::new(None),
    })
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

fn device(name: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Device { name, source }
}

/// What a PC has inside KVM.
fn create_platform(vm: &VmFd) -> Result<(), MachineError> {
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or(0);
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place the identity map"))?;
    vm.set_tss_address(tss).map_err(kvm("place the TSS"))?;
    vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm("create the timer"))
}

/// The paravirtual clock goes on from `nanoseconds`.
fn set_clock(vm: &VmFd, nanoseconds: u64) -> Result<(), MachineError> {
    let clock = kvm_clock_data { clock: nanoseconds, ..Default::default() };
    vm.set_clock(&clock).map_err(kvm("set the clock"))
}

fn create_vcpus(
    parts: &Parts<'_>,
    vm: &VmFd,
    memory: &GuestMemoryMmap,
    buses: &Buses,
    begin: &Begin,
) -> Result<Vec<VcpuHandle>, MachineError> {
    let supported = parts.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("read CPUID"))?;
    let cpus = parts.spec.cpus;
    let mut vcpus = Vec::with_capacity(usize::from(cpus));
    for index in 0..cpus {
        let fd = vm.create_vcpu(u64::from(index)).map_err(kvm("create a vCPU"))?;
        let cpuid = boot::cpuid::for_vcpu(&supported, index, cpus)?;
        fd.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
        boot::cpuid::set_boot_msrs(&fd)?;
        boot::cpuid::set_lapic_lines(&fd)?;
        if index == 0 {
            match *begin {
                Begin::Boot(Entry::Linux { rip }) => boot::linux::set_registers(&fd, memory, rip)?,
                Begin::Boot(Entry::Pvh { rip }) => boot::pvh::set_registers(&fd, memory, rip)?,
                Begin::Wake { vector } => boot::wake::set_registers(&fd, vector)?,
            }
        }
        vcpus.push((index, fd));
    }
    // Threads last: everything that can fail has failed by now.
    vcpus
        .into_iter()
        .map(|(index, fd)| Ok(VcpuHandle::spawn(index, fd, buses.clone(), parts.events.clone())?))
        .collect()
}

/// The buses while they are filled.
struct Hardware {
    vm: VmFd,
    memory: GuestMemoryMmap,
    pio: Bus,
    mmio: Bus,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    virtio: Vec<VirtioMmio>,
}

impl Hardware {
    fn new(vm: VmFd, memory: GuestMemoryMmap) -> Self {
        Self { vm, memory, pio: Bus::default(), mmio: Bus::default(), transports: vec![], virtio: vec![] }
    }

    fn irq(&self, name: &'static str, gsi: u32) -> Result<Box<dyn InterruptLine>, MachineError> {
        Ok(Box::new(IrqFd::register(&self.vm, gsi).map_err(device(name))?))
    }

    /// Puts a device behind the next register window, interrupt and doorbells.
    fn add_virtio(
        &mut self,
        name: &'static str,
        virtio: Box<dyn VirtioDevice>,
    ) -> Result<Vec<Arc<EventFd>>, MachineError> {
        let index = self.virtio.len();
        let gsi = *layout::VIRTIO_GSIS.get(index).ok_or(MachineError::TooManyDevices { count: index + 1 })?;
        let base = layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE;
        let interrupt = Arc::new(Interrupt::new(self.irq(name, gsi)?));
        let transport = MmioTransport::new(virtio, self.memory.clone(), interrupt).map_err(device(name))?;
        let doorbells = transport.doorbells().to_vec();
        for (queue, doorbell) in (0_u32..).zip(&doorbells) {
            let address = IoEventAddress::Mmio(base + QUEUE_NOTIFY);
            self.vm.register_ioevent(doorbell, &address, queue).map_err(kvm("register a doorbell"))?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(
            base,
            layout::VIRTIO_MMIO_SIZE,
            Arc::clone(&transport) as Arc<Mutex<dyn BusDevice>>,
        )?;
        self.transports.push(transport);
        self.virtio.push(VirtioMmio { base, gsi });
        Ok(doorbells)
    }

    fn add_serial(&mut self) -> Result<Arc<Mutex<SerialPort>>, MachineError> {
        let line = self.irq("serial port", SerialPort::COM1_IRQ)?;
        let serial = Arc::new(Mutex::new(SerialPort::new(line).map_err(device("serial port"))?));
        self.pio.insert(
            SerialPort::COM1,
            SerialPort::LEN,
            Arc::clone(&serial) as Arc<Mutex<dyn BusDevice>>,
        )?;
        Ok(serial)
    }

    fn add_power_management(&mut self) -> Result<Arc<Mutex<AcpiPm>>, MachineError> {
        let power = Arc::new(Mutex::new(AcpiPm::new(self.irq("ACPI", layout::SCI_GSI)?)));
        self.pio.insert(
            layout::ACPI_PM_PORT,
            AcpiPm::LEN,
            Arc::clone(&power) as Arc<Mutex<dyn BusDevice>>,
        )?;
        Ok(power)
    }

    fn add_reset_and_panic_ports(&mut self) -> Result<(), MachineError> {
        let keyboard = Arc::new(Mutex::new(KeyboardController));
        self.pio.insert(KeyboardController::BASE, KeyboardController::LEN, keyboard)?;
        let reset = Arc::new(Mutex::new(ResetControl::default()));
        self.pio.insert(ResetControl::PORT, ResetControl::LEN, reset)?;
        self.pio.insert(Pvpanic::PORT, Pvpanic::LEN, Arc::new(Mutex::new(Pvpanic)))?;
        Ok(())
    }

    fn finish(self) -> (VmFd, GuestMemoryMmap, Buses, Vec<Arc<Mutex<MmioTransport>>>) {
        let buses = Buses { pio: Arc::new(self.pio), mmio: Arc::new(self.mmio) };
        (self.vm, self.memory, buses, self.transports)
    }
}
