//! Filesystems that were asked for by `--mount` and that the guest could not mount.
//!
//! Its init writes a line for each into a file and goes on, so that somebody can look. A program in the guest would go on,
//! too, and write to memory what was meant for the disk: so whoever waits for the agent asks for that file next.

use std::time::Duration;

use coordinator::recipes::{CopyError, copy_from_guest};
use coordinator::{GuestSession, SessionError};

use crate::config::VmSpec;
use crate::run_dir::VmPaths;

/// The guest image's file of mounts that failed. There is none if none has.
const FAILURES: &str = "/run/tarn/mount-failures";

/// What was asked for is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    /// In the words of the guest's init.
    #[error("The guest {}", .failures.join("; it "))]
    Failed { failures: Vec<String> },
    /// The agent does not tell.
    #[error("It cannot be told whether the guest has mounted what --mount asks for")]
    Unknown(#[source] SessionError),
}

/// Whether there is something to mount.
pub(super) fn are_wanted(spec: &VmSpec) -> bool {
    spec.cmdline.split_ascii_whitespace().any(|word| word.starts_with("tarn.mount="))
}

/// Asks for the mounts of a guest whose agent answers: init starts it after them.
pub(super) fn check(agent: &mut GuestSession) -> Result<(), MountError> {
    let mut text = Vec::new();
    match copy_from_guest(agent, FAILURES, &mut text, &mut |_, _| {}) {
        Ok(_) => {}
        // No such file.
        Err(CopyError::Session(error)) if error.refusal().is_some() => return Ok(()),
        Err(CopyError::Session(error)) => return Err(MountError::Unknown(error)),
        // The first part of it is as good.
        Err(_) => {}
    }
    let text = String::from_utf8_lossy(&text);
    let failures: Vec<_> = text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if failures.is_empty() { Ok(()) } else { Err(MountError::Failed { failures }) }
}

/// Waits for the agent of a VM that has just been started, and asks.
pub(super) fn wait_and_check(vm: &VmPaths, patience: Duration) -> Result<(), MountError> {
    let mut agent = GuestSession::connect(&vm.agent_socket()).map_err(MountError::Unknown)?;
    agent.wait_for_agent(patience).map_err(MountError::Unknown)?;
    check(&mut agent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_words_for_the_guests_init_are_mounts() {
        let wanted = |cmdline: &str| are_wanted(&VmSpec { cmdline: cmdline.into(), ..VmSpec::default() });
        assert!(wanted("quiet tarn.mount=serial:data:/data:ext4"));
        assert!(!wanted("quiet x=tarn.mount=/dev/vda:/data:ext4") && !wanted(""));
    }

    #[test]
    fn several_failures_are_one_sentence() {
        let line = |disk: &str| format!("cannot mount {disk} on /data as ext4: no such device within 10 s");
        let error = MountError::Failed { failures: vec![line("/dev/vda"), line("/dev/vdb")] };
        let expected = format!("The guest {}; it {}", line("/dev/vda"), line("/dev/vdb"));
        assert_eq!(error.to_string(), expected);
    }
}
