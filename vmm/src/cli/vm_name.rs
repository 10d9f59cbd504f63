//! The argument NAME, which shells complete with the names of running VMs; and the way from it to a VM's sockets.

use std::ffi::OsStr;
use std::time::Duration;

use clap::Args;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use coordinator::{GuestSession, MonitorSession};

use super::guest_state;
use crate::run_dir::RunningVm;

/// How long a monitor may take for what it does at once.
pub(super) const AT_ONCE: Duration = Duration::from_secs(5);
/// How long it may take for what waits for disks: a pause drains and flushes them all.
pub(super) const WITH_DISKS: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub(super) struct VmName {
    /// A running VM, as `tarn ps` names it
    #[arg(value_name = "NAME", add = ArgValueCompleter::new(candidates))]
    pub(super) name: String,
}

impl VmName {
    pub(super) fn open(&self) -> anyhow::Result<RunningVm> {
        Ok(RunningVm::open(&self.name)?)
    }

    pub(super) fn monitor(&self) -> anyhow::Result<MonitorSession> {
        Ok(MonitorSession::connect(&self.open()?.monitor_socket(), AT_ONCE)?)
    }

    /// The agent in its guest, which has to run.
    pub(super) fn agent(&self) -> anyhow::Result<GuestSession> {
        let vm = self.open()?;
        guest_state::check_running(&mut MonitorSession::connect(&vm.monitor_socket(), AT_ONCE)?, &self.name)?;
        Ok(GuestSession::connect(&vm.agent_socket())?)
    }
}

/// Names of running VMs that begin with what is typed.
pub(super) fn candidates(typed: &OsStr) -> Vec<CompletionCandidate> {
    let typed = typed.to_string_lossy();
    let vms = RunningVm::list().unwrap_or_default();
    let names = vms.iter().map(|vm| vm.name()).filter(|name| name.starts_with(&*typed));
    names.map(CompletionCandidate::new).collect()
}
