//! The process of a running VM, held by a descriptor: it can be awaited, and never mistaken for another.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::run_dir::RunningVm;

#[derive(Debug)]
pub(super) struct VmProcess {
    pidfd: OwnedFd,
}

impl VmProcess {
    /// The process that holds the lock of `vm`'s directory; `None` when it has just ended.
    pub(super) fn of(vm: &RunningVm) -> anyhow::Result<Option<Self>> {
        let Some(pid) = vm.pid.and_then(Pid::from_raw) else {
            bail!("VM {} is still starting or already ending: it has no pid file", vm.name());
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => {
                return Err(error).context(format!("Cannot get hold of process {}", pid.as_raw_pid()));
            }
        };
        // The number was read before the descriptor was made. If a live VM still shows it now, it belonged to that VM in
        // between, and the descriptor is the VM's for good.
        match vm.again() {
            Ok(again) if again.pid == vm.pid => Ok(Some(Self { pidfd })),
            _ => Ok(None),
        }
    }

    /// Waits for the end of the process; whether it came within `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> anyhow::Result<bool> {
        let began = Instant::now();
        loop {
            let left = timeout.saturating_sub(began.elapsed());
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&Timespec::try_from(left)?)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("Cannot wait for the VM's process"),
            }
        }
    }

    /// Kills it.
    pub(super) fn kill(&self) -> anyhow::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).context("Cannot kill the VM's process"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_dir::testing::Stand;

    #[test]
    fn a_process_is_awaited_no_longer_than_said_and_dies_when_told() {
        let base = tempfile::tempdir().unwrap();
        let stand = Stand::start(base.path(), "vm");
        let process = VmProcess::of(&stand.vm).unwrap().expect("it lives");
        assert!(!process.wait(Duration::from_millis(10)).unwrap());
        process.kill().unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        process.kill().unwrap();
    }

    #[test]
    fn a_number_that_belongs_to_nobody_or_to_another_is_not_taken_for_the_vm() {
        let base = tempfile::tempdir().unwrap();
        let stand = Stand::start(base.path(), "vm");
        let mut stale = stand.vm.clone();
        stale.pid = i32::try_from(std::process::id()).ok();
        assert!(VmProcess::of(&stale).unwrap().is_none());
        let process = VmProcess::of(&stand.vm).unwrap().expect("it lives");
        process.kill().unwrap();
        let vm = stand.vm.clone();
        stand.end();
        assert!(VmProcess::of(&vm).unwrap().is_none());
    }
}
