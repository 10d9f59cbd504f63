//! The host: is KVM there, may we use it, can it do what a machine needs; and how much memory there is.
//!
//! `tarn run` and `tarn doctor` ask the same questions here and give the same answers. An error says what is wrong,
//! [`HostError::advice`] what to do about it.

use std::arch::x86_64::__cpuid;
use std::io;

use kvm_ioctls::{Cap, Kvm};

/// The only version there has been since Linux 2.6.22 (api.rst, KVM_GET_API_VERSION).
pub const API_VERSION: i32 = 12;

/// Capabilities that a machine is built on, with their KVM names.
pub const NEEDED: [(Cap, &str); 12] = [
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
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// Why this host cannot run a VM.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device node, or nothing behind it.
    #[error("There is no /dev/kvm")]
    Missing,
    /// Not ours to open.
    #[error("No permission to open /dev/kvm")]
    Permission,
    /// Any other failure to open.
    #[error("Cannot open /dev/kvm")]
    Open {
        /// Why.
        source: io::Error,
    },
    /// Something else has that name.
    #[error("/dev/kvm is not KVM")]
    NotKvm,
    /// Not the stable API.
    #[error("KVM speaks API version {version}, not {API_VERSION}")]
    Version {
        /// What it said.
        version: i32,
    },
    /// Too little.
    #[error("KVM lacks {missing}")]
    Capabilities {
        /// Names.
        missing: String,
    },
    /// KVM without VMX or SVM.
    #[error(
        "/dev/kvm is a software KVM: this machine has neither vmx nor svm, and such a KVM interprets a stock kernel \
         too slowly to be of use"
    )]
    Software,
    /// More memory than there is.
    #[error("Guest memory of {want_mib} MiB is more than this host has ({have_mib} MiB with swap)")]
    Memory {
        /// Asked for.
        want_mib: u64,
        /// There.
        have_mib: u64,
    },
}

impl HostError {
    /// What to do about it.
    pub fn advice(&self) -> String {
        match self {
            Self::Missing => "load the module (`sudo modprobe kvm-intel` or `kvm-amd`); if that fails, switch on \
                              virtualization in the firmware, or nested virtualization in the VM this is; \
                              `scripts/with-kvm tarn …` emulates a machine that has it"
                .to_owned(),
            Self::Permission => {
                let user = user();
                format!(
                    "`sudo setfacl -m u:{user}:rw /dev/kvm` for now, `sudo usermod -aG kvm {user}` and a new login \
                     for good"
                )
            }
            Self::Open { .. } => "look into `dmesg | grep kvm`".to_owned(),
            Self::NotKvm => "something put another device or file in its place (a container, perhaps)".to_owned(),
            Self::Version { .. } | Self::Capabilities { .. } => {
                "use a newer kernel, or a complete KVM, on this host".to_owned()
            }
            Self::Software => "use a machine with hardware virtualization (in a VM: switch on nested \
                               virtualization), or `scripts/with-kvm tarn …`, which emulates one, or try anyway with \
                               `tarn run --software-kvm`"
                .to_owned(),
            Self::Memory { .. } => "give the guest less (`--memory 512M`)".to_owned(),
        }
    }
}

fn user() -> String {
    let variable = std::env::var("USER").ok().filter(|user| !user.is_empty());
    variable.unwrap_or_else(|| rustix::process::geteuid().as_raw().to_string())
}

/// Opens /dev/kvm and checks that it can carry a machine.
///
/// # Errors
///
/// It cannot be opened, or can do too little.
pub fn open_kvm() -> Result<Kvm, HostError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::Missing,
        libc::EACCES | libc::EPERM => HostError::Permission,
        errno => HostError::Open { source: io::Error::from_raw_os_error(errno) },
    })?;
    match kvm.get_api_version() {
        API_VERSION => {}
        // The ioctl failed: whatever this is, it does not know it.
        ..0 => return Err(HostError::NotKvm),
        version => return Err(HostError::Version { version }),
    }
    let missing: Vec<_> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(HostError::Capabilities { missing: missing.join(", ") });
    }
    Ok(kvm)
}

/// Refuses a KVM that has no hardware under it; none at all is [`open_kvm`]'s affair.
///
/// # Errors
///
/// [`HostError::Software`].
pub fn refuse_software_kvm() -> Result<(), HostError> {
    let software = hardware_virtualization().is_none() && std::path::Path::new("/dev/kvm").exists();
    if software { Err(HostError::Software) } else { Ok(()) }
}

/// `vmx` or `svm`, whichever the processor has. The processor itself is asked: /proc/cpuinfo would say the same, but is
/// slow to read on large hosts.
pub fn hardware_virtualization() -> Option<&'static str> {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let leaf = |number| __cpuid(number);
    if leaf(1).ecx & VMX != 0 {
        return Some("vmx");
    }
    let highest_extended = leaf(0x8000_0000).eax;
    (highest_extended >= 0x8000_0001 && leaf(0x8000_0001).ecx & SVM != 0).then_some("svm")
}

/// RAM and swap of the host in bytes.
pub fn total_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_add(info.totalswap).saturating_mul(u64::from(info.mem_unit))
}

/// Refuses guest memory of `size` bytes where the host has less, swap included. More than is free at the moment is the
/// user's affair: guests seldom touch all they have.
///
/// # Errors
///
/// [`HostError::Memory`].
pub fn refuse_too_much_memory(size: u64) -> Result<(), HostError> {
    let have = total_memory();
    if size > have {
        return Err(HostError::Memory { want_mib: size >> 20, have_mib: have >> 20 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_that_is_missing_comes_with_the_command_that_grants_it() {
        let text = HostError::Permission.advice();
        assert!(text.contains("setfacl -m u:") && text.contains("usermod -aG kvm"), "{text}");
        assert!(HostError::Missing.advice().contains("modprobe"));
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        refuse_too_much_memory(1 << 20).unwrap();
        let error = refuse_too_much_memory(1 << 50).unwrap_err().to_string();
        assert!(error.starts_with("Guest memory of 1073741824 MiB is more than this host has"), "{error}");
    }
}
