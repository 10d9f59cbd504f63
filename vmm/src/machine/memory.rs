//! Guest RAM: anonymous private memory, given to KVM slot by slot.
#![expect(
    unsafe_code,
    reason = "madvise, and KVM's promise to touch only memory that lives as long as the VM"
)]

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::layout;
use crate::config::MemorySpec;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// mmap failed.
    #[error("Cannot map {want_mib} MiB of guest memory: {reason}")]
    Map {
        /// Asked for.
        want_mib: u64,
        /// The host's words.
        reason: String,
    },
    /// Prefault failed.
    #[error("Cannot prefault guest memory")]
    Prefault {
        /// The host's words.
        source: io::Error,
    },
    /// KVM refused the memory.
    #[error("KVM does not take guest memory slot {slot}")]
    Slot {
        /// Slot number.
        slot: u32,
        /// KVM's words.
        source: kvm_ioctls::Error,
    },
}

/// Maps guest RAM as `spec` says.
///
/// # Errors
///
/// The host refuses. That there is enough in all is [`host`](crate::host)'s affair.
pub fn allocate(spec: &MemorySpec) -> Result<GuestMemoryMmap, MemoryError> {
    let fail = |reason: String| MemoryError::Map { want_mib: spec.size >> 20, reason };
    let ranges = layout::ram_regions(spec.size)
        .into_iter()
        .map(|(start, len)| usize::try_from(len).map(|len| (start, len)).map_err(|e| fail(e.to_string())))
        .collect::<Result<Vec<(GuestAddress, usize)>, _>>()?;
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| fail(e.to_string()))?;
    if spec.huge_pages {
        // A host without transparent huge pages says EINVAL: the guest runs as well, a little slower.
        if let Err(error) = advise(&memory, libc::MADV_HUGEPAGE) {
            tracing::warn!(%error, "No huge pages for guest memory");
        }
    }
    if spec.prefault {
        advise(&memory, libc::MADV_POPULATE_WRITE).map_err(|source| MemoryError::Prefault { source })?;
    }
    Ok(memory)
}

/// Registers every region with KVM.
///
/// # Errors
///
/// KVM refuses a slot.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0_u32..).zip(memory.iter()) {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_or(0, |p| p.addr() as u64);
        let kvm_region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host,
            flags: 0,
        };
        // SAFETY: the region is a live mapping of that length. The machine owns both the mapping and the VM, and
        // drops its vCPUs before either, so the guest never runs on memory that is gone.
        unsafe { vm.set_user_memory_region(kvm_region) }
            .map_err(|source| MemoryError::Slot { slot, source })?;
    }
    Ok(())
}

fn advise(memory: &GuestMemoryMmap, advice: libc::c_int) -> io::Result<()> {
    for region in memory.iter() {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let len = usize::try_from(region.len()).map_err(io::Error::other)?;
        // SAFETY: the range is one whole mapping of ours; both advices keep its content.
        if unsafe { libc::madvise(host.cast(), len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefaulted_huge_memory_is_there() {
        let spec = MemorySpec { size: 8 << 20, huge_pages: true, prefault: true };
        assert_eq!(allocate(&spec).unwrap().num_regions(), 1);
    }
}
