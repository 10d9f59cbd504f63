//! `tarn resume`.

use clap::Args;

use super::vm_name::{VmName, WITH_DISKS};

/// Let a paused VM run on, or wake a guest that sleeps
///
/// Also starts a VM that was made with `run --paused`, and retries what a full disk stopped. A VM that was paused while
/// its guest slept sleeps on; another `resume` wakes it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn resume web")]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    vm: VmName,
}

pub(super) fn run(args: &ResumeArgs) -> anyhow::Result<u8> {
    let mut monitor = args.vm.monitor()?;
    let status = monitor.execute("query-status", None, WITH_DISKS)?;
    let verb = if status["status"] == "suspended" { "system_wakeup" } else { "cont" };
    monitor.execute(verb, None, WITH_DISKS)?;
    Ok(0)
}
