//! Where everything is: guest-physical addresses, ports and interrupt numbers.
//!
//! ```text
//!   0x0000_0000  RAM: real-mode area, boot structures (see boot), EBDA end at 640 KiB
//!   0x000a_0000  legacy hole; ACPI tables at 0x000e_0000 (RAM behind it, told as ACPI data)
//!   0x0010_0000  RAM, the kernel … up to 3 GiB
//!   0xc000_0000  gap: virtio-mmio at 0xd000_0000, IOAPIC 0xfec0_0000, LAPIC 0xfee0_0000, KVM's TSS
//!   0x1_0000_0000  the rest of RAM
//! ```

use vm_memory::GuestAddress;

/// Size of a page.
pub const PAGE_SIZE: u64 = 4096;

/// First address of the gap below 4 GiB: RAM never reaches beyond it.
pub const GAP_START: u64 = 0xc000_0000;
/// First address behind the gap.
pub const GAP_END: u64 = 1 << 32;

/// Initial GDT.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Initial (empty) IDT.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// PVH start info, then its module list and memory map.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// PVH module list.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// PVH memory map.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6100);
/// The Linux "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Initial stack, growing down; one page.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Initial page tables: PML4, PDPT, then four page directories for 4 GiB.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line, with its NUL. A bzImage may allow less.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of the low RAM that is told to the guest.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first: the area that a BIOS-era guest scans too.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// The FACS, right behind the RSDP: the one table that the guest writes and the machine reads.
pub const FACS: GuestAddress = GuestAddress(0xe_0040);
/// End of the ACPI area.
pub const ACPI_END: u64 = 0x10_0000;
/// The kernel, and the first address it may be loaded to.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// First virtio-mmio register window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of one window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// IOAPIC registers (KVM's own).
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers (KVM's own).
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel hosts, and one for its identity map; inside the gap, never told to the guest.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// See [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// ACPI's system control interrupt.
pub const SCI_GSI: u32 = 9;
/// Fixed ACPI hardware ([`devices::legacy::acpi_pm::AcpiPm`]); the other legacy devices know their own ports.
pub const ACPI_PM_PORT: u64 = 0x600;

/// Interrupts for virtio-mmio devices: IOAPIC pins without a legacy owner.
pub const VIRTIO_GSIS: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// RAM as (start, length) pieces around the gap. `size` is a multiple of the page size.
pub fn ram_regions(size: u64) -> Vec<(GuestAddress, u64)> {
    if size <= GAP_START {
        vec![(GuestAddress(0), size)]
    } else {
        vec![(GuestAddress(0), GAP_START), (GuestAddress(GAP_END), size - GAP_START)]
    }
}

/// A line of the memory map that the guest is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: E820Kind,
}

/// E820 types (ACPI 6.5, table 15.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable RAM.
    Ram = 1,
    /// ACPI tables.
    Acpi = 3,
}

/// The memory map for `size` bytes of RAM.
pub fn e820(size: u64) -> Vec<E820Entry> {
    let entry = |start, end: u64, kind| E820Entry { start, len: end - start, kind };
    let mut map = vec![
        entry(0, LOW_RAM_END, E820Kind::Ram),
        entry(ACPI.0, ACPI_END, E820Kind::Acpi),
        entry(HIGH_RAM.0, size.min(GAP_START), E820Kind::Ram),
    ];
    if size > GAP_START {
        map.push(entry(GAP_END, GAP_END + (size - GAP_START), E820Kind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_piece_and_large_memory_leaves_the_gap_free() {
        assert_eq!(ram_regions(512 << 20), [(GuestAddress(0), 512 << 20)]);
        assert_eq!(ram_regions(GAP_START), [(GuestAddress(0), GAP_START)]);
        assert_eq!(
            ram_regions(5 << 30),
            [(GuestAddress(0), GAP_START), (GuestAddress(GAP_END), (5 << 30) - GAP_START)]
        );
    }

    #[test]
    fn the_memory_map_tells_of_ram_only_where_ram_is() {
        for size in [64 << 20, GAP_START, GAP_START + PAGE_SIZE, 6 << 30] {
            let regions = ram_regions(size);
            for line in e820(size) {
                let inside = regions
                    .iter()
                    .any(|(start, len)| line.start >= start.0 && line.start + line.len <= start.0 + len);
                assert!(inside, "{line:?} with {size:#x}");
            }
        }
    }
}
