//! Programs that the agent runs for its own commands: `poweroff`, `hwclock`, `chpasswd`.
//!
//! Whatever a program does, the command comes to an end: it has a limit of time, and its complaint is
//! what is in the pipe when it has ended, whoever else may hold the other end.

use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use protocol::Error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::failed;
use crate::signals::unblock_for;

/// Most bytes of a complaint that are repeated.
const COMPLAINT: u64 = 4096;
/// How long a program may take that has to come to an end.
const LIMIT: Duration = Duration::from_secs(60);

/// What became of a program.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It had not ended within the limit.
    Running(Child),
    /// It ended, with this on its standard error.
    Ended(ExitStatus, String),
}

/// Runs a program, with no input unless the caller gave it one, until it ends or `limit` is over.
///
/// # Errors
///
/// Those of starting it and of waiting for it.
pub(super) fn run(command: &mut Command, limit: Duration) -> io::Result<Outcome> {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = unblock_for(command).spawn()?;
    match finish(&mut child, limit)? {
        None => Ok(Outcome::Running(child)),
        Some(status) => Ok(Outcome::Ended(status, complaint(&mut child))),
    }
}

/// Runs a program that has to end well, and soon; `action` says in errors what it was to do.
pub(super) fn succeed(command: &mut Command, action: &str) -> Result<(), Error> {
    let what = format!("child process has failed to {action}");
    match run(command, LIMIT).map_err(|error| failed(&what, &error))? {
        Outcome::Ended(status, _) if status.success() => Ok(()),
        Outcome::Ended(status, complaint) => Err(failure(action, status, &complaint)),
        Outcome::Running(mut child) => {
            // Killed, it ends; and if it hangs in the kernel it is not waited for.
            let _ = child.kill();
            let _ = finish(&mut child, Duration::from_secs(1));
            Err(Error::generic(format!("{what}: not done within {} s", LIMIT.as_secs())))
        }
    }
}

/// The error of a program that ended otherwise than well.
pub(super) fn failure(action: &str, status: ExitStatus, complaint: &str) -> Error {
    Error::generic(match (status.code(), complaint) {
        (Some(code), "") => format!("child process has failed to {action}: exit status {code}"),
        (Some(_), complaint) => format!("child process has failed to {action}: {complaint}"),
        (None, _) => {
            let signal = status.signal().unwrap_or_default();
            format!("child process has terminated abnormally: signal {signal}")
        }
    })
}

/// Waits for the child, but not for ever; `None` if it is still running.
pub(super) fn finish(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let end = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    loop {
        let status = child.try_wait()?;
        let left = deadline.saturating_duration_since(Instant::now());
        if status.is_some() || left.is_zero() {
            return Ok(status);
        }
        match &end {
            Some(end) => drop(poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&timespec(left)))?),
            // Kernels before 5.3 cannot say when it ends.
            None => thread::sleep(left.min(Duration::from_millis(20))),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

fn complaint(child: &mut Child) -> String {
    let mut output = Vec::new();
    if let Some(stderr) = &mut child.stderr {
        // Somebody may have inherited the pipe: take what is there and wait for nobody.
        if rustix::io::ioctl_fionbio(&*stderr, true).is_ok() {
            let _ = stderr.take(COMPLAINT).read_to_end(&mut output);
        }
    }
    String::from_utf8_lossy(&output).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    #[test]
    fn a_complaint_is_repeated_and_silence_gives_the_status() {
        let desc = |script| succeed(&mut shell(script), "do it").unwrap_err().desc;
        assert_eq!(succeed(&mut shell("echo fine"), "do it"), Ok(()));
        assert_eq!(desc("echo no way >&2; exit 3"), "child process has failed to do it: no way\n");
        assert_eq!(desc("exit 3"), "child process has failed to do it: exit status 3");
        assert_eq!(desc("kill -9 $$"), "child process has terminated abnormally: signal 9");
        let missing = succeed(&mut Command::new("/no/such"), "do it").unwrap_err().desc;
        assert_eq!(missing, "child process has failed to do it: No such file or directory");
    }

    #[test]
    fn whoever_holds_the_pipe_holds_up_nothing() {
        let start = Instant::now();
        let Outcome::Ended(status, complaint) =
            run(&mut shell("sleep 30 & echo $! >&2; exit 1"), LIMIT).unwrap()
        else {
            panic!("it ended")
        };
        assert!(start.elapsed() < Duration::from_secs(25));
        assert_eq!(status.code(), Some(1));
        let sleeper = Pid::from_raw(complaint.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(sleeper, rustix::process::Signal::KILL).unwrap();
    }

    #[test]
    fn a_program_that_does_not_end_is_given_back() {
        let Outcome::Running(mut child) = run(&mut shell("exec sleep 30"), Duration::ZERO).unwrap() else {
            panic!("it sleeps")
        };
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
