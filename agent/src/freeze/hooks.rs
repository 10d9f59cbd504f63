//! Hooks: programs that bring applications to rest before a freeze and let them go on after the thaw.
//!
//! A hook may take only so long; then its process group is killed. Its output goes to a file in memory, not
//! into a pipe: nobody waits for the end of a pipe that a background child holds, and that child does not
//! get a SIGPIPE in return. That child lives on, if the hook itself ends well: it may hold a lock that it is to
//! hold until the thaw.
//!
//! Every hook whose `freeze` was started gets its `thaw`, however that freeze ended.
#![expect(unsafe_code, reason = "a hook asks the kernel to end with its agent")]

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, MemfdFlags, access, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::{Value, json};

use super::report::HookRun;
use crate::commands::errno_text;
use crate::signals::unblock_for;

/// How long a hook that was killed is waited for.
const REAPING: Duration = Duration::from_secs(1);
/// Most bytes of a hook's complaints that are repeated.
const COMPLAINT: u64 = 4096;

/// Which hooks there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hooks {
    pub(crate) program: Option<PathBuf>,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Freeze,
    Thaw,
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
        }
    }
}

impl Hooks {
    /// Absolute: the watchdog works elsewhere.
    pub(crate) fn new(
        program: Option<PathBuf>,
        directory: Option<PathBuf>,
        timeout: Duration,
    ) -> io::Result<Self> {
        let absolute = |path: Option<PathBuf>| path.map(std::path::absolute).transpose();
        Ok(Self { program: absolute(program)?, directory: absolute(directory)?, timeout })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.program.is_none() && self.directory.is_none()
    }

