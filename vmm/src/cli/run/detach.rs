//! `tarn run --detach`.
//!
//! ```text
//!   tarn run --detach ──▶ tarn run --detach --detached        in a session of its own
//!        │                     │  standard error is still the caller's: early errors are seen
//!        │ ◀── name, newline ──┤  by standard output, once the VM runs; from here on both go to the log
//!   prints the name            ▼
//!   asks the agent: mounted?
//!        │ ◀── end of file ──── it failed: its exit status becomes ours
//! ```

use std::env;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use super::mounts;
use crate::cli::output;
use crate::run_dir::RunningVm;

/// Starts this command line again in the background and waits until its VM runs, or cannot; and then until the guest has
/// mounted what was asked for, if somebody has the `patience`.
pub(super) fn run_again(patience: Option<Duration>) -> anyhow::Result<u8> {
    let executable = env::current_exe().context("Cannot find this executable")?;
    let mut child = Command::new(&executable)
        .args(env::args_os().skip(1))
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("Cannot start {executable:?} in the background"))?;
    let mut name = String::new();
    if let Some(ready) = child.stdout.take() {
        BufReader::new(ready).read_line(&mut name).context("Cannot hear from the VM in the background")?;
    }
    if name.ends_with('\n') {
        output::print(&name)?;
        if let Some(patience) = patience {
            check_mounts(name.trim_end(), patience)?;
        }
        return Ok(0);
    }
    let status = child.wait().context("Cannot wait for the VM in the background")?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::cli::FAILURE))
}

/// Whether the guest has mounted everything. A VM whose guest has not is left to whoever wants to look at it.
fn check_mounts(name: &str, patience: Duration) -> anyhow::Result<()> {
    let ended = || format!("VM {name} has ended before its guest could tell of its mounts");
    let vm = RunningVm::open(name).with_context(ended)?;
    let Err(error) = mounts::wait_and_check(&vm, patience) else { return Ok(()) };
    if vm.is_alive() {
        let runs = format!("VM {name} runs, but not as it should (`tarn stop {name}` ends it)");
        return Err(error).context(runs);
    }
    Err(error).with_context(ended)
}

/// Leaves the caller's session: neither its terminal nor its end concern this process any more.
pub(super) fn leave_session() -> anyhow::Result<()> {
    rustix::process::setsid().context("Cannot make a session of its own")?;
    Ok(())
}

/// Tells the caller that the VM runs, and turns standard output and error to the log.
pub(super) fn tell(name: &str, log: &File) {
    let mut stdout = io::stdout();
    // A caller that has left loses nothing: the VM runs, and `tarn ps` shows it.
    let told = writeln!(stdout, "{name}").and_then(|()| stdout.flush());
    if let Err(error) = told.and_then(|()| Ok(rustix::stdio::dup2_stdout(log)?)) {
        tracing::warn!("Nobody waits for VM {name} to run: {error}");
    }
    if let Err(error) = rustix::stdio::dup2_stderr(log) {
        tracing::warn!("Messages stay where they are: {error}");
    }
}
