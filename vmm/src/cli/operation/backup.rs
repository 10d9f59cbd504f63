//! `tarn backup`.

use clap::Args;
use coordinator::operation::Request;

use super::{Disks, Target, carry_out};

/// Copy disks of a running VM, as they are now
///
/// The copies are of one moment, at the beginning: the guest goes on at once, and what it overwrites is copied before.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  tarn backup web disk0=/backups/root.raw disk1=/backups/data.raw --freeze"
)]
pub(in super::super) struct BackupArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    disks: Disks,
}

pub(in super::super) fn run(args: &BackupArgs) -> anyhow::Result<u8> {
    carry_out(&args.target, &args.disks.fill(Request::backup(args.disks.disks.clone())))
}
