//! PVH, the Xen direct boot ABI (Xen's docs/misc/pvh.pandoc; Linux' arch/x86/platform/pvh).

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, GuestMemoryMmap};

use super::linux::{Segments, get_sregs, segment, set_regs, set_sregs, write_gdt};
use super::{BootError, initrd, write};
use crate::machine::layout;

const START_MAGIC: u32 = 0x336e_c578;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;

/// Writes `hvm_start_info` (version 1), the module list and the memory map.
pub(super) fn write_start_info(
    memory: &GuestMemoryMmap,
    size: u64,
    initrd: Option<initrd::Loaded>,
) -> Result<(), BootError> {
    let map = layout::e820(size);
    let mut info = Vec::with_capacity(56);
    let modules = u32::from(initrd.is_some());
    let entries = u32::try_from(map.len()).unwrap_or(u32::MAX);
    info.extend(START_MAGIC.to_le_bytes());
    info.extend(1_u32.to_le_bytes()); // version
    info.extend(0_u32.to_le_bytes()); // flags
    info.extend(modules.to_le_bytes());
    info.extend(layout::PVH_MODULES.raw_value().to_le_bytes());
    info.extend(layout::CMDLINE.raw_value().to_le_bytes());
    info.extend(layout::ACPI.raw_value().to_le_bytes());
    info.extend(layout::PVH_MEMORY_MAP.raw_value().to_le_bytes());
    info.extend(entries.to_le_bytes());
    info.extend(0_u32.to_le_bytes());
    write(memory, "the PVH start info", &info, layout::PVH_START_INFO)?;

    if let Some(initrd) = initrd {
        let module = [initrd.start.raw_value(), initrd.len, 0, 0];
        let bytes: Vec<u8> = module.iter().flat_map(|v| v.to_le_bytes()).collect();
        write(memory, "the PVH module list", &bytes, layout::PVH_MODULES)?;
    }
    let lines: Vec<u8> = map
        .iter()
        .flat_map(|line| [line.start, line.len, u64::from(line.kind as u32)])
        .flat_map(u64::to_le_bytes)
        .collect();
    write(memory, "the PVH memory map", &lines, layout::PVH_MEMORY_MAP)
}

/// Puts the boot vCPU into 32-bit protected mode without paging.
pub fn set_registers(vcpu: &VcpuFd, memory: &GuestMemoryMmap, rip: u64) -> Result<(), BootError> {
    let segments = Segments { code: segment(1, 0xc09b), data: segment(2, 0xc093), task: segment(3, 0x008b) };
    write_gdt(memory, &segments)?;
    let mut sregs = get_sregs(vcpu)?;
    segments.load(&mut sregs);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    set_sregs(vcpu, &sregs)?;
    set_regs(
        vcpu,
        &kvm_regs { rflags: 2, rip, rbx: layout::PVH_START_INFO.raw_value(), ..Default::default() },
    )
}
