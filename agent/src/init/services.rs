//! The agent and the shell: started, and started again when they end.
#![expect(unsafe_code, reason = "a shell needs a session of its own before it runs")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, WaitStatus, wait};

use super::{console, say};
use crate::signals::unblock_for;

/// What every service finds in its environment.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("TERM", "linux"),
];
/// A service that ran this long ended for a reason of its own and is started again at once.
const SETTLED: Duration = Duration::from_secs(5);
/// First and longest pause before the next start of one that did not.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LONGEST: Duration = Duration::from_secs(10);

/// The services, by what they are.
#[derive(Debug, Default)]
pub(super) struct Services {
    services: Vec<Service>,
}

#[derive(Debug)]
struct Service {
    // Fixed configuration.
    program: Program,
    // Volatile state.
    run: Run,
    pause: Duration,
}

#[derive(Debug)]
enum Program {
    /// This very binary.
    OwnAgent,
    /// A program and its arguments.
    OtherAgent(Vec<String>),
    /// A login shell on a terminal.
    Shell { terminal: String },
}

#[derive(Clone, Copy, Debug)]
enum Run {
    Running { pid: u32, since: Instant },
    Pausing { until: Instant },
}

impl Services {
    pub(super) fn start_agent(&mut self, other: Option<&[String]>) {
        self.start(match other {
            Some(command) => Program::OtherAgent(command.to_vec()),
            None => Program::OwnAgent,
        });
    }

    /// A shell on this terminal, or on the console.
    pub(super) fn start_shell(&mut self, terminal: Option<&str>) {
        let terminal = terminal.map_or_else(console::terminal, str::to_owned);
        self.start(Program::Shell { terminal });
    }

    /// Takes the status of every process that ended, service or orphan.
    pub(super) fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            let is_it =
                |service: &&mut Service| matches!(service.run, Run::Running { pid: p, .. } if p == pid);
            if let Some(service) = self.services.iter_mut().find(is_it) {
                if !matches!(service.program, Program::Shell { .. }) {
                    say!("{} ended ({}); starting it again", service.program.name(), shown(status));
                }
                service.pause();
            }
        }
    }

    /// When the next service is to be started again.
    pub(super) fn restart_at(&self) -> Option<Instant> {
        let pausing = self.services.iter().filter_map(|service| match service.run {
            Run::Pausing { until } => Some(until),
            Run::Running { .. } => None,
        });
        pausing.min()
    }

    pub(super) fn restart_due(&mut self) {
        let now = Instant::now();
        for service in &mut self.services {
            if matches!(service.run, Run::Pausing { until } if until <= now) {
                service.start();
            }
        }
    }

    fn start(&mut self, program: Program) {
        let mut service =
            Service { program, run: Run::Pausing { until: Instant::now() }, pause: Duration::ZERO };
        service.start();
        self.services.push(service);
    }
}

impl Service {
    fn start(&mut self) {
        match self.program.spawn() {
            Ok(pid) => self.run = Run::Running { pid, since: Instant::now() },
            Err(error) => {
                say!("cannot start {}: {error}", self.program.name());
                self.pause();
            }
        }
    }

    /// Longer each time, unless it had run well.
    fn pause(&mut self) {
        let now = Instant::now();
        self.pause = match self.run {
            Run::Running { since, .. } if now.duration_since(since) >= SETTLED => Duration::ZERO,
            _ => (self.pause * 2).clamp(PAUSE_FIRST, PAUSE_LONGEST),
        };
        self.run = Run::Pausing { until: now + self.pause };
    }
}

impl Program {
    fn name(&self) -> &str {
        match self {
            Self::OwnAgent => "the agent",
            Self::OtherAgent(command) => command.first().map_or("the agent", String::as_str),
            Self::Shell { .. } => "the shell",
        }
    }

    fn spawn(&self) -> io::Result<u32> {
        let mut command = match self {
            Self::OwnAgent => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg0("tarn-agent").stdin(Stdio::null());
                command
            }
            Self::OtherAgent(words) => {
                let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
                let mut command = Command::new(program);
                command.args(arguments).stdin(Stdio::null());
                command
            }
            Self::Shell { terminal } => shell(open_terminal(terminal)?)?,
        };
        command.env_clear().envs(ENVIRONMENT.iter().copied());
        Ok(unblock_for(&mut command).spawn()?.id())
    }
}

fn shown(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "status unknown".into(),
    }
}

fn open_terminal(name: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(Path::new("/dev").join(name))
}

fn shell(terminal: File) -> io::Result<Command> {
    let mut command = Command::new("/bin/sh");
    command.arg("-l").stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
    // SAFETY: between fork and exec only two system calls are made, neither of which allocates or
    // takes a lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            let stdin = rustix::stdio::stdin();
            rustix::process::ioctl_tiocsctty(stdin)?;
            Ok(())
        });
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(run: Run) -> Service {
        Service { program: Program::OwnAgent, run, pause: Duration::ZERO }
    }

    #[test]
    fn a_service_that_keeps_ending_is_started_less_and_less_often() {
        let mut service = service(Run::Running { pid: 1, since: Instant::now() });
        let mut pauses = Vec::new();
        for _ in 0..10 {
            service.pause();
            pauses.push(service.pause);
            service.run = Run::Running { pid: 1, since: Instant::now() };
        }
        assert_eq!(pauses[..3], [PAUSE_FIRST, 2 * PAUSE_FIRST, 4 * PAUSE_FIRST]);
        assert_eq!(pauses[9], PAUSE_LONGEST);
    }

    #[test]
    fn a_service_that_had_run_well_is_started_again_at_once() {
        let Some(since) = Instant::now().checked_sub(SETTLED) else { return };
        let mut service = service(Run::Running { pid: 1, since });
        service.pause();
        assert_eq!(service.pause, Duration::ZERO);
    }
}
