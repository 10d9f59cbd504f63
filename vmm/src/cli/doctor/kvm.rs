//! Whether KVM is there, may be used, has hardware under it, and can do what Tarn needs.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{anyhow, bail};
use kvm_ioctls::{Cap, Kvm};

use super::Check;

const DEVICE: &str = "/dev/kvm";
const DEVICE_C: &CStr = c"/dev/kvm";
/// The only version there has been since Linux 2.6.22 (api.rst, KVM_GET_API_VERSION).
const API_VERSION: i32 = 12;

const NEEDED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel irqchip"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate_exit"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::Pit2, "in-kernel PIT"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::MpState, "MP state"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::AdjustClock, "guest clock"),
    (Cap::KvmclockCtrl, "kvmclock control"),
];

const SOFTWARE: &str = "/dev/kvm is a software KVM: this machine has neither svm nor vmx, and such a KVM interprets a \
                        stock kernel too slowly to be of use";
const SOFTWARE_ADVICE: &str = "use a machine with hardware virtualization (in a VM: switch on nested virtualization), \
                               or `scripts/with-kvm tarn …`, which emulates one";

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![device()];
    if checks[0].status == super::Status::Failure {
        return checks;
    }
    checks.push(hardware());
    match Kvm::new_with_path(DEVICE_C) {
        Ok(kvm) => checks.extend([version(&kvm), capabilities(&kvm)]),
        Err(error) => checks.push(Check::failure(
            "KVM",
            format!("{DEVICE} cannot be opened: {error}"),
            "look into `dmesg | grep kvm`",
        )),
    }
    checks
}

fn device() -> Check {
    const NAME: &str = "/dev/kvm";
    match fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Check::ok(NAME, "may be read and written"),
        Err(error) => Check::failure(NAME, error.to_string(), advice(&error)),
    }
}

fn advice(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "load the module (`sudo modprobe kvm-intel` or `kvm-amd`); if that fails, switch on \
                                    virtualization in the firmware, or nested virtualization in the VM this is"
            .to_owned(),
        io::ErrorKind::PermissionDenied => {
            let user = user();
            format!(
                "`sudo setfacl -m u:{user}:rw {DEVICE}` for now, `sudo usermod -aG kvm {user}` and a new login for ever"
            )
        }
        _ => "look into `dmesg | grep kvm`".to_owned(),
    }
}

fn user() -> String {
    let variable = std::env::var("USER").ok().filter(|user| !user.is_empty());
    variable.unwrap_or_else(|| rustix::process::getuid().as_raw().to_string())
}

fn hardware() -> Check {
    const NAME: &str = "hardware virtualization";
    match hardware_flag() {
        Some(flag) => Check::ok(NAME, flag),
        None => Check::failure(NAME, SOFTWARE, SOFTWARE_ADVICE),
    }
}

/// `svm` or `vmx`, whichever the processor shows.
fn hardware_flag() -> Option<&'static str> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    flag_in(&cpuinfo)
}

fn flag_in(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["svm", "vmx"].into_iter().find(|flag| flags.split_ascii_whitespace().any(|word| word == *flag))
}

fn version(kvm: &Kvm) -> Check {
    const NAME: &str = "KVM API";
    match kvm.get_api_version() {
        API_VERSION => Check::ok(NAME, format!("version {API_VERSION}")),
        other => Check::failure(
            NAME,
            format!("version {other} instead of {API_VERSION}"),
            "this is no KVM that Tarn can use",
        ),
    }
}

fn capabilities(kvm: &Kvm) -> Check {
    const NAME: &str = "KVM capabilities";
    let missing: Vec<_> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        Check::ok(NAME, format!("all {} that are needed", NEEDED.len()))
    } else {
        Check::failure(NAME, format!("missing: {}", missing.join(", ")), "use a newer kernel on this host")
    }
}

/// Refuses to run a VM on a KVM without hardware under it. Made for the start of every VM: two system calls where all
/// is well.
pub(in crate::cli) fn refuse_software_kvm() -> anyhow::Result<()> {
    // Reading /proc/cpuinfo asks every processor for its frequency, which takes long. A loaded module says the same.
    let module = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"].iter().any(|path| Path::new(path).exists());
    if module || !Path::new(DEVICE).exists() || hardware_flag().is_some() {
        return Ok(());
    }
    bail!("{SOFTWARE}; {SOFTWARE_ADVICE}, or try anyway with --software-kvm")
}

/// What to say instead when a VM could not be started because /dev/kvm is not to be had.
pub(in crate::cli) fn explain_kvm() -> Option<anyhow::Error> {
    let error = fs::OpenOptions::new().read(true).write(true).open(DEVICE).err()?;
    let advice = advice(&error);
    Some(anyhow!("Cannot open {DEVICE}: {error}; {advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_flags_are_whole_words() {
        assert_eq!(flag_in("processor: 0\nflags\t\t: fpu svm npt\n"), Some("svm"));
        assert_eq!(flag_in("flags\t\t: fpu vmx\n"), Some("vmx"));
        assert_eq!(flag_in("flags\t\t: fpu svm_lock\nvmx flags : svm\n"), None);
    }

    #[test]
    fn a_permission_that_is_missing_comes_with_the_command_that_grants_it() {
        let text = advice(&io::ErrorKind::PermissionDenied.into());
        assert!(text.contains("setfacl -m u:") && text.contains("usermod -aG kvm"), "{text}");
        assert!(advice(&io::ErrorKind::NotFound.into()).contains("modprobe"));
    }
}
