//! `tarn pause`.

use clap::Args;

use super::vm_name::{VmName, WITH_DISKS};

/// Stop the vCPUs of a VM and bring its disks to rest
///
/// Paused means quiet: when this returns, no disk operation is under way and everything written is flushed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn pause web")]
pub(super) struct PauseArgs {
    #[command(flatten)]
    vm: VmName,
}

pub(super) fn run(args: &PauseArgs) -> anyhow::Result<u8> {
    args.vm.monitor()?.execute("stop", None, WITH_DISKS)?;
    Ok(0)
}
