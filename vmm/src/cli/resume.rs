//! `tarn resume`.

use clap::Args;

use super::vm_name::{VmName, WITH_DISKS};

/// Let a paused VM run on
///
/// Also starts a VM that was made with `run --paused`, and retries what a full disk stopped.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn resume web")]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    vm: VmName,
}

pub(super) fn run(args: &ResumeArgs) -> anyhow::Result<u8> {
    args.vm.monitor()?.execute("cont", None, WITH_DISKS)?;
    Ok(0)
}
