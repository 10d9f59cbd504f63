//! `tarn run --exec`: a VM for one command.
//!
//! ```text
//!   main thread      VM ─────────────────────────────────────────────▶ ends
//!                     │ ready                                       ▲      │
//!   exec thread       ├─▶ wait for agent ─▶ mounted? ─▶ command ─▶ end it   │ status
//!   fault thread      ├─▶ a guest that cannot run any further ─────▶ ┘     │ or fault
//!   console thread    └─▶ keeps the last lines, for when things go wrong   │ last lines
//! ```
//!
//! All threads are clients of the VM's sockets like any other process; they end with the connections.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use coordinator::recipes::ExecRequest;
use coordinator::{GuestSession, Map, MonitorSession, SessionError};

use super::mounts::{self, MountError};
use crate::cli::exec::{read_input, run_and_pass_on};
use crate::cli::output;
use crate::config::VmSpec;
use crate::run_dir::{RunDir, VmPaths};
use crate::vm::{Foreground, Outcome, Terminal};

/// What is to be run, and how.
pub(super) struct Plan {
    pub(super) command: String,
    /// Pass standard input on, unless it is a terminal.
    pub(super) input: bool,
    /// How long the guest may take to boot and answer.
    pub(super) patience: Duration,
}

/// How much of the console is kept.
const TAIL: usize = 8 << 10;
/// How many of its lines are shown.
const TAIL_LINES: usize = 40;
/// Before the guest has drivers for the usual console, it can only be heard elsewhere.
const SILENT: &str = "its console showed nothing (--console serial shows a kernel from its first line)";
/// After the VM has ended: how long its clients may take to notice.
const NOTICE: Duration = Duration::from_secs(1);
/// How long a guest with disks may take to shut down.
const SHUTDOWN: Duration = Duration::from_secs(30);

/// The guest has gone: there is nobody left to blame for what did not work.
#[derive(Debug, thiserror::Error)]
#[error("The guest has ended")]
struct GuestEnded;

/// Runs the VM, the command in it, and gives the command's status.
pub(super) fn run(spec: &VmSpec, dir: &RunDir, plan: Plan, verbose: bool) -> anyhow::Result<u8> {
    let (status_sender, status) = channel();
    let (tail_sender, tail) = channel();
    let paths = VmPaths::clone(dir);
    let mounts = mounts::are_wanted(spec);
    let writes = spec.disks.iter().any(|disk| !disk.read_only);
    let ready: Box<dyn FnOnce() + Send> = Box::new(move || {
        let console = paths.clone();
        thread::spawn(move || keep_console(&console, verbose, &tail_sender));
        let (watched, fault_sender) = (paths.clone(), status_sender.clone());
        thread::spawn(move || end_on_fault(&watched, &fault_sender));
        thread::spawn(move || {
            let result = exec(&paths, plan, mounts)
                .map_err(|error| if runs(&paths) { error } else { GuestEnded.into() });
            // The receiver is there for as long as the VM is.
            let _ = status_sender.send(result);
            if let Err(error) = end_vm(&paths, writes) {
                tracing::warn!("The VM does not end as it should: {error:#}");
            }
        });
    });
    let outcome = super::run_vm(spec, dir, Foreground { terminal: Terminal::Detached, ready: Some(ready) })?;
    conclude(&outcome, &status, &tail)
}

fn exec(paths: &VmPaths, plan: Plan, mounts: bool) -> anyhow::Result<u8> {
    let mut request = ExecRequest::shell(plan.command);
    if plan.input && !io::stdin().is_terminal() {
        request.input = Some(read_input()?);
    }
    let mut agent = GuestSession::connect(&paths.agent_socket())?;
    agent.wait_for_agent(plan.patience)?;
    if mounts {
        mounts::check(&mut agent).context("The command was not run")?;
    }
    run_and_pass_on(&mut agent, &request)
}

