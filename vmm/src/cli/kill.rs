//! `tarn kill`.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use coordinator::{MonitorSession, SessionError};

use super::process::VmProcess;
use super::vm_name::{AT_ONCE, VmName};
use crate::run_dir::RunningVm;

/// How long the kernel may take to end a process. It waits for disk operations that are under way.
const DYING: Duration = Duration::from_secs(30);

/// End a VM at once, without asking its guest
///
/// The guest loses what it has not written. A VM that does not answer is killed with SIGKILL.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn kill web")]
pub(super) struct KillArgs {
    #[command(flatten)]
    vm: VmName,
    /// Seconds until a VM that does not end by itself is killed with SIGKILL
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
}

pub(super) fn run(args: &KillArgs) -> anyhow::Result<u8> {
    kill(&args.vm.open()?, Duration::from_secs(args.timeout))?;
    Ok(0)
}

fn kill(vm: &RunningVm, timeout: Duration) -> anyhow::Result<()> {
    let Some(process) = VmProcess::of(vm)? else { return Ok(()) };
    let asked = MonitorSession::connect(&vm.monitor_socket(), AT_ONCE.min(timeout))
        .and_then(|mut monitor| monitor.execute("quit", None, AT_ONCE));
    let patience = match asked {
        Ok(_) | Err(SessionError::Closed { .. }) => timeout,
        Err(error) => {
            tracing::warn!("{error}; killing it");
            Duration::ZERO
        }
    };
    if !process.wait(patience)? {
        process.kill()?;
        if !process.wait(DYING)? {
            bail!("The process of VM {} does not die: the host's kernel is busy with it", vm.name());
        }
    }
    vm.sweep_dead();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_dir::testing::Stand;

    #[test]
    fn a_vm_that_does_not_answer_is_killed_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        let stand = Stand::start(base.path(), "vm");
        kill(&stand.vm, Duration::from_secs(10)).unwrap();
        assert!(!stand.vm.is_alive() && !stand.vm.dir().exists());
        assert!(stand.end().contains("signal: 9"));
    }
}
