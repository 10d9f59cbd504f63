//! `tarn recover`.

use clap::{Args, ValueEnum};
use coordinator::journal::Side;
use coordinator::operation::{self, Liveness};
use coordinator::resolve::Resolver;

use super::super::output;
use super::{Target, fail, tell_recovery};
use crate::run_dir::{RunDir, RunDirError};

/// Find out what became of an operation on disks, and settle it
///
/// What was decided is finished, what was not is undone; a guest that was frozen or stopped for it goes on. Says what
/// happened and why. The second time it does nothing. `tarn op resume` goes on with the operation instead.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn recover web\n  tarn recover web --use source")]
pub(in super::super) struct RecoverArgs {
    #[command(flatten)]
    target: Target,
    /// Which image to go on with where nothing else can tell; only for a VM that does not run
    #[arg(long = "use", value_name = "SIDE")]
    side: Option<ChosenSide>,
    /// A VM of another VMM is not running any more: you have made sure of it
    #[arg(long, requires = "monitor")]
    dead: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ChosenSide {
    /// The image that the disk was before
    Source,
    /// The image that it was copied to
    Target,
}

pub(in super::super) fn run(args: &RecoverArgs) -> anyhow::Result<u8> {
    let target = &args.target;
    let state = target.state()?;
    // As long as this is held, no VM of that name starts.
    let lock = match (&target.monitor, args.dead) {
        (Some(_), _) => None,
        (None, _) => match RunDir::create(&target.name) {
            Ok(lock) => Some(lock),
            Err(RunDirError::AlreadyRunning { .. }) => None,
            Err(error) => return Err(error.into()),
        },
    };
    if args.dead || lock.is_some() {
        let resolver = match args.side {
            Some(ChosenSide::Source) => Resolver::choosing(Side::Source),
            Some(ChosenSide::Target) => Resolver::choosing(Side::Target),
            None => Resolver::new(),
        };
        let resolver = if args.dead { resolver.of_any_vmm() } else { resolver };
        return match resolver.run(&state) {
            Ok(resolution) => tell_recovery(target, &operation::resolved(resolution)),
            Err(error) => fail(target, error.into()),
        };
    }
    if args.side.is_some() {
        output::complain("the VM runs, and is asked: --use is for one that does not");
        return Ok(super::FAILURE);
    }
    match operation::recover(&state, &Liveness::Alive(target.connection()?), &mut target.observer()) {
        Ok(recovery) => tell_recovery(target, &recovery),
        Err(error) => fail(target, error),
    }
}