/// A guest that KVM cannot run is kept for those who look into it; here nobody does, and its command would never end.
fn end_on_fault(paths: &VmPaths, status: &Sender<anyhow::Result<u8>>) {
    const LONG: Duration = Duration::from_secs(3600);
    let Ok(mut monitor) = MonitorSession::connect(&paths.monitor_socket(), SHUTDOWN) else { return };
    loop {
        let state = monitor.execute("query-status", None, SHUTDOWN);
        if state.is_ok_and(|state| state["status"] == "internal-error") {
            let _ = status.send(Err(anyhow!("The guest cannot run any further; the message above says why")));
            let _ = monitor.execute("quit", None, SHUTDOWN);
            return;
        }
        // The event does not say why: asked again.
        loop {
            match monitor.next_event(LONG) {
                Ok(Some(event)) if event.name == "STOP" => break,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

/// Whether the guest goes on, whatever its agent does.
fn runs(paths: &VmPaths) -> bool {
    let status = MonitorSession::connect(&paths.monitor_socket(), NOTICE)
        .and_then(|mut monitor| monitor.execute("query-status", None, NOTICE));
    status.is_ok_and(|status| status["running"] == true)
}

/// A guest with disks that it may have written to shuts down first: its filesystems are to be whole.
fn end_vm(paths: &VmPaths, writes: bool) -> anyhow::Result<()> {
    let mut monitor = match MonitorSession::connect(&paths.monitor_socket(), NOTICE) {
        Ok(monitor) => monitor,
        // It has ended by itself.
        Err(SessionError::Connect { .. } | SessionError::Closed { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if writes {
        let began = Instant::now();
        let arguments = Map::from_iter([("mode".to_owned(), "powerdown".into())]);
        let mut agent = GuestSession::connect(&paths.agent_socket())?;
        let asked = agent.execute_without_reply("guest-shutdown", Some(arguments), NOTICE);
        // Until the VM ends, and its connection with it; or is kept by a policy.
        while asked.is_ok() && began.elapsed() < SHUTDOWN {
            match monitor.next_event(SHUTDOWN.saturating_sub(began.elapsed())) {
                Ok(Some(event)) if event.name == "SHUTDOWN" => break,
                Ok(_) => {}
                Err(_) => return Ok(()),
            }
        }
    }
    match monitor.execute("quit", None, SHUTDOWN) {
        Ok(_) | Err(SessionError::Closed { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reads the console to its end and hands over the last of it.
fn keep_console(paths: &VmPaths, verbose: bool, tail: &Sender<Vec<u8>>) {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    if let Ok(mut console) = UnixStream::connect(paths.console_socket()) {
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            if verbose {
                let _ = io::stderr().write_all(&buffer[..count]);
            }
            kept.extend_from_slice(&buffer[..count]);
            let excess = kept.len().saturating_sub(TAIL);
            kept.drain(..excess);
        }
    }
    let _ = tail.send(kept);
}

fn conclude(
    outcome: &Outcome,
    status: &Receiver<anyhow::Result<u8>>,
    tail: &Receiver<Vec<u8>>,
) -> anyhow::Result<u8> {
    // It may still be reading standard input for a command that will never run.
    let error = match status.recv_timeout(NOTICE) {
        Ok(Ok(status)) => return Ok(status),
        Ok(Err(error)) if error.is::<output::Closed>() || error.is::<MountError>() => return Err(error),
        Ok(Err(error)) if !error.is::<GuestEnded>() => error,
        Ok(Err(_)) | Err(_) => anyhow!("The guest ended before the command had: {}", outcome.cause),
    };
    let tail = tail.recv_timeout(NOTICE).unwrap_or_default();
    let error = match last_lines(&tail) {
        lines if lines.is_empty() => anyhow!("{error:#}; {SILENT}"),
        lines => error.context(format!("The last lines of the guest's console:\n{lines}\ntarn")),
    };
    if outcome.exit == 0 {
        return Err(error);
    }
    output::complain(&format!("{error:#}"));
    Ok(outcome.exit)
}

fn last_lines(tail: &[u8]) -> String {
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let first = lines.len().saturating_sub(TAIL_LINES);
    lines[first..].iter().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exit: u8) -> Outcome {
        Outcome { exit, cause: "guest shutdown".into() }
    }

    fn concluded(exit: u8, result: Option<anyhow::Result<u8>>, console: &str) -> Result<u8, String> {
        let ((status, status_receiver), (tail, tail_receiver)) = (channel(), channel());
        if let Some(result) = result {
            status.send(result).unwrap();
        }
        drop(status);
        tail.send(console.into()).unwrap();
        conclude(&outcome(exit), &status_receiver, &tail_receiver).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_commands_status_counts_whatever_ended_the_vm() {
        assert_eq!(concluded(0, Some(Ok(3)), ""), Ok(3));
        assert_eq!(concluded(70, Some(Ok(0)), ""), Ok(0));
    }

    #[test]
    fn a_guest_that_dies_is_told_with_its_last_lines() {
        for result in [None, Some(Err(GuestEnded.into()))] {
            let error = concluded(0, result, "one\r\n\r\ntwo\r\n").unwrap_err();
            assert!(error.contains("  | one\n  | two\n"), "{error}");
            assert!(error.ends_with("The guest ended before the command had: guest shutdown"), "{error}");
        }
        assert_eq!(concluded(70, None, "Kernel panic"), Ok(70));
    }

    #[test]
    fn a_mount_that_failed_says_enough() {
        let failures = vec!["cannot mount /dev/vda on /data as ext4: no such device".to_owned()];
        let failed = anyhow::Error::new(MountError::Failed { failures }).context("The command was not run");
        let error = concluded(0, Some(Err(failed)), "a line").unwrap_err();
        let expected =
            "The command was not run: The guest cannot mount /dev/vda on /data as ext4: no such device";
        assert_eq!(error, expected);
    }

    #[test]
    fn other_errors_are_told_as_they_are() {
        let error = concluded(0, Some(Err(anyhow!("No agent"))), "").unwrap_err();
        assert!(error.starts_with("No agent; its console showed nothing"), "{error}");
    }

    #[test]
    fn only_the_last_lines_are_shown() {
        let text: String = (0..100).map(|i| format!("line {i}\n")).collect();
        let shown = last_lines(text.as_bytes());
        assert_eq!(shown.lines().count(), TAIL_LINES);
        assert!(shown.ends_with("| line 99"));
    }
}
