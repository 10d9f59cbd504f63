//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst, section 1.15, and zero-page.rst).

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Address, ByteValued, GuestMemoryMmap};

use super::{BootError, initrd, write};
use crate::machine::layout;

const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// "Undefined" boot loader: the kernel wants any non-zero value.
const LOADER_TYPE: u8 = 0xff;
const KERNEL_MIN_ALIGNMENT: u32 = 0x100_0000;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Writes the zero page. `header` is the bzImage's own; an ELF has none.
pub(super) fn write_zero_page(
    memory: &GuestMemoryMmap,
    size: u64,
    header: Option<setup_header>,
    initrd: Option<initrd::Loaded>,
    cmdline_len: usize,
) -> Result<(), BootError> {
    let hdr = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HDRS,
        kernel_alignment: KERNEL_MIN_ALIGNMENT,
        ..Default::default()
    });
    let mut params = boot_params { hdr, ..Default::default() };
    params.hdr.type_of_loader = LOADER_TYPE;
    params.hdr.cmd_line_ptr = low_u32(layout::CMDLINE.raw_value());
    params.hdr.cmdline_size = u32::try_from(cmdline_len).unwrap_or(u32::MAX);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low_u32(initrd.start.raw_value());
        params.hdr.ramdisk_size = low_u32(initrd.len);
    }
    params.acpi_rsdp_addr = layout::ACPI.raw_value();
    let map = layout::e820(size);
    for (slot, line) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: line.start, size: line.len, r#type: line.kind as u32 };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    write(memory, "the zero page", params.as_slice(), layout::ZERO_PAGE)
}

/// Both are below 4 GiB by construction: RAM for boot ends at the gap.
fn low_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Puts the boot vCPU into long mode with the first 4 GiB mapped one to one.
pub fn set_registers(vcpu: &VcpuFd, memory: &GuestMemoryMmap, rip: u64) -> Result<(), BootError> {
    write_page_tables(memory)?;
    let segments = Segments { code: segment(1, 0xa09b), data: segment(2, 0xc093), task: segment(3, 0x808b) };
    write_gdt(memory, &segments)?;
    let mut sregs = get_sregs(vcpu)?;
    segments.load(&mut sregs);
    sregs.cr3 = layout::PAGE_TABLES.raw_value();
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG | CR0_ET;
    sregs.efer |= EFER_LME | EFER_LMA;
    set_sregs(vcpu, &sregs)?;
    set_regs(
        vcpu,
        &kvm_regs {
            rflags: 2,
            rip,
            rsp: layout::BOOT_STACK.raw_value(),
            rbp: layout::BOOT_STACK.raw_value(),
            rsi: layout::ZERO_PAGE.raw_value(),
            ..Default::default()
        },
    )
}

fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    let base = layout::PAGE_TABLES.raw_value();
    let table = |index: u64| base + index * layout::PAGE_SIZE;
    let mut tables = vec![0_u64; 6 * 512];
    tables[0] = table(1) | PRESENT_WRITABLE;
    for directory in 0..4_u64 {
        let at = usize::try_from(directory).unwrap_or(0);
        tables[512 + at] = table(2 + directory) | PRESENT_WRITABLE;
    }
    for (page, slot) in (0_u64..).zip(&mut tables[2 * 512..]) {
        *slot = (page << 21) | HUGE | PRESENT_WRITABLE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(memory, "the boot page tables", &bytes, layout::PAGE_TABLES)
}

/// Flat segments for a kernel's first instructions.
pub(super) struct Segments {
    /// CS.
    pub code: kvm_segment,
    /// DS, ES, FS, GS, SS.
    pub data: kvm_segment,
    /// TR.
    pub task: kvm_segment,
}

impl Segments {
    pub(super) fn load(&self, sregs: &mut kvm_sregs) {
        sregs.cs = self.code;
        sregs.ds = self.data;
        sregs.es = self.data;
        sregs.fs = self.data;
        sregs.gs = self.data;
        sregs.ss = self.data;
        sregs.tr = self.task;
        sregs.gdt.base = layout::GDT.raw_value();
        sregs.gdt.limit = 4 * 8 - 1;
        sregs.idt.base = layout::IDT.raw_value();
        sregs.idt.limit = 7;
    }
}

/// A flat 4 GiB segment at GDT entry `index`. `flags` is bits 40 to 55 of a descriptor: type, S, DPL, P in the low
/// byte; AVL, L, D/B, G in bits 12 to 15.
pub(super) fn segment(index: u16, flags: u16) -> kvm_segment {
    let bit = |n: u16| u8::from(flags & (1 << n) != 0);
    let granular = bit(15) == 1;
    kvm_segment {
        base: 0,
        limit: if granular { 0xffff_ffff } else { 0x67 },
        selector: index * 8,
        type_: (flags & 0xf).to_le_bytes()[0],
        s: bit(4),
        dpl: 0,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

pub(super) fn write_gdt(memory: &GuestMemoryMmap, segments: &Segments) -> Result<(), BootError> {
    let table = [0, descriptor(&segments.code), descriptor(&segments.data), descriptor(&segments.task)];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    write(memory, "the GDT", &bytes, layout::GDT)?;
    write(memory, "the IDT", &[0; 8], layout::IDT)
}

/// The 8 bytes of a segment descriptor (Intel SDM volume 3, section 3.4.5). The base is 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

pub(super) fn get_sregs(vcpu: &VcpuFd) -> Result<kvm_sregs, BootError> {
    vcpu.get_sregs().map_err(|source| BootError::Vcpu { what: "system registers", source })
}

pub(super) fn set_sregs(vcpu: &VcpuFd, sregs: &kvm_sregs) -> Result<(), BootError> {
    vcpu.set_sregs(sregs).map_err(|source| BootError::Vcpu { what: "system registers", source })
}

pub(super) fn set_regs(vcpu: &VcpuFd, regs: &kvm_regs) -> Result<(), BootError> {
    vcpu.set_regs(regs).map_err(|source| BootError::Vcpu { what: "registers", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_processor_reads() {
        assert_eq!(descriptor(&segment(1, 0xa09b)), 0x00af_9b00_0000_ffff, "64-bit code");
        assert_eq!(descriptor(&segment(1, 0xc09b)), 0x00cf_9b00_0000_ffff, "32-bit code");
        assert_eq!(descriptor(&segment(2, 0xc093)), 0x00cf_9300_0000_ffff, "data");
    }
}
