//! guest-suspend-ram, guest-suspend-disk, guest-suspend-hybrid.
//!
//! ```text
//!   systemd ─ knows it? ─▶ systemctl suspend ───────────┐
//!      │ no, or it failed                               │
//!   pm-utils ─ knows it? ─▶ pm-suspend ─────────────────┼─▶ asleep … awake
//!      │ no, or it failed                               │
//!   kernel ─ knows it? ─▶ "mem" into /sys/power/state ──┘
//!      │ no, or it failed
//!      ▼
//!   the last failure, or "not supported"
//! ```
//!
//! Success is not answered: nobody knows when the guest wakes, and who asked has seen it fall asleep. So the last of
//! the three, which returns only after the guest is awake again, holds up nobody but other commands on the worker.
//!
//! The reference has no hybrid sleep by the kernel alone. The kernel has one ("suspend" in `/sys/power/disk`: write
//! the image as for hibernation, then suspend to RAM), and so has this agent.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use protocol::{Args, Error};
use serde_json::{Value, json};

use super::child::{self, Outcome};
use super::failed;
use super::shutdown::is_executable;
use crate::schema::{Command as Declared, Run};

pub(crate) const COMMANDS: &[Declared] = &[
    Declared::new(
        "guest-suspend-disk",
        "Writes the guest's memory to its swap space and powers it off; answered only if that fails",
        Run::Worker(|_, args| suspend(&DISK, args)),
    )
    .without_success_response(),
    Declared::new(
        "guest-suspend-ram",
        "Suspends the guest to RAM until the host wakes it; answered only if that fails",
        Run::Worker(|_, args| suspend(&RAM, args)),
    )
    .without_success_response(),
    Declared::new(
        "guest-suspend-hybrid",
        "Suspends the guest to RAM with an image in its swap space; answered only if that fails",
        Run::Worker(|_, args| suspend(&HYBRID, args)),
    )
    .without_success_response(),
];

/// How long a program may take to say what it can do.
const ANSWERING: Duration = Duration::from_secs(10);
/// How long, not counting the sleep, a program may take that puts the guest to sleep. One that is still running then is
/// taken to be at work.
const SUSPENDING: Duration = Duration::from_secs(60);

/// A way to sleep, in the words of those who can do it.
struct Mode {
    /// systemd: the verb, and the unit behind it.
    verb: &'static str,
    unit: &'static str,
    /// pm-utils: the option that asks, and the program.
    option: &'static str,
    program: &'static str,
    /// The kernel: what goes into `/sys/power/disk` first, if anything, and into `/sys/power/state`.
    disk: Option<&'static str>,
    state: &'static str,
}

const DISK: Mode = Mode {
    verb: "hibernate",
    unit: "systemd-hibernate",
    option: "--hibernate",
    program: "pm-hibernate",
    disk: None,
    state: "disk",
};
const RAM: Mode = Mode {
    verb: "suspend",
    unit: "systemd-suspend",
    option: "--suspend",
    program: "pm-suspend",
    disk: None,
    state: "mem",
};
const HYBRID: Mode = Mode {
    verb: "hybrid-sleep",
    unit: "systemd-hybrid-sleep",
    option: "--suspend-hybrid",
    program: "pm-suspend-hybrid",
    disk: Some("suspend"),
    state: "disk",
};

fn suspend(mode: &Mode, args: Args) -> Result<Value, Error> {
    args.finish()?;
    System::of_this_guest().suspend(mode).map(|()| json!({}))
}

/// Where the programs and the kernel's files are.
struct System {
    programs: Vec<PathBuf>,
    power: PathBuf,
}

impl System {
    fn of_this_guest() -> Self {
        let path = env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        Self { programs: env::split_paths(&path).collect(), power: "/sys/power".into() }
    }

    fn suspend(&self, mode: &Mode) -> Result<(), Error> {
        type Way = (fn(&System, &Mode) -> bool, fn(&System, &Mode) -> Result<(), Error>);
        const WAYS: [Way; 3] = [
            (System::systemd_knows, System::by_systemd),
            (System::pm_utils_know, System::by_pm_utils),
            (System::kernel_knows, System::by_kernel),
        ];
        let mut result = Err(Error::generic("the requested suspend mode is not supported by the guest"));
        for (knows, way) in WAYS {
            if knows(self, mode) {
                result = way(self, mode);
                if result.is_ok() {
                    break;
                }
            }
        }
        result
    }

