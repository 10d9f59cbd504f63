//! `tarn resume`.

use anyhow::bail;
use clap::Args;
use coordinator::Map;

use super::guest_state;
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
    /// Also if an operation on its disks has paused it
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &ResumeArgs) -> anyhow::Result<u8> {
    let mut monitor = args.vm.monitor()?;
    let status = monitor.execute("query-status", None, WITH_DISKS)?;
    let verb = if status["status"] == "suspended" { "system_wakeup" } else { "cont" };
    let forced =
        (args.force && verb == "cont").then(|| Map::from_iter([("tarn-force".to_owned(), true.into())]));
    let Err(error) = monitor.execute(verb, forced, WITH_DISKS) else { return Ok(0) };
    // The refusal names what a client of the monitor would do.
    match guest_state::holder(&mut monitor) {
        Some(operation) if error.refusal().is_some() => {
            let name = &args.vm.name;
            bail!(
                "VM {name} is paused by operation {operation}, which lets it go on when it is done. If nobody is at it any \
                 more, `tarn recover {name}` settles it; `tarn resume {name} --force` lets the VM go on now"
            )
        }
        _ => Err(error.into()),
    }
}
