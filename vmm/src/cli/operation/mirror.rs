//! `tarn mirror`.

use clap::Args;
use coordinator::operation::{CopyMode, Request};

use super::pivot::copy_mode;
use super::{Disks, Target, carry_out};

/// Copy disks of a running VM, as they are when the copy is complete
///
/// With several disks, `--pause` or `--freeze` makes the copies those of one moment; one of them is needed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn mirror web disk0=/copies/root.raw --freeze")]
pub(in super::super) struct MirrorArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    disks: Disks,
    /// When a guest's write is done meanwhile: background (the disk has it) or write-blocking (the copy, too)
    #[arg(long, value_name = "MODE", default_value = "background", value_parser = copy_mode)]
    copy_mode: CopyMode,
}

pub(in super::super) fn run(args: &MirrorArgs) -> anyhow::Result<u8> {
    let mut request = args.disks.fill(Request::mirror(args.disks.disks.clone()));
    request.settings.copy_mode = args.copy_mode;
    carry_out(&args.target, &request)
}