    /// `systemctl status` says 1 to 3 about a unit that is there and does not run; 4 would be no such unit.
    fn systemd_knows(&self, mode: &Mode) -> bool {
        self.ask("systemctl", &["status", mode.unit]).is_some_and(|code| (1..=3).contains(&code))
    }

    fn by_systemd(&self, mode: &Mode) -> Result<(), Error> {
        self.run("systemctl", &[mode.verb], &format!("systemctl {}", mode.verb))
    }

    fn pm_utils_know(&self, mode: &Mode) -> bool {
        self.ask("pm-is-supported", &[mode.option]) == Some(0)
    }

    fn by_pm_utils(&self, mode: &Mode) -> Result<(), Error> {
        self.run(mode.program, &[], mode.program)
    }

    fn kernel_knows(&self, mode: &Mode) -> bool {
        let offers = |file: &str, word: &str| {
            let text = fs::read_to_string(self.power.join(file)).unwrap_or_default();
            // The one in use is in brackets.
            text.split_whitespace().any(|offered| offered.trim_matches(['[', ']']) == word)
        };
        offers("state", mode.state) && mode.disk.is_none_or(|word| offers("disk", word))
    }

    /// Returns when the guest is awake again.
    fn by_kernel(&self, mode: &Mode) -> Result<(), Error> {
        let before = mode.disk.and_then(|_| self.disk_mode());
        if let Some(word) = mode.disk {
            self.write("disk", word)?;
        }
        let result = self.write("state", mode.state);
        // A later guest-suspend-disk is to power off.
        if let Some(before) = before {
            self.write("disk", &before)?;
        }
        result
    }

