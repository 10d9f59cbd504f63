//! Whether KVM is there, may be used, has hardware under it, and can do what Tarn needs.

use super::Check;
use crate::host::{self, HostError};

pub(super) fn checks() -> Vec<Check> {
    let kvm = match host::open_kvm() {
        Ok(_) => Check::ok(
            "KVM",
            format!(
                "API version {}, all {} capabilities that are needed",
                host::API_VERSION,
                host::NEEDED.len()
            ),
        ),
        Err(error) => failure("KVM", error),
    };
    let hardware = match (host::hardware_virtualization(), host::refuse_software_kvm()) {
        (Some(flag), _) => Check::ok(HARDWARE, flag),
        (None, Err(error)) => failure(HARDWARE, error),
        (None, Ok(())) => Check::failure(
            HARDWARE,
            "the processor has neither vmx nor svm",
            "use a machine that has (in a VM: switch on nested virtualization), or `scripts/with-kvm tarn …`, which \
             emulates one",
        ),
    };
    vec![kvm, hardware]
}

const HARDWARE: &str = "hardware virtualization";

fn failure(name: &'static str, error: HostError) -> Check {
    let advice = error.advice();
    Check::failure(name, format!("{:#}", anyhow::Error::new(error)), advice)
}
