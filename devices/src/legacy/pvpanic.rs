//! pvpanic: the guest's kernel tells that it has panicked.
//!
//! One byte-wide register (QEMU `docs/specs/pvpanic.rst`). Reading gives the events the device understands, writing
//! sends some. Linux's `pvpanic-mmio` driver finds it by the ACPI ID `QEMU0001`, whose resource may be a port or a
//! memory address (`drivers/misc/pvpanic/pvpanic-mmio.c`), and writes one bit in its panic notifier: which one
//! depends on whether a crash kernel is loaded.

use crate::bus::{Action, BusDevice};

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// The device.
#[derive(Debug, Default)]
pub struct Pvpanic;

impl Pvpanic {
    /// The customary port.
    pub const PORT: u64 = 0x505;
    /// Number of ports, or of bytes of memory.
    pub const LEN: u64 = 1;
    /// The hardware ID to be put into the DSDT.
    pub const ACPI_HID: &str = "QEMU0001";
}

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        match data {
            [event, ..] if event & PANICKED != 0 => Action::Panicked { crash_loaded: false },
            [event, ..] if event & CRASH_LOADED != 0 => Action::Panicked { crash_loaded: true },
            _ => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_learns_the_events_and_sends_them() {
        let mut pvpanic = Pvpanic;
        let mut capability = [0];
        pvpanic.read(0, &mut capability);
        assert_eq!(capability, [3]);
        assert_eq!(pvpanic.write(0, &[1]), Action::Panicked { crash_loaded: false });
        assert_eq!(pvpanic.write(0, &[2]), Action::Panicked { crash_loaded: true });
        assert_eq!(pvpanic.write(0, &[3]), Action::Panicked { crash_loaded: false });
        for nothing in [0, 4, 0xfc] {
            assert_eq!(pvpanic.write(0, &[nothing]), Action::None);
        }
    }
}