    /// What `/sys/power/disk` is set to.
    fn disk_mode(&self) -> Option<String> {
        let text = fs::read_to_string(self.power.join("disk")).ok()?;
        let word = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))?;
        Some(word.to_owned())
    }

    /// One write, never repeated: each of them would be another sleep.
    fn write(&self, file: &str, word: &str) -> Result<(), Error> {
        let path = self.power.join(file);
        let written = fs::OpenOptions::new().write(true).open(&path).and_then(|mut file| {
            let count = file.write(word.as_bytes())?;
            if count < word.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
        });
        written.map_err(|error| failed(format_args!("suspend: cannot write to '{}'", path.display()), &error))
    }

    /// The exit status of a program that only answers a question; `None` if it does not in time, or is not there.
    fn ask(&self, program: &str, arguments: &[&str]) -> Option<i32> {
        match child::run(&mut self.command(program, arguments)?, ANSWERING).ok()? {
            Outcome::Ended(status, _) => status.code(),
            Outcome::Running(mut child) => {
                // Killed, it ends; and if it hangs in the kernel it is not waited for.
                let _ = child.kill();
                let _ = child::finish(&mut child, Duration::from_secs(1));
                None
            }
        }
    }

    /// Runs a program that puts the guest to sleep, and may end before or after that.
    fn run(&self, program: &str, arguments: &[&str], name: &str) -> Result<(), Error> {
        let not_found = || Error::generic(format!("the helper program '{name}' was not found"));
        let mut command = self.command(program, arguments).ok_or_else(not_found)?;
        let action = "suspend";
        match child::run(&mut command, SUSPENDING)
            .map_err(|error| failed(format_args!("child process has failed to {action}"), &error))?
        {
            // Still at work.
            Outcome::Running(_) => Ok(()),
            Outcome::Ended(status, _) if status.success() => Ok(()),
            Outcome::Ended(status, complaint) => Err(match status.code() {
                Some(code) => Error::generic(format!(
                    "the helper program '{name}' returned an unexpected exit status code ({code})"
                )),
                None => child::failure(action, status, &complaint),
            }),
        }
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Option<Command> {
        let mut found = self.programs.iter().map(|directory| directory.join(program));
        let mut command = Command::new(found.find(|path| is_executable(path))?);
        command.args(arguments).stdin(Stdio::null());
        Some(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNSUPPORTED: &str = "the requested suspend mode is not supported by the guest";

    /// A guest with some programs, and what the kernel offers.
    struct Fake {
        dir: tempfile::TempDir,
        system: System,
    }

    impl Fake {
        fn new(state: &str, disk: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("state"), state).unwrap();
            fs::write(dir.path().join("disk"), disk).unwrap();
            let system = System { programs: vec![dir.path().into()], power: dir.path().into() };
            Self { dir, system }
        }

        /// A program that notes how it was called. Another process writes it: a descriptor of ours, inherited by a
        /// child of another test, would make it busy.
        fn program(self, name: &str, script: &str) -> Self {
            let write = r#"printf '#!/bin/sh\necho %s $* >>"%s"\n%s\n' "$1" "$0/calls" "$2" >"$0/$1" && chmod 755 "$0/$1""#;
            let written =
                Command::new("sh").arg("-c").arg(write).arg(self.dir.path()).args([name, script]).status();
            assert!(written.unwrap().success());
            self
        }

        fn suspend(&self, mode: &Mode) -> Result<(), String> {
            self.system.suspend(mode).map_err(|error| error.desc)
        }

        fn read(&self, file: &str) -> String {
            fs::read_to_string(self.dir.path().join(file)).unwrap_or_default()
        }
    }

    #[test]
    fn systemd_is_asked_first_and_is_enough() {
        let guest = Fake::new("freeze mem disk\n", "")
            .program("systemctl", "[ $1 = status ] && exit 3; exit 0")
            .program("pm-is-supported", "exit 0");
        assert_eq!(guest.suspend(&HYBRID), Ok(()));
        assert_eq!(guest.read("calls"), "systemctl status systemd-hybrid-sleep\nsystemctl hybrid-sleep\n");
        assert_eq!(guest.read("state"), "freeze mem disk\n", "the kernel was not asked");
    }

    #[test]
    fn a_unit_that_is_not_there_leaves_it_to_pm_utils() {
        let guest = Fake::new("", "")
            .program("systemctl", "exit 4")
            .program("pm-is-supported", "exit 0")
            .program("pm-hibernate", "exit 0");
        assert_eq!(guest.suspend(&DISK), Ok(()));
        let calls = "systemctl status systemd-hibernate\npm-is-supported --hibernate\npm-hibernate\n";
        assert_eq!(guest.read("calls"), calls);
    }

    #[test]
    fn what_fails_elsewhere_the_kernel_may_still_do() {
        let guest = Fake::new("freeze mem disk\n", "")
            .program("systemctl", "[ $1 = status ] && exit 3; exit 1")
            .program("pm-is-supported", "exit 0");
        assert_eq!(guest.suspend(&RAM), Ok(()));
        assert!(guest.read("state").starts_with("mem"), "{}", guest.read("state"));
    }

    #[test]
    fn the_kernels_hybrid_sleep_is_set_and_put_back() {
        let guest = Fake::new("freeze mem disk\n", "[platform] shutdown reboot suspend test_resume\n");
        assert_eq!(guest.suspend(&HYBRID), Ok(()));
        assert!(guest.read("state").starts_with("disk"));
        assert!(guest.read("disk").starts_with("platform"), "{}", guest.read("disk"));
    }

    #[test]
    fn a_mode_that_nobody_offers_is_not_supported() {
        assert_eq!(Fake::new("freeze mem\n", "").suspend(&DISK), Err(UNSUPPORTED.into()));
        assert_eq!(Fake::new("freeze memory\n", "").suspend(&RAM), Err(UNSUPPORTED.into()));
        let guest = Fake::new("freeze mem disk\n", "[shutdown] reboot\n");
        assert_eq!(guest.suspend(&HYBRID), Err(UNSUPPORTED.into()));
        let guest = Fake::new("", "").program("systemctl", "exit 4").program("pm-is-supported", "exit 1");
        assert_eq!(guest.suspend(&RAM), Err(UNSUPPORTED.into()));
    }

    #[test]
    fn the_last_failure_is_told() {
        let guest = Fake::new("", "").program("systemctl", "[ $1 = status ] && exit 3; exit 7");
        let text = "the helper program 'systemctl suspend' returned an unexpected exit status code (7)";
        assert_eq!(guest.suspend(&RAM), Err(text.into()));
        let guest = guest.program("pm-is-supported", "exit 0");
        let text = "the helper program 'pm-suspend' was not found";
        assert_eq!(guest.suspend(&RAM), Err(text.into()));
        let guest = guest.program("pm-suspend", "kill -9 $$");
        let text = "child process has terminated abnormally: signal 9";
        assert_eq!(guest.suspend(&RAM), Err(text.into()));
    }

    #[test]
    fn a_kernel_that_refuses_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        // A directory can be asked for what it holds, not be written to.
        fs::create_dir(&path).unwrap();
        let system = System { programs: vec![], power: dir.path().into() };
        let error = system.by_kernel(&RAM).unwrap_err();
        assert_eq!(error.desc, format!("suspend: cannot write to '{}': Is a directory", path.display()));
    }
}
