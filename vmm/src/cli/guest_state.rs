//! Whether the guest of a VM runs, and if it does not, what its user is to do first.

use std::time::{Duration, Instant};

use anyhow::bail;
use coordinator::{MonitorSession, SessionError};

use super::vm_name::AT_ONCE;

/// An operation that has paused a VM lets it go on within moments, or is stuck.
const HELD: Duration = Duration::from_secs(5);

/// Makes sure that the guest runs: what its agent is asked otherwise, it does when the VM goes on, and whoever asked may
/// have left by then.
pub(super) fn check_running(monitor: &mut MonitorSession, name: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let status = monitor.execute("query-status", None, AT_ONCE)?;
        let state = status["status"].as_str().unwrap_or_default();
        if state == "running" {
            return Ok(());
        }
        let holder = holder(monitor);
        let left = HELD.saturating_sub(began.elapsed());
        if holder.is_none() || left.is_zero() {
            bail!(obstacle(name, state, holder.as_deref()));
        }
        // Such as RESUME.
        monitor.next_event(left)?;
    }
}

/// The operation that has paused the VM, if one has. An error of a VM that has no operations means that none has.
pub(super) fn holder(monitor: &mut MonitorSession) -> Option<String> {
    let status: Result<_, SessionError> = monitor.execute("tarn-query-status", None, AT_ONCE);
    let status = status.ok()?;
    let mut holders = status["paused-by"].as_array()?.iter().filter_map(|holder| holder.as_str());
    holders.find(|holder| *holder != "user").map(str::to_owned)
}

/// Why the guest of a VM in this state does nothing, and what helps.
pub(super) fn obstacle(name: &str, state: &str, holder: Option<&str>) -> String {
    match (holder, state) {
        (Some(operation), _) => format!(
            "VM {name} is paused by operation {operation}, which lets it go on when it is done; if nobody is at it any \
             more, `tarn recover {name}` settles it, or `tarn op resume {name}` or `tarn op abort {name}`"
        ),
        (None, "paused") => format!("VM {name} is paused: `tarn resume {name}` first"),
        (None, "prelaunch") => format!("VM {name} was started with --paused: `tarn resume {name}` first"),
        (None, "suspended") => {
            format!("The guest of VM {name} sleeps (suspended): `tarn resume {name}` first")
        }
        (None, "io-error") => {
            format!(
                "VM {name} was stopped by an error of a disk (io-error): `tarn resume {name}` first, which retries"
            )
        }
        (None, state) => format!("VM {name} is in state {state}: its guest does nothing any more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_paused_a_vm_tells_what_helps() {
        assert_eq!(obstacle("web", "paused", None), "VM web is paused: `tarn resume web` first");
        let held = obstacle("web", "paused", Some("1-2-3"));
        assert!(held.contains("operation 1-2-3") && !held.contains("`tarn resume web`"), "{held}");
        for helps in ["`tarn recover web`", "`tarn op resume web`", "`tarn op abort web`"] {
            assert!(held.contains(helps), "{held}");
        }
        for state in ["suspended", "io-error"] {
            let text = obstacle("web", state, None);
            assert!(text.contains(state) && text.contains("`tarn resume web` first"), "{text}");
        }
        assert!(!obstacle("web", "shutdown", None).contains("resume"));
    }
}
