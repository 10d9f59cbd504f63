//! The few ACPI tables a guest needs (ACPI 6.5): RSDP → XSDT → FADT → DSDT and FACS, and MADT.
//!
//! Fixed hardware, not hardware-reduced: the power button, S3, S4, S5 and the PM timer live in registers that
//! [`devices::legacy::acpi_pm`] emulates, and a Linux guest looks nowhere else for them. virtio-mmio devices are
//! `LNRO0005`, which Linux' virtio_mmio driver matches; Debian's kernels have no `virtio_mmio.device=`
//! parameter.
//!
//! The SCI is declared edge-triggered in the MADT, because an irqfd delivers edges: a level-triggered pin would
//! lose an edge that arrives while the handler runs.
//!
//! The FACS is at a fixed place ([`layout::FACS`]): [`super::wake`] looks there for where the guest wants to wake.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use devices::legacy::acpi_pm::AcpiPm;
use devices::legacy::pvpanic::Pvpanic;
use devices::legacy::reset::ResetControl;
use devices::legacy::serial::SerialPort;
use vm_memory::{Address, GuestMemoryMmap};

use super::{BootError, write};
use crate::machine::layout;

const OEM_ID: [u8; 6] = *b"TARN  ";
const OEM_TABLE_ID: [u8; 8] = *b"TARNVM  ";
const OEM_REVISION: u32 = 1;

/// A virtio-mmio device as the guest finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmio {
    /// First address of its register window.
    pub base: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// Writes all tables to [`layout::ACPI`], the RSDP first.
///
/// # Errors
///
/// They do not fit, or guest memory is too small for them.
pub fn write_tables(memory: &GuestMemoryMmap, cpus: u8, virtio: &[VirtioMmio]) -> Result<(), BootError> {
    let base = layout::ACPI.raw_value();
    let mut area = Area { base, bytes: vec![0; Rsdp::len()] };
    let facs = area.push(&bytes(&FACS::new()));
    debug_assert_eq!(facs, layout::FACS.raw_value());
    let dsdt = area.push(dsdt(virtio).as_slice());
    let fadt = area.push(&bytes(&fadt(dsdt, facs).finalize()));
    let madt = area.push(madt(cpus).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.push(&bytes(&xsdt));
    area.bytes[..Rsdp::len()].copy_from_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)));
    if base + area.bytes.len() as u64 > layout::ACPI_END {
        return Err(BootError::AcpiTooLarge { len: area.bytes.len() });
    }
    write(memory, "the ACPI tables", &area.bytes, layout::ACPI)
}

/// Tables one behind the other, each at a multiple of 64 bytes (which the FACS needs).
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn push(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        self.base + at as u64
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64, facs: u64) -> FADTBuilder {
    const LEGACY_DEVICES: u16 = 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_MSI: u16 = 1 << 3;
    const NO_CMOS_RTC: u16 = 1 << 5;
    /// Latencies beyond these say "no such C-state" (ACPI 6.5, section 5.2.9).
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;

    let io = |offset, bits, access| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, layout::ACPI_PM_PORT + offset)
    };
    // Ports are 16 bits wide.
    let port = |offset: u64| low_u32(layout::ACPI_PM_PORT + offset).into();
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.dsdt = low_u32(dsdt).into();
    fadt.firmware_ctrl = low_u32(facs).into();
    fadt.sci_int = u16::try_from(layout::SCI_GSI).unwrap_or(0).into();
    fadt.pm1a_evt_blk = port(AcpiPm::EVENT_BLOCK);
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = port(AcpiPm::CONTROL_BLOCK);
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = port(AcpiPm::TIMER_BLOCK);
    fadt.pm_tmr_len = 4;
    fadt.x_pm1a_evt_blk = io(AcpiPm::EVENT_BLOCK, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io(AcpiPm::CONTROL_BLOCK, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = io(AcpiPm::TIMER_BLOCK, 32, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_MSI | NO_CMOS_RTC).into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, ResetControl::PORT);
    fadt.reset_value = ResetControl::RESET_VALUE;
    fadt
}

fn madt(cpus: u8) -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    const EDGE_ACTIVE_HIGH: u16 = 0b01_01;

    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, layout::LAPIC);
    madt.write_u32(40, PCAT_COMPAT);
    for id in 0..cpus {
        // Processor Local APIC: uid, APIC ID, enabled.
        madt.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // I/O APIC: ID, address, first GSI.
    let mut ioapic = vec![1, 12, 0, 0];
    ioapic.extend(layout::IOAPIC.to_le_bytes());
    ioapic.extend(0_u32.to_le_bytes());
    madt.append_slice(&ioapic);
    // Interrupt source overrides: the PIT's IRQ 0 is wired to pin 2, the SCI is an edge.
    for (irq, gsi, flags) in [(0_u8, 2_u32, 0_u16), (9, layout::SCI_GSI, EDGE_ACTIVE_HIGH)] {
        let mut entry = vec![2, 10, 0, irq];
        entry.extend(gsi.to_le_bytes());
        entry.extend(flags.to_le_bytes());
        madt.append_slice(&entry);
    }
    // Local APIC NMI: all processors, LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.update_checksum();
    madt
}

