//! CPUID and the few MSRs and APIC registers that firmware would have set.
//!
//! The guest sees what KVM can give on this host, with the topology of this VM: one socket, one thread per core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::BootError;

/// Bits of leaf 1, ECX.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Bit of leaf 1, EDX: the logical processor count in EBX is valid.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 0x80000007, EDX: the TSC never stops. It does here, in a sense: it runs on while a paused guest must not see
/// time pass. Without the bit Linux takes the paravirtual clock, which is stopped with the guest (as in QEMU, whose
/// default CPU models lack the bit, too).
const EDX_INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 7, EDX: asymmetric cores.
const EDX_HYBRID: u32 = 1 << 15;

/// What KVM supports, shaped for vCPU `index` of `cpus`.
///
/// # Errors
///
/// More entries than KVM takes.
pub fn for_vcpu(supported: &CpuId, index: u8, cpus: u8) -> Result<CpuId, BootError> {
    let apic_id = u32::from(index);
    // Width of the APIC ID field that numbers the cores of the one socket.
    let core_bits = u8::BITS - (cpus - 1).leading_zeros();
    // Sub-leaves of the topology are made, not taken: recent kernels report only the first (they cannot know).
    let topology = |leaf: u32| leaf == 0xb || leaf == 0x1f;
    let mut entries: Vec<_> =
        supported.as_slice().iter().copied().filter(|e| !topology(e.function)).collect();
    let highest = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= highest) {
        entries.extend((0..3).map(|level| extended_topology(leaf, level, apic_id, core_bits, cpus)));
    }
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | (apic_id << 24) | (u32::from(cpus) << 16);
                // The in-kernel APIC always has it; KVM leaves the bit to the VMM on older kernels.
                entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
                entry.edx = if cpus > 1 { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
            }
            0x4 => cache_topology(entry, cpus),
            0x7 if entry.index == 0 => entry.edx &= !EDX_HYBRID,
            // No performance counters: they would leak and, virtualized, mislead.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0007 => entry.edx &= !EDX_INVARIANT_TSC,
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (core_bits << 12) | u32::from(cpus - 1);
            }
            0x8000_001d => cache_topology(entry, cpus),
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = (entry.ebx & !0xffff) | apic_id; // core ID, one thread per core
                entry.ecx &= !0x7ff; // node 0, one node
            }
            _ => {}
        }
    }
    CpuId::from_entries(&entries).map_err(|_| BootError::Cpuid { entries: entries.len() })
}

/// Leaf 4 (Intel) and 0x8000001d (AMD): L1 and L2 belong to a core, the last level to the socket.
fn cache_topology(entry: &mut kvm_cpuid_entry2, cpus: u8) {
    let level = (entry.eax >> 5) & 0x7;
    let sharing = if level >= 3 { u32::from(cpus - 1) } else { 0 };
    entry.eax = (entry.eax & !(0xfff << 14)) | (sharing << 14);
    if entry.function == 0x4 && entry.eax & 0x1f != 0 {
        entry.eax = (entry.eax & !(0x3f << 26)) | (u32::from(cpus - 1) << 26);
    }
}

/// Leaf 0xb / 0x1f: sub-leaf 0 is the thread level, 1 the core level, then nothing.
fn extended_topology(leaf: u32, level: u32, apic_id: u32, core_bits: u32, cpus: u8) -> kvm_cpuid_entry2 {
    let (shift, count, kind) = match level {
        0 => (0, 1, 1),
        1 => (core_bits, u32::from(cpus), 2),
        _ => (0, 0, 0),
    };
    kvm_cpuid_entry2 {
        function: leaf,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | level,
        edx: apic_id,
        ..Default::default()
    }
}

/// MSRs as firmware leaves them.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), BootError> {
    const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
    const MISC_ENABLE_FAST_STRING: u64 = 1;
    const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

    let entries = [
        kvm_msr_entry { index: MSR_IA32_MISC_ENABLE, data: MISC_ENABLE_FAST_STRING, ..Default::default() },
        kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_ENABLE_WRITE_BACK, ..Default::default() },
    ];
    for entry in entries {
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| BootError::Msr { index: entry.index })?;
        let set = vcpu.set_msrs(&msrs).map_err(|source| BootError::Vcpu { what: "MSRs", source })?;
        if set != 1 {
            return Err(BootError::Msr { index: entry.index });
        }
    }
    Ok(())
}

/// Local APIC in virtual wire mode: LINT0 takes the PIC, LINT1 the NMI.
pub fn set_lapic_lines(vcpu: &VcpuFd) -> Result<(), BootError> {
    const APIC_LVT0: usize = 0x350;
    const APIC_LVT1: usize = 0x360;
    const MODE_EXTINT: u8 = 7;
    const MODE_NMI: u8 = 4;

    let fail = |source| BootError::Vcpu { what: "local APIC", source };
    let mut lapic = vcpu.get_lapic().map_err(fail)?;
    for (register, mode) in [(APIC_LVT0, MODE_EXTINT), (APIC_LVT1, MODE_NMI)] {
        // Delivery mode: bits 8 to 10, so the low bits of the second byte.
        let byte = lapic.regs[register + 1].cast_unsigned();
        lapic.regs[register + 1] = ((byte & !0x7) | mode).cast_signed();
    }
    vcpu.set_lapic(&lapic).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        CpuId::from_entries(&[
            kvm_cpuid_entry2 { eax: 0x1f, ..entry(0, 0) },
            entry(1, 0),
            entry(0xb, 0),
            kvm_cpuid_entry2 { eax: 0xffff_ffff, ..entry(0xa, 0) },
            entry(0x8000_0008, 0),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_and_knows_its_siblings() {
        let cpuid = for_vcpu(&supported(), 5, 6).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, 5);
        assert_eq!((leaf(&cpuid, 1, 0).ebx >> 16) & 0xff, 6);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 3, "three bits number six cores");
        assert_eq!(leaf(&cpuid, 0xb, 1).ebx, 6);
        assert_eq!(leaf(&cpuid, 0xb, 0).edx, 5);
        assert_eq!(leaf(&cpuid, 0xb, 2).ecx >> 8, 0, "no third level");
        assert_eq!(leaf(&cpuid, 0x1f, 1).ebx, 6);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, (3 << 12) | 5);
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
    }

    #[test]
    fn a_single_vcpu_has_no_siblings() {
        let cpuid = for_vcpu(&supported(), 0, 1).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).edx & EDX_HTT, 0);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 0);
    }
}
