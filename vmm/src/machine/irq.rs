//! Interrupt lines as irqfds: a device writes an eventfd, KVM injects the interrupt.

use std::io;

use devices::irq::InterruptLine;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// One IOAPIC pin, edge-triggered.
pub struct IrqFd(EventFd);

impl IrqFd {
    /// Connects a new eventfd to `gsi`.
    ///
    /// # Errors
    ///
    /// No descriptor left, or KVM refuses.
    pub fn register(vm: &VmFd, gsi: u32) -> io::Result<Self> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&fd, gsi).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Self(fd))
    }
}

impl InterruptLine for IrqFd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
