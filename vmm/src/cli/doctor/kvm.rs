//! Whether KVM is there, may be used, can do what Tarn needs, and has hardware under it.

use std::path::Path;

use anyhow::bail;

use super::Check;
use crate::host::{self, HostError};

const DEVICE: &str = "/dev/kvm";
const SOFTWARE: &str = "/dev/kvm is a software KVM: this machine has neither svm nor vmx, and such a KVM interprets a \
                        stock kernel too slowly to be of use";
const SOFTWARE_ADVICE: &str = "use a machine with hardware virtualization (in a VM: switch on nested virtualization), \
                               or `scripts/with-kvm tarn …`, which emulates one";

pub(super) fn checks() -> Vec<Check> {
    let kvm = host::open_kvm();
    let mut checks = vec![device(kvm.as_ref().err())];
    if checks[0].status == super::Status::Failure {
        return checks;
    }
    checks.push(match kvm {
        Ok(_) => Check::ok("KVM", format!("has all {} capabilities that are needed", host::NEEDED.len())),
        Err(error) => Check::failure("KVM", chain(error), "boot a newer kernel on this host"),
    });
    checks.push(match host::has_hardware_virtualization() {
        true => Check::ok("hardware virtualization", "svm or vmx"),
        false => Check::failure("hardware virtualization", SOFTWARE, SOFTWARE_ADVICE),
    });
    checks
}

fn device(error: Option<&HostError>) -> Check {
    const NAME: &str = DEVICE;
    match error {
        // The way out is part of the text.
        Some(error @ (HostError::Missing | HostError::Permission)) => {
            let text = error.to_string();
            let (finding, advice) = text.split_once(": ").unwrap_or((&text, ""));
            Check::failure(NAME, finding, advice)
        }
        Some(HostError::Open { source }) => {
            Check::failure(NAME, source.to_string(), "look into `dmesg | grep kvm`")
        }
        Some(HostError::Version { .. } | HostError::Capabilities { .. }) | None => {
            Check::ok(NAME, "may be read and written")
        }
    }
}

fn chain(error: HostError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// Refuses to run a VM on a KVM without hardware under it. Made for the start of every VM: where all is well it asks the
/// processor and nobody else.
pub(in crate::cli) fn refuse_software_kvm() -> anyhow::Result<()> {
    // Without any KVM, what is wrong is told when it is opened.
    if host::has_hardware_virtualization() || !Path::new(DEVICE).exists() {
        return Ok(());
    }
    bail!("{SOFTWARE}; {SOFTWARE_ADVICE}, or try anyway with --software-kvm")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Status;

    #[test]
    fn a_missing_permission_comes_with_the_command_that_grants_it() {
        let check = device(Some(&HostError::Permission));
        assert_eq!(check.status, Status::Failure);
        assert!(check.advice.unwrap().contains("setfacl -m u:"));
        assert!(device(Some(&HostError::Missing)).advice.unwrap().contains("modprobe"));
    }

    #[test]
    fn a_kvm_that_opens_and_is_too_old_is_no_fault_of_the_device() {
        assert_eq!(device(Some(&HostError::Version { version: 11 })).status, Status::Ok);
        assert_eq!(device(None).status, Status::Ok);
    }
}
