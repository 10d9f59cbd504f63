//! `tarn pivot`.

use std::time::Duration;

use clap::Args;
use coordinator::journal::Protocol;
use coordinator::operation::{CopyMode, Request};

use super::{Disks, Target, carry_out, duration, protocol};

/// Move disks of a running VM to other images
///
/// Each disk is copied while the guest works on it; then, at one moment for all disks, the copies take their place. If
/// this process, the VM or the machine dies at any point, `tarn run` and `tarn recover` still know which image is the
/// disk. The former images are stamped, so that nobody boots one by mistake.
///
/// SIGINT, SIGTERM and SIGHUP undo what is not decided yet.
///
/// Exit status: 0 done, 1 refused before anything changed, 3 aborted and everything as before, 4 not settled.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn pivot web disk0=/fast/root.raw\n  \
    tarn pivot web disk0=/fast/root.raw disk1=/fast/data.raw --freeze --max-hold 50ms")]
pub(in super::super) struct PivotArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    disks: Disks,
    /// When a guest's write is done meanwhile: background (the disk has it) or write-blocking (the copy, too)
    #[arg(long, value_name = "MODE", default_value = "background", value_parser = copy_mode)]
    copy_mode: CopyMode,
    /// Wait until the guest's I/O would be held no longer than this
    #[arg(long, value_name = "TIME", value_parser = duration)]
    max_hold: Option<Duration>,
    /// Do not stamp the former images: they stay bootable
    #[arg(long, conflicts_with = "retire_source")]
    keep_source: bool,
    /// Stamp the former images as superseded (the default)
    #[arg(long)]
    retire_source: bool,
    /// Who decides: a, the VM; or b, this process, as QEMU needs it
    #[arg(long, value_name = "a|b", default_value = "a", value_parser = protocol)]
    protocol: Protocol,
}

pub(super) fn copy_mode(text: &str) -> Result<CopyMode, String> {
    let modes = [CopyMode::Background, CopyMode::WriteBlocking];
    let found = modes.into_iter().find(|mode| mode.name() == text);
    found.ok_or_else(|| "expected background or write-blocking".to_owned())
}

pub(in super::super) fn run(args: &PivotArgs) -> anyhow::Result<u8> {
    let mut request = args.disks.fill(Request::pivot(args.disks.disks.clone()));
    request.protocol = args.protocol;
    request.retire_source = !args.keep_source;
    request.settings.copy_mode = args.copy_mode;
    request.settings.max_hold = args.max_hold;
    carry_out(&args.target, &request)
}
