//! guest-shutdown.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use protocol::{Args, Error};
use serde_json::{Value, json};

use super::child::{self, Outcome};
use super::failed;
use crate::guest::Guest;
use crate::schema::{Command as Declared, Run, Type, optional};

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
    let ended = child::run(command.stdin(Stdio::null()), ASKING);
    match ended.map_err(|error| failed("child process has failed to shutdown", &error))? {
        Outcome::Running(_) => Ok(json!({})),
        Outcome::Ended(status, _) if status.success() || is_swept_away(status) => Ok(json!({})),
        Outcome::Ended(status, complaint) => Err(child::failure("shutdown", status, &complaint)),
    }
}

pub(super) fn is_executable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Whether the init has begun: it ends all processes, and the one that has just asked it may be the first.
fn is_swept_away(status: ExitStatus) -> bool {
    matches!(status.signal(), Some(libc::SIGTERM | libc::SIGKILL))
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
