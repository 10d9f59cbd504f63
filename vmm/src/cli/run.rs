//! `tarn run`: the only subcommand that starts a VM.
//!
//! ```text
//!   flags, --config ─▶ VmSpec ─▶ checks without side effects ─▶ RunDir ─▶ images ─▶ VM, until it ends ─▶ exit status
//!                        │                                        ▲         └ the one that each disk has by now
//!                    --dry-run: print it       --detach: the same again in a process of its own
//! ```

mod detach;
mod exec;
mod flags;
pub(super) mod guest_image;
mod images;
mod mounts;

use anyhow::{Context, anyhow};

use super::{Global, output};
use crate::config::VmSpec;
use crate::host::{self, HostError};
use crate::run_dir::RunDir;
use crate::vm::{self, Foreground, Outcome, RunError, Terminal};

pub(super) use flags::RunArgs;

pub(super) fn run(args: RunArgs, global: &Global) -> anyhow::Result<u8> {
    let mut spec = args.to_spec().and_then(|spec| {
        spec.validate()?;
        Ok(spec)
    })?;
    if args.dry_run {
        output::print_json(&spec)?;
        return Ok(0);
    }
    if args.detach && !args.detached {
        let awaits_mounts = mounts::are_wanted(&spec) && !spec.start_paused;
        return detach::run_again(awaits_mounts.then(|| args.agent_timeout()));
    }
    if args.detached {
        detach::leave_session()?;
    }
    host::refuse_too_much_memory(spec.memory.size).map_err(with_advice)?;
    if !args.software_kvm {
        host::refuse_software_kvm().map_err(with_advice)?;
    }
    // What the VM calls its images is written down, and read by processes that are elsewhere.
    spec = spec.with_absolute_paths().context("Cannot tell the current directory")?;
    let dir = RunDir::create(&spec.name)?;
    images::settle(&mut spec, &args.force_stale_source)?;
    dir.write_config(&spec)?;
    let patience = args.agent_timeout();
    if let Some(command) = args.exec {
        let plan = exec::Plan { command, input: !args.no_input, patience };
        return exec::run(&spec, &dir, plan, global.verbose > 0);
    }
    let foreground = if args.detached {
        let (name, log) = (spec.name.clone(), dir.create_log()?);
        Foreground { terminal: Terminal::Detached, ready: Some(Box::new(move || detach::tell(&name, &log))) }
    } else {
        Foreground { terminal: Terminal::Attached, ready: None }
    };
    start(&spec, &dir, foreground)
}

/// Runs the VM to its end.
fn start(spec: &VmSpec, dir: &RunDir, foreground: Foreground) -> anyhow::Result<u8> {
    let outcome = run_vm(spec, dir, foreground)?;
    if outcome.exit == 0 {
        tracing::info!("VM {} has ended: {}", spec.name, outcome.cause);
    } else {
        output::complain(&format!("VM {} has ended: {}", spec.name, outcome.cause));
    }
    Ok(outcome.exit)
}

fn run_vm(spec: &VmSpec, dir: &RunDir, foreground: Foreground) -> anyhow::Result<Outcome> {
    vm::run(spec, dir, foreground)
        .map_err(|error| match error {
            RunError::Host(error) => with_advice(error),
            error => error.into(),
        })
        .with_context(|| format!("Cannot run VM {}", spec.name))
}

fn with_advice(error: HostError) -> anyhow::Error {
    let advice = error.advice();
    anyhow!("{:#}; {advice}", anyhow::Error::new(error))
}
