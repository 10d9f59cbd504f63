//! guest-shutdown.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use protocol::{Args, Error};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use super::failed;
use crate::guest::Guest;
use crate::schema::{Command as Declared, Run, Type, optional};
use crate::signals::unblock_for;

pub(crate) const COMMANDS: &[Declared] = &[Declared::new(
    "guest-shutdown",
    "Powers down, halts or reboots the guest; answered only if that fails",
    Run::Worker(shutdown),
)
.takes(&[optional("mode", Type::Str)])
.without_success_response()];

/// How long the program that asks the init for it may take. One that is still running then is taken
/// to be at work.
const ASKING: Duration = Duration::from_secs(10);
/// Most bytes of its complaints that are repeated.
const COMPLAINT: u64 = 4096;

/// Ways to end, the program that asks for each, and `shutdown`'s option for it.
const MODES: &[(&str, &str, &str)] =
    &[("powerdown", "/sbin/poweroff", "-P"), ("halt", "/sbin/halt", "-H"), ("reboot", "/sbin/reboot", "-r")];

/// Asks the guest's init to power down, halt or reboot. Success is not answered: the guest may be
/// gone before the reply.
fn shutdown(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let mode = args.optional_string("mode")?.unwrap_or_else(|| "powerdown".into());
    args.finish()?;
    // The reference's text, its missing parenthesis included.
    let invalid = || Error::generic("mode is invalid (valid values are: halt|powerdown|reboot");
    let &(_, program, option) = MODES.iter().find(|(name, ..)| *name == mode).ok_or_else(invalid)?;
    let mut command = if is_executable(Path::new(program)) {
        Command::new(program)
    } else {
        let mut command = Command::new("/sbin/shutdown");
        command.args(["-h", option, "+0", "hypervisor initiated shutdown"]);
        command
    };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let what = "child process has failed to shutdown";
    let mut child = unblock_for(&mut command).spawn().map_err(|error| failed(what, &error))?;
    match finish(&mut child).map_err(|error| failed(what, &error))? {
        None => Ok(json!({})),
        Some(status) if status.success() || is_swept_away(status) => Ok(json!({})),
        Some(status) => Err(Error::generic(complaint(&mut child, status))),
    }
}

fn is_executable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Waits for the child, but not for ever; `None` if it is still running.
fn finish(child: &mut Child) -> std::io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(fd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
        let limit = Timespec { tv_sec: ASKING.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
        poll(&mut [PollFd::new(&fd.as_fd(), PollFlags::IN)], Some(&limit))?;
    }
    child.try_wait()
}

/// Whether the init has begun: it ends all processes, and the one that has just asked it may be the first.
fn is_swept_away(status: ExitStatus) -> bool {
    matches!(status.signal(), Some(libc::SIGTERM | libc::SIGKILL))
}

fn complaint(child: &mut Child, status: ExitStatus) -> String {
    let mut output = Vec::new();
    if let Some(stderr) = &mut child.stderr {
        // Somebody may have inherited the pipe: take what is there and wait for nobody.
        let nonblocking = rustix::io::ioctl_fionbio(&*stderr, true);
        if nonblocking.is_ok() {
            let _ = stderr.take(COMPLAINT).read_to_end(&mut output);
        }
    }
    let output = String::from_utf8_lossy(&output);
    match (status.code(), output.as_ref()) {
        (Some(code), "") => format!("child process has failed to shutdown: exit status {code}"),
        (Some(_), output) => format!("child process has failed to shutdown: {output}"),
        (None, _) => {
            let signal = status.signal().unwrap_or_default();
            format!("child process has terminated abnormally: signal {signal}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asked_for_the_end_may_be_ended_first() {
        assert!(is_swept_away(ExitStatus::from_raw(libc::SIGTERM)));
        assert!(!is_swept_away(ExitStatus::from_raw(libc::SIGSEGV)));
        assert!(!is_swept_away(ExitStatus::from_raw(1 << 8)));
    }
}