    /// Runs the hooks before a freeze until one fails or `cancelled` becomes readable. `tell` hears of the process
    /// group of each that runs, and of 0 once it is over; `note` of how it ended.
    ///
    /// # Errors
    ///
    /// What the first one that failed said.
    pub(crate) fn freeze(
        &self,
        cancelled: BorrowedFd<'_>,
        mut tell: impl FnMut(u32),
        mut note: impl FnMut(HookRun),
    ) -> Result<(), String> {
        for program in self.programs() {
            let run = self.run(&program, Phase::Freeze, Some(cancelled), &mut tell);
            let error = run.error.clone();
            note(run);
            if let Some(error) = error {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Runs the hooks after a thaw: all of `programs`, whatever becomes of them.
    pub(crate) fn thaw(&self, programs: &[PathBuf], mut note: impl FnMut(HookRun)) {
        for program in programs {
            note(self.run(program, Phase::Thaw, None, |_| {}));
        }
    }

    /// The programs in the order of running them, for either phase, as qemu-ga's own dispatcher has it.
    pub(crate) fn programs(&self) -> Vec<PathBuf> {
        let entries = self.directory.iter().flat_map(fs::read_dir).flatten().filter_map(Result::ok);
        let mut programs: Vec<PathBuf> =
            entries.map(|entry| entry.path()).filter(|path| is_hook(path)).collect();
        programs.sort();
        self.program.iter().cloned().chain(programs).collect()
    }

    fn run(
        &self,
        program: &Path,
        phase: Phase,
        cancelled: Option<BorrowedFd<'_>>,
        mut tell: impl FnMut(u32),
    ) -> HookRun {
        let start = Instant::now();
        let mut started = false;
        let note = |group| {
            started |= group != 0;
            tell(group);
        };
        let error = run(program, phase, self.timeout, cancelled, note).err();
        HookRun { program: program.to_owned(), phase: phase.word(), started, error, took: start.elapsed() }
    }

    pub(crate) fn to_json(&self) -> Value {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        json!({
            "program": path(&self.program),
            "directory": path(&self.directory),
            "timeout": super::report::milliseconds(self.timeout),
        })
    }

    pub(crate) fn from_json(value: &Value) -> Self {
        let path = |name: &str| value[name].as_str().map(PathBuf::from);
        let timeout = Duration::from_millis(value["timeout"].as_u64().unwrap_or_default());
        Self { program: path("program"), directory: path("directory"), timeout }
    }
}

/// Executable, and no leftover of an editor or a package manager.
fn is_hook(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let leftovers = ["~", ".bak", ".orig", ".rpmnew", ".rpmorig", ".rpmsave", ".sample"];
    let is_leftover = leftovers.iter().any(|suffix| name.ends_with(suffix)) || name.contains(".dpkg-");
    !is_leftover && path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

fn run(
    program: &Path,
    phase: Phase,
    timeout: Duration,
    cancelled: Option<BorrowedFd<'_>>,
    mut tell: impl FnMut(u32),
) -> Result<(), String> {
    let not_started =
        |error: io::Error| format!("failed to exec '{}': {}\n", program.display(), errno_text(&error));
    let mut output = output().map_err(not_started)?;
    let mut command = Command::new(program);
    command.arg(phase.word()).stdin(Stdio::null()).process_group(0);
    let handle = || output.try_clone().map(Stdio::from);
    command.stdout(handle().map_err(not_started)?).stderr(handle().map_err(not_started)?);
    let mut child = unblock_for(die_with_us(&mut command)).spawn().map_err(not_started)?;
    tell(child.id());
    let ended = wait(&mut child, timeout, cancelled);
    if !matches!(ended, Ok(Ended::Itself(_))) {
        kill(&mut child);
    }
    tell(0);
    let status = match ended {
        Ok(Ended::Itself(status)) => status,
        Ok(Ended::Late) => {
            return Err(format!("'{}' did not end within {} s", program.display(), timeout.as_secs_f32()));
        }
        Ok(Ended::Cancelled) => {
            return Err(format!("'{}' was still running when the freeze was cancelled", program.display()));
        }
        Err(error) => {
            return Err(format!("cannot wait for '{}': {}", program.display(), errno_text(&error)));
        }
    };
    if status.success() { Ok(()) } else { Err(complaint(&mut output, status)) }
}

/// A hook whose agent has died must not go on beside its own thaw. What it has started is another's to end.
fn die_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only one system call is made, which neither allocates nor takes a lock.
    unsafe { command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)) }
}

enum Ended {
    Itself(ExitStatus),
    Late,
    Cancelled,
}

fn wait(child: &mut Child, timeout: Duration, cancelled: Option<BorrowedFd<'_>>) -> io::Result<Ended> {
    let process = pidfd(child)?;
    let deadline = Instant::now() + timeout;
    loop {
        let mut fds = vec![PollFd::new(&process, PollFlags::IN)];
        fds.extend(cancelled.iter().map(|cancelled| PollFd::new(cancelled, PollFlags::IN)));
        let rest = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: rest.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: rest.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_cancelled = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::Itself(status));
        }
        if is_cancelled {
            return Ok(Ended::Cancelled);
        }
        if rest.is_zero() {
            return Ok(Ended::Late);
        }
    }
}

fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    Ok(pidfd_open(pid.ok_or(io::ErrorKind::NotFound)?, PidfdFlags::empty())?)
}

/// Kills the hook and what it started.
fn kill(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.kill();
    // A process in an uninterruptible call may take longer; it stays a zombie then.
    let _ = wait(child, REAPING, None);
}