fn dsdt(virtio: &[VirtioMmio]) -> Sdt {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    serial(&mut aml);
    pvpanic(&mut aml);
    for (index, device) in virtio.iter().enumerate() {
        virtio_mmio(index, *device, &mut aml);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt.update_checksum();
    dsdt
}

/// `\_S3`, `\_S4`, `\_S5`: the SLP_TYP values that mean "suspend to RAM", "suspend to disk" and "off".
fn sleep_states(aml: &mut Vec<u8>) {
    for (name, kind) in [("_S3_", AcpiPm::S3_TYPE), ("_S4_", AcpiPm::S4_TYPE), ("_S5_", AcpiPm::S5_TYPE)] {
        Name::new(name.into(), &Package::new(vec![&kind, &kind, &ZERO, &ZERO])).to_aml_bytes(aml);
    }
}

/// Addresses of ports and of what is below 4 GiB by layout.
fn low_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn io_ports(base: u64, len: u64) -> IO {
    let base = u16::try_from(base).unwrap_or(u16::MAX);
    IO::new(base, base, 1, u8::try_from(len).unwrap_or(u8::MAX))
}

fn serial(aml: &mut Vec<u8>) {
    let io = io_ports(SerialPort::COM1, SerialPort::LEN);
    let irq = Interrupt::new(true, true, false, false, SerialPort::COM1_IRQ);
    let resources = ResourceTemplate::new(vec![&io, &irq]);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &ZERO);
    let crs = Name::new("_CRS".into(), &resources);
    let device = Device::new("COM1".into(), vec![&hid, &uid, &crs]);
    Scope::new(Path::new("\\_SB_"), vec![&device]).to_aml_bytes(aml);
}

fn pvpanic(aml: &mut Vec<u8>) {
    let io = io_ports(Pvpanic::PORT, Pvpanic::LEN);
    let resources = ResourceTemplate::new(vec![&io]);
    let hid = Name::new("_HID".into(), &Pvpanic::ACPI_HID);
    let crs = Name::new("_CRS".into(), &resources);
    let status = Name::new("_STA".into(), &0xf_u8);
    let device = Device::new("PEVT".into(), vec![&hid, &crs, &status]);
    Scope::new(Path::new("\\_SB_"), vec![&device]).to_aml_bytes(aml);
}

fn virtio_mmio(index: usize, device: VirtioMmio, aml: &mut Vec<u8>) {
    let number = low_u32(index as u64);
    let memory = Memory32Fixed::new(true, low_u32(device.base), low_u32(layout::VIRTIO_MMIO_SIZE));
    let irq = Interrupt::new(true, true, false, false, device.gsi);
    let resources = ResourceTemplate::new(vec![&memory, &irq]);
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let uid = Name::new("_UID".into(), &number);
    let coherent = Name::new("_CCA".into(), &acpi_tables::aml::ONE);
    let crs = Name::new("_CRS".into(), &resources);
    let name = format!("V{index:03}");
    let node = Device::new(name.as_str().into(), vec![&hid, &uid, &coherent, &crs]);
    Scope::new(Path::new("\\_SB_"), vec![&node]).to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn tables(cpus: u8, count: u64) -> (GuestMemoryMmap, Vec<u8>) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let devices: Vec<_> = (0..count)
            .map(|n| VirtioMmio { base: layout::VIRTIO_MMIO + n * layout::VIRTIO_MMIO_SIZE, gsi: 16 })
            .collect();
        write_tables(&memory, cpus, &devices).unwrap();
        let mut rsdp = vec![0; 36];
        memory.read_slice(&mut rsdp, layout::ACPI).unwrap();
        (memory, rsdp)
    }

    fn table_at(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut table = vec![0; len as usize];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        let (memory, rsdp) = tables(4, 3);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(&rsdp), 0);
        let xsdt = table_at(&memory, u64_at(&rsdp, 24));
        assert_eq!(sum(&xsdt), 0);
        let names: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table_at(&memory, u64_at(entry, 0)))
            .inspect(|table| assert_eq!(sum(table), 0))
            .map(|table| table[..4].to_vec())
            .collect();
        assert_eq!(names, [b"FACP".to_vec(), b"APIC".to_vec()]);
        let fadt = table_at(&memory, u64_at(&xsdt, 36));
        let facs = u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()));
        assert_eq!(facs, layout::FACS.0, "where a waking machine looks");
        assert_eq!(&table_at(&memory, facs)[..4], b"FACS");
        let dsdt = table_at(&memory, u64_at(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert_eq!(sum(&dsdt), 0);
        let count = |name: &[u8]| dsdt.windows(name.len()).filter(|window| *window == name).count();
        assert_eq!(count(b"LNRO0005"), 3);
        for (name, kind) in
            [(b"_S3_", AcpiPm::S3_TYPE), (b"_S4_", AcpiPm::S4_TYPE), (b"_S5_", AcpiPm::S5_TYPE)]
        {
            // A package of four: the kind as a byte constant, twice.
            assert_eq!(count(&[&name[..], &[0x12, 8, 4, 0x0a, kind, 0x0a, kind]].concat()), 1, "{name:?}");
        }
    }

    #[test]
    fn thirty_two_vcpus_and_sixteen_devices_fit() {
        tables(32, 16);
    }
}
