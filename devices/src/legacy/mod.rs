//! The few devices of the PC that a guest without PCI and firmware still wants.
//!
//! | device | where | what for |
//! |---|---|---|
//! | [`serial::SerialPort`] | ports 0x3f8, interrupt 4 | earliest console |
//! | [`reset::KeyboardController`] | ports 0x60 | reset, and a keyboard probe that finds nothing quickly |
//! | [`reset::ResetControl`] | port 0xcf9 | reset, also as the ACPI reset register |
//! | [`acpi_pm::AcpiPm`] | anywhere; the FADT says where | power off, power button, timer |
//! | [`pvpanic::Pvpanic`] | port 0x505, `QEMU0001` in the DSDT | the guest tells that it has panicked |
//!
//! The VMM chooses the addresses; the constants are the customary ones.

pub mod acpi_pm;
pub mod pvpanic;
pub mod reset;
pub mod serial;