/// Kills the hook of an agent that died.
pub(crate) fn kill_group(group: u32) {
    if let Some(group) = i32::try_from(group).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

fn output() -> io::Result<File> {
    Ok(memfd_create("hook output", MemfdFlags::CLOEXEC)?.into())
}

fn complaint(output: &mut File, status: ExitStatus) -> String {
    let mut text = Vec::new();
    let _ = output.rewind();
    let _ = output.take(COMPLAINT).read_to_end(&mut text);
    match (status.code(), status.signal()) {
        _ if !text.is_empty() => String::from_utf8_lossy(&text).into_owned(),
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn script(directory: &Path, name: &str, text: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn freeze(hooks: &Hooks) -> (Result<(), String>, Vec<HookRun>) {
        let never = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut runs = Vec::new();
        let result = hooks.freeze(never.as_fd(), |_| {}, |run| runs.push(run));
        (result, runs)
    }

    fn hook(program: PathBuf) -> Hooks {
        Hooks { program: Some(program), directory: None, timeout: Duration::from_secs(30) }
    }

    #[test]
    fn a_hook_is_told_the_phase_and_its_complaint_is_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let text = format!(
            "echo $1 >> {}; echo hook says no; exit $(test $1 = thaw; echo $?)",
            directory.path().join("log").display()
        );
        let hooks = hook(script(directory.path(), "hook", &text));
        let (result, runs) = freeze(&hooks);
        assert_eq!(result, Err("hook says no\n".into()));
        assert!(runs[0].started);
        let mut after = Vec::new();
        hooks.thaw(&hooks.programs(), |run| after.push(run));
        assert_eq!((after[0].phase, &after[0].error), ("thaw", &None));
        assert_eq!(fs::read_to_string(directory.path().join("log")).unwrap(), "freeze\nthaw\n");
    }

    #[test]
    fn a_hook_that_cannot_run_is_named_and_was_not_started() {
        let (result, runs) = freeze(&hook("/nonexistent/hook".into()));
        assert_eq!(result, Err("failed to exec '/nonexistent/hook': No such file or directory\n".into()));
        assert!(!runs[0].started);
    }

    #[test]
    fn a_background_child_that_holds_the_output_delays_nothing_and_lives_on() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let text = format!("sleep 60 & echo $! > {}", pid.display());
        let start = Instant::now();
        assert_eq!(freeze(&hook(script(directory.path(), "hook", &text))).0, Ok(()));
        assert!(start.elapsed() < Duration::from_secs(20));
        let pid = fs::read_to_string(pid).unwrap();
        let status = Command::new("kill").arg(pid.trim()).status().unwrap();
        assert!(status.success(), "the child had ended");
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_with_all_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let text = format!("sleep 1000 & echo $! > {}; wait", pid.display());
        let program = script(directory.path(), "hook", &text);
        let hooks = Hooks { timeout: Duration::from_millis(700), ..hook(program.clone()) };
        let (result, _) = freeze(&hooks);
        assert_eq!(result, Err(format!("'{}' did not end within 0.7 s", program.display())));
        let stat = format!("/proc/{}/stat", fs::read_to_string(pid).unwrap().trim());
        let deadline = Instant::now() + Duration::from_secs(20);
        // Gone, or a zombie that its new parent has not reaped.
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < deadline, "still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_cancelled_freeze_does_not_wait_for_its_hook() {
        let directory = tempfile::tempdir().unwrap();
        let hooks = hook(script(directory.path(), "hook", "sleep 1000"));
        let cancelled = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
        let error = hooks.freeze(cancelled.as_fd(), |_| {}, |_| {}).unwrap_err();
        assert!(error.contains("was still running when the freeze was cancelled"), "{error}");
    }

    #[test]
    fn a_directory_runs_in_order_without_leftovers_and_stops_at_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["20-b", "10-a", "30-c", "15-x.bak", "16-y~", "17-z.dpkg-old", "18-w.sample"] {
            script(directory.path(), name, if name == "20-b" { "exit 3" } else { "" });
        }
        fs::write(directory.path().join("05-data"), "").unwrap();
        fs::create_dir(directory.path().join("06-directory")).unwrap();
        let hooks = Hooks {
            directory: Some(directory.path().to_owned()),
            timeout: Duration::from_secs(30),
            ..Hooks::default()
        };
        let (result, runs) = freeze(&hooks);
        assert_eq!(result, Err("exit status 3".into()));
        let names: Vec<_> =
            runs.iter().map(|run| run.program.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["10-a", "20-b"]);
    }

    #[test]
    fn hooks_survive_the_way_to_the_watchdog() {
        let hooks = Hooks { timeout: Duration::from_millis(1500), ..hook("/etc/hook".into()) };
        assert_eq!(Hooks::from_json(&hooks.to_json()), hooks);
    }
}
