//! Waking from S3: where the guest said it wants to go on (ACPI 6.5, sections 5.2.10 and 16.3.2).
//!
//! Before it sleeps, the guest writes the address of its wake-up code to the FACS, which firmware jumps to in real
//! mode. Linux' is `wakeup_start` of `arch/x86/realmode/rm/wakeup_asm.S`; it brings the processor back to long mode
//! and restores everything else, the interrupt controllers included, by itself.
//!
//! The 64-bit `X_Firmware_Waking_Vector`, for protected mode, is not looked at: it is only for guests that have set
//! no other, and no Linux on x86 does that.

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::{BootError, linux};
use crate::machine::layout;

/// `Firmware_Waking_Vector` in the FACS.
const FACS_WAKING_VECTOR: u64 = 12;
/// Real mode reaches no further.
const REAL_MODE_END: u32 = 1 << 20;
/// CR0 of a processor in real mode, its caches on.
const CR0_ET: u64 = 1 << 4;

/// Address of the guest's wake-up code, below 1 MiB; `None` if it has left none that real mode could reach.
pub fn vector(memory: &GuestMemoryMmap) -> Option<u32> {
    let at = layout::FACS.checked_add(FACS_WAKING_VECTOR)?;
    let vector = memory.read_obj::<[u8; 4]>(at).map(u32::from_le_bytes).ok()?;
    (1..REAL_MODE_END).contains(&vector).then_some(vector)
}

/// Has a vCPU fresh from its reset begin at `vector`: "CS = vector >> 4, IP = vector & 0xF".
pub fn set_registers(vcpu: &VcpuFd, vector: u32) -> Result<(), BootError> {
    let mut sregs = linux::get_sregs(vcpu)?;
    let segment = (vector & (REAL_MODE_END - 1)) >> 4;
    sregs.cs.selector = u16::try_from(segment).unwrap_or_default();
    sregs.cs.base = u64::from(segment) << 4;
    sregs.cr0 = CR0_ET;
    linux::set_sregs(vcpu, &sregs)?;
    linux::set_regs(vcpu, &kvm_regs { rip: u64::from(vector & 0xf), rflags: 2, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn a_vector_is_taken_only_where_real_mode_can_go() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert_eq!(vector(&memory), None, "never set");
        let at = GuestAddress(layout::FACS.0 + FACS_WAKING_VECTOR);
        for (value, expected) in [
            (0_u32, None),
            (1, Some(1)),
            (0x9_8235, Some(0x9_8235)),
            (0xf_ffff, Some(0xf_ffff)),
            (0x10_0000, None),
            (u32::MAX, None),
        ] {
            memory.write_obj(value.to_le_bytes(), at).unwrap();
            assert_eq!(vector(&memory), expected, "{value:#x}");
        }
    }

    #[test]
    fn memory_that_ends_before_the_facs_has_no_vector() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        assert_eq!(vector(&memory), None);
    }
}
