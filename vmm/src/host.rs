//! The host's KVM: is it there, may we use it, can it do what a machine needs.

use std::arch::x86_64::__cpuid;
use std::io;

use kvm_ioctls::{Cap, Kvm};

/// Capabilities that a machine is built on, with their KVM names.
pub const NEEDED: [(Cap, &str); 11] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// Why KVM cannot be used, and how to go on.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device node.
    #[error(
        "There is no /dev/kvm: load kvm-intel or kvm-amd (`modprobe kvm-amd`), switch virtualization on in the \
         firmware, or, in a virtual machine, ask for nested virtualization; `scripts/with-kvm` runs a command on an \
         emulated machine that has it"
    )]
    Missing,
    /// Not ours to open.
    #[error(
        "No permission to open /dev/kvm: `sudo setfacl -m u:$USER:rw /dev/kvm` until the next reboot, or \
         `sudo usermod -aG kvm $USER` and a new login for good"
    )]
    Permission,
    /// Any other failure to open.
    #[error("Cannot open /dev/kvm")]
    Open {
        /// Why.
        source: io::Error,
    },
    /// Not the stable API.
    #[error("KVM speaks API version {version}, not 12: the host's kernel is too old")]
    Version {
        /// What it said.
        version: i32,
    },
    /// Too little.
    #[error("KVM lacks {missing}: the host's kernel is too old or its KVM is not a complete one")]
    Capabilities {
        /// Names.
        missing: String,
    },
}

/// Opens /dev/kvm and checks that it can carry a machine.
///
/// # Errors
///
/// See [`HostError`]: each says how to go on.
pub fn open_kvm() -> Result<Kvm, HostError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::Missing,
        libc::EACCES | libc::EPERM => HostError::Permission,
        errno => HostError::Open { source: io::Error::from_raw_os_error(errno) },
    })?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(HostError::Version { version });
    }
    let missing = missing_capabilities(&kvm);
    if !missing.is_empty() {
        return Err(HostError::Capabilities { missing: missing.join(", ") });
    }
    Ok(kvm)
}

/// Names of the needed capabilities that `kvm` lacks.
pub fn missing_capabilities(kvm: &Kvm) -> Vec<&'static str> {
    NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
}

/// Whether the processor has VMX or SVM, as the flags of /proc/cpuinfo say; asked of the processor itself, because that
/// file is slow to read on large hosts.
pub fn has_hardware_virtualization() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let leaf = |number| __cpuid(number);
    let highest_extended = leaf(0x8000_0000).eax;
    leaf(1).ecx & VMX != 0 || (highest_extended >= 0x8000_0001 && leaf(0x8000_0001).ecx & SVM != 0)
}
