//! Address → device, for port I/O and for MMIO.
//!
//! A bus is filled while the machine is built and never changes while vCPUs run, so lookups take no
//! lock; each device is behind its own.

use std::sync::Arc;

use parking_lot::Mutex;

/// What a device asks of the VM after a guest's write. Devices ask, they do not reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing beyond the device itself.
    None,
    /// The guest switched the machine off (ACPI S5).
    Shutdown,
    /// The guest put the machine to sleep, its memory kept (ACPI S3).
    SuspendToRam,
    /// The guest has written its memory to a disk and switched the machine off (ACPI S4).
    SuspendToDisk,
    /// The guest asked for a reset (i8042, port 0xCF9, ACPI reset register).
    Reset,
    /// The guest told pvpanic that it has panicked; `crash_loaded` when a crash kernel takes over.
    Panicked {
        /// A crash kernel is about to run: the VM must not be stopped.
        crash_loaded: bool,
    },
}

/// A device on a bus. `offset` counts from the start of the range it was registered with; `data` has
/// 1, 2, 4 or 8 bytes.
pub trait BusDevice: Send {
    /// Fills all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`, and says what the VM should do about it.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action;
}

/// Two devices were given overlapping ranges, or an empty one.
#[derive(Debug, thiserror::Error)]
#[error("Bus range {base:#x}+{len:#x} is empty, wraps or overlaps another")]
pub struct Overlap {
    /// First address of the rejected range.
    pub base: u64,
    /// Its length.
    pub len: u64,
}

struct Entry {
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// One address space (ports, or guest-physical memory).
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`, disjoint.
    entries: Vec<Entry>,
}

impl Bus {
    /// Registers `device` for `len` addresses from `base`.
    ///
    /// # Errors
    ///
    /// [`Overlap`] when the range is empty, wraps around or meets another device's.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Overlap> {
        let end = base.checked_add(len).filter(|_| len > 0).ok_or(Overlap { base, len })?;
        let at = self.entries.partition_point(|e| e.base < base);
        let meets_left = at > 0 && self.entries[at - 1].base + self.entries[at - 1].len > base;
        let meets_right = self.entries.get(at).is_some_and(|e| e.base < end);
        if meets_left || meets_right {
            return Err(Overlap { base, len });
        }
        self.entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    /// Reads; an address nobody claims reads as all ones, as on a real bus. Returns whether a device
    /// answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address) {
            Some((entry, offset)) => {
                entry.device.lock().read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; an address nobody claims swallows the write.
    pub fn write(&self, address: u64, data: &[u8]) -> Action {
        match self.find(address) {
            Some((entry, offset)) => entry.device.lock().write(offset, data),
            None => Action::None,
        }
    }

    fn find(&self, address: u64) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = &self.entries[at];
        let offset = address - entry.base;
        (offset < entry.len).then_some((entry, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Action {
            self.0 = data[0];
            Action::Reset
        }
    }

    fn echo(v: u8) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Echo(v)))
    }

    #[test]
    fn an_access_reaches_the_device_that_owns_the_address() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        bus.insert(0x14, 4, echo(2)).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x13, &mut byte));
        assert_eq!(byte, [4]);
        assert!(bus.read(0x14, &mut byte));
        assert_eq!(byte, [2]);
        assert_eq!(bus.write(0x10, &[9]), Action::Reset);
        assert!(bus.read(0x10, &mut byte));
        assert_eq!(byte, [9]);
    }

    #[test]
    fn an_unclaimed_address_reads_as_ones_and_swallows_writes() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        let mut bytes = [0; 4];
        assert!(!bus.read(0x14, &mut bytes));
        assert_eq!(bytes, [0xff; 4]);
        assert_eq!(bus.write(0xf, &[0]), Action::None);
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, echo(1)).unwrap();
        for (base, len) in [(0x0c, 5), (0x13, 1), (0x11, 1), (0x20, 0), (u64::MAX, 2)] {
            assert!(bus.insert(base, len, echo(2)).is_err(), "{base:#x}+{len}");
        }
        bus.insert(0x0c, 4, echo(2)).unwrap();
    }
}
