//! A VM in a test: launched, used, crashed, and gone with the value that stands for it.
//!
//! ```text
//!   VmOptions ─▶ Vm::launch ─┐                      ┌─▶ guest()    Guest: exec, copy_to, copy_from
//!                            ├─▶ Vm ── sockets ─────┼─▶ freeze()   Frozen: thaws when dropped, says whether it lasted
//!   NAME ──────▶ Vm::attach ─┘   │                  ├─▶ monitor()  pause, resume, …
//!                                │                  └─▶ pivot(), mirror(), backup(), recover()
//!                                └── Process: `tarn run`, killed when dropped; an attached VM is left alone
//! ```
//!
//! Every call has connections of its own and an end to its wait. Nothing is assumed of a VM but its sockets and, where
//! it was launched here, its process.

mod error;
mod frozen;
mod guest;
mod options;
mod process;

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use self::error::VmError;
pub use self::frozen::Frozen;
pub use self::guest::{Executed, Guest};
pub use self::options::VmOptions;
use self::process::Process;
use crate::journal::{self, OperationLog};
use crate::operation::{self, Connection, Liveness, OperationError, Recovery, Report, Request, Silent};
use crate::{GuestSession, MonitorSession, Peer, SessionError, StateDir, run_base};

/// For a monitor to do what it does at once.
const AT_ONCE: Duration = Duration::from_secs(10);
/// For what waits for disks: a pause drains and flushes them all.
const WITH_DISKS: Duration = Duration::from_secs(120);
/// For a guest to shut down.
const SHUTDOWN: Duration = Duration::from_secs(90);
/// Between two looks whether a socket is there: nothing tells of it.
const LOOK: Duration = Duration::from_millis(10);

/// A VM.
///
/// A test of a backup, as it would be in anybody's CI:
///
/// ```no_run
/// use std::time::Duration;
///
/// use coordinator::journal::Consistency;
/// use coordinator::{Vm, VmOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let options = VmOptions::new("db", "/var/tmp/db-test")
///     .disk("/var/tmp/db-test/data.raw,id=data")
///     .mount("data", "/data", "ext4");
/// let mut vm = Vm::launch(&options)?;
/// vm.guest().exec("echo precious > /data/file; sync")?;
///
/// let frozen = vm.freeze(Duration::from_secs(30))?;
/// std::fs::copy("/var/tmp/db-test/data.raw", "/var/tmp/db-test/copy.raw")?;
/// assert_eq!(frozen.thaw()?, Consistency::Filesystem);
///
/// vm.pivot([("data", "/var/tmp/db-test/new.raw")])?;
/// vm.kill()?;
/// let vm = Vm::launch(&options)?; // the same command line, and the disk that took the place of the old one
/// assert_eq!(vm.guest().exec("cat /data/file")?, "precious");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Vm {
    name: String,
    connection: Connection,
    state: StateDir,
    /// Of a VM that was launched here.
    process: Option<Process>,
}

impl Vm {
    /// Starts a VM and waits until its agent answers. It is killed when the value is dropped.
    ///
    /// A VM that was killed is launched again by the same options: `tarn run` settles what was open when it ended, and
    /// gives each disk the image that it has by now.
    ///
    /// # Errors
    /// [`VmError::Start`], [`VmError::Ended`] with what `tarn` said, [`VmError::NotReady`]. Nothing runs then.
    pub fn launch(options: &VmOptions) -> Result<Self, VmError> {
        let state = options.state()?;
        let run = options.run_base().join(options.name());
        let process = Process::start(options)?;
        let name = options.name().to_owned();
        let connection = Connection {
            monitor: run.join("monitor.sock"),
            agent: options.expects_agent().then(|| run.join("agent.sock")),
            foreign: false,
        };
        let mut vm = Self { name, connection, state, process: Some(process) };
        vm.wait_until_ready(options)?;
        Ok(vm)
    }

    /// A VM of this user that runs already, by its name; it goes on when the value is dropped.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// let vm = coordinator::Vm::attach("web")?;
    /// println!("up for {} s", vm.guest().exec("cut -d. -f1 /proc/uptime")?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Its monitor does not answer, or there is no place for its journal.
    pub fn attach(name: &str) -> Result<Self, VmError> {
        let state = StateDir::of(name)?;
        let run = run_base().join(name);
        let agent = Some(run.join("agent.sock"));
        Self::attach_to(Connection { monitor: run.join("monitor.sock"), agent, foreign: false }, state)
    }

    /// A VM that runs already, by its sockets: of another directory, or of QEMU.
    ///
    /// ```no_run
    /// use coordinator::operation::Connection;
    /// use coordinator::{StateDir, Vm};
    ///
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// let (monitor, agent) = ("/run/qemu/qmp.sock".into(), Some("/run/qemu/qga.sock".into()));
    /// let sockets = Connection { monitor, agent, foreign: true };
    /// let vm = Vm::attach_to(sockets, StateDir::of("qemu-web")?)?;
    /// vm.pause()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Its monitor does not answer.
    pub fn attach_to(connection: Connection, state: StateDir) -> Result<Self, VmError> {
        let vm = Self { name: state.name().to_owned(), connection, state, process: None };
        vm.monitor()?;
        Ok(vm)
    }

    fn wait_until_ready(&mut self, options: &VmOptions) -> Result<(), VmError> {
        let began = Instant::now();
        let (peer, socket) = match &self.connection.agent {
            Some(agent) => (Peer::Agent, agent.clone()),
            None => (Peer::Monitor, self.connection.monitor.clone()),
        };
        loop {
            let left = options.limit().saturating_sub(began.elapsed());
            let answered = match peer {
                Peer::Agent => {
                    GuestSession::connect(&socket).and_then(|mut agent| agent.wait_for_agent(left))
                }
                Peer::Monitor => MonitorSession::connect(&socket, left).map(drop),
            };
            let Err(error) = answered else { return Ok(()) };
            // Its end is also what closes a connection.
            if let Some(process) = &mut self.process
                && let Some(status) = process.wait(LOOK).map_err(|source| waiting(&self.name, source))?
            {
                return Err(process.ended(status));
            }
            let may_come = matches!(error, SessionError::Connect { .. } | SessionError::Closed { .. });
            if began.elapsed() >= options.limit() || matches!(error, SessionError::Timeout { .. }) {
                return Err(VmError::NotReady {
                    name: self.name.clone(),
                    peer,
                    seconds: options.limit().as_secs_f64(),
                    console: options.console_file(),
                    log: options.log_file(),
                });
            }
            if !may_come {
                return Err(error.into());
            }
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process; `None` if it was not launched here.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Its sockets, for [`operation`]'s functions.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Its journal, for [`operation`]'s functions.
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// What the guest has printed goes to this file; `None` if it was not launched here.
    pub fn console_file(&self) -> Option<PathBuf> {
        self.process.as_ref().map(|process| process.options.console_file())
    }

    /// What the VMM has said goes to this file; `None` if it was not launched here.
    pub fn log_file(&self) -> Option<PathBuf> {
        self.process.as_ref().map(|process| process.options.log_file())
    }

    /// Its guest.
    pub fn guest(&self) -> Guest {
        Guest::new(self.agent().to_owned())
    }

    /// Where an agent would be; connecting to it says that there is none.
    fn agent(&self) -> &Path {
        self.connection.agent.as_deref().unwrap_or(Path::new(""))
    }

    /// A session with its monitor, for whatever there is no function for here.
    ///
    /// # Errors
    /// It does not answer.
    pub fn monitor(&self) -> Result<MonitorSession, SessionError> {
        MonitorSession::connect(&self.connection.monitor, AT_ONCE)
    }

    /// Freezes the filesystems of the guest, which thaw at the latest when `lease` is over.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let vm = coordinator::Vm::attach("web")?;
    /// let frozen = vm.freeze(std::time::Duration::from_secs(10))?;
    /// assert!(vm.guest().exec("touch /data/x").is_err(), "nothing is started in a frozen guest");
    /// drop(frozen);
    /// vm.guest().exec("touch /data/x")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The agent refuses, for one because they are frozen already; or it cannot be asked.
    pub fn freeze(&self, lease: Duration) -> Result<Frozen, VmError> {
        Ok(Frozen::freeze(self.agent(), lease)?)
    }

    /// Stops its vCPUs and brings its disks to rest: when this returns, everything written is flushed.
    ///
    /// # Errors
    /// A disk does not come to rest, or the monitor does not answer.
    pub fn pause(&self) -> Result<(), VmError> {
        self.monitor()?.execute("stop", None, WITH_DISKS)?;
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// The pause belongs to an operation, or the monitor does not answer.
    pub fn resume(&self) -> Result<(), VmError> {
        self.monitor()?.execute("cont", None, WITH_DISKS)?;
        Ok(())
    }

    /// Targets as they are meant: relative ones are below the directory that the VM was launched in, as its disks are.
    fn below_directory(&self, disks: &[(String, PathBuf)]) -> Vec<(String, PathBuf)> {
        let directory = self.process.as_ref().map(|process| process.options.directory());
        let place = |path: &PathBuf| directory.map_or_else(|| path.clone(), |directory| directory.join(path));
        disks.iter().map(|(disk, target)| (disk.clone(), place(target))).collect()
    }

    /// Carries out a pivot, mirror or backup as the request says. Relative targets are below the VM's directory, if it was
    /// launched here.
    ///
    /// ```no_run
    /// use coordinator::operation::Request;
    ///
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let vm = coordinator::Vm::attach("web")?;
    /// let request = Request { freeze: true, ..Request::pivot([("data", "/images/new.raw")]) };
    /// let report = vm.operate(&request)?;
    /// println!("frozen for {:?}, held for {:?}", report.timeline.frozen, report.timeline.held);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperationError`]: refused, aborted, or not settled.
    pub fn operate(&self, request: &Request) -> Result<Report, VmError> {
        let request = Request { disks: self.below_directory(&request.disks), ..request.clone() };
        Ok(operation::run(&self.state, &self.connection, &request, &mut Silent)?)
    }

    /// Moves disks, by id, to other images, all or none; relative ones are below the VM's directory, as in
    /// [`operate`](Self::operate).
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let vm = coordinator::Vm::attach("web")?;
    /// vm.pivot([("data", "/fast/data.raw"), ("log", "/fast/log.raw")])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperationError`].
    pub fn pivot<D: Into<String>, T: Into<PathBuf>>(
        &self,
        disks: impl IntoIterator<Item = (D, T)>,
    ) -> Result<Report, VmError> {
        self.operate(&Request::pivot(disks))
    }

    /// Copies disks, by id, as they are when the copy is complete.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let vm = coordinator::Vm::attach("web")?;
    /// vm.mirror([("data", "/copies/data.raw")])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperationError`].
    pub fn mirror<D: Into<String>, T: Into<PathBuf>>(
        &self,
        disks: impl IntoIterator<Item = (D, T)>,
    ) -> Result<Report, VmError> {
        self.operate(&Request::mirror(disks))
    }

    /// Copies disks, by id, as they are now, while the guest goes on; with its filesystems frozen for the first moment if
    /// [`operate`](Self::operate) is asked for it.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let vm = coordinator::Vm::attach("web")?;
    /// vm.backup([("data", "/backups/data.raw")])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperationError`].
    pub fn backup<D: Into<String>, T: Into<PathBuf>>(
        &self,
        disks: impl IntoIterator<Item = (D, T)>,
    ) -> Result<Report, VmError> {
        self.operate(&Request::backup(disks))
    }

    /// Settles what a coordinator that died has left open, whether the VM runs or has ended. The second time it does
    /// nothing.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let mut vm = coordinator::Vm::attach("web")?;
    /// for line in vm.recover()?.story {
    ///     println!("{line}");
    /// }
    /// assert!(vm.recover()?.operation.is_none());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperationError`], or [`VmError::Recover`] for a VM that has ended.
    pub fn recover(&mut self) -> Result<Recovery, VmError> {
        if let Some(process) = &mut self.process
            && process.status().is_some()
        {
            return recover_dead(process, &self.state);
        }
        let vm = Liveness::Alive(self.connection.clone());
        Ok(operation::recover(&self.state, &vm, &mut Silent)?)
    }

    /// Lets the guest shut down and waits for the end of the VM; its exit status, if it was launched here.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coordinator::VmError> {
    /// # let mut vm = coordinator::Vm::attach("web")?;
    /// assert!(vm.shutdown()?.is_none_or(|status| status.success()));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VmError::StillRuns`] after 90 s, or it cannot be asked.
    pub fn shutdown(&mut self) -> Result<Option<ExitStatus>, VmError> {
        // Before the guest is asked, so that its end is not missed.
        let mut monitor = self.monitor()?;
        if self.connection.agent.is_some() {
            let mut agent = self.guest().session()?;
            agent.wait_for_agent(AT_ONCE)?;
            agent.execute_without_reply("guest-shutdown", None, Duration::from_secs(1))?;
        } else {
            monitor.execute("system_powerdown", None, AT_ONCE)?;
        }
        let began = Instant::now();
        let still = || VmError::StillRuns { name: self.name.clone(), seconds: SHUTDOWN.as_secs_f64() };
        match &mut self.process {
            Some(process) => {
                let status = process.wait(SHUTDOWN).map_err(|source| waiting(&self.name, source))?;
                status.map(Some).ok_or_else(still)
            }
            None => loop {
                let left = SHUTDOWN.saturating_sub(began.elapsed());
                if left.is_zero() {
                    return Err(still());
                }
                // Its end closes the connection.
                if monitor.next_event(left).is_err() {
                    return Ok(None);
                }
            },
        }
    }

    /// Ends its process at once, as a crash would. One that has ended already stays so.
    ///
    /// # Errors
    /// [`VmError::NotOurs`] if it was not launched here.
    pub fn kill(&mut self) -> Result<(), VmError> {
        let Some(process) = &mut self.process else {
            return Err(VmError::NotOurs { name: self.name.clone() });
        };
        process.kill().map(drop).map_err(|source| waiting(&self.name, source))
    }
}

/// `tarn recover` has the lock that keeps anybody from starting the VM meanwhile.
fn recover_dead(process: &Process, state: &StateDir) -> Result<Recovery, VmError> {
    let name = process.options.name();
    let arguments = ["recover", "--json", name].map(Into::into);
    let failed = |message: String| VmError::Recover { name: name.to_owned(), message };
    let output = process.options.command(arguments).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let told: Value = serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))?;
    let lines = |member: &str| -> Vec<String> {
        let lines = told[member].as_array().into_iter().flatten();
        lines.filter_map(|line| line.as_str().map(str::to_owned)).collect()
    };
    let operation = match told["operation"].is_null() {
        true => None,
        false => journal::operations(state).map_err(OperationError::from)?.pop(),
    };
    let found = operation.as_ref().and_then(|operation: &OperationLog| {
        let mut stages = operation.entries.iter().map(|entry| entry.stage);
        stages.find(|stage| told["found"] == stage.name())
    });
    Ok(Recovery { operation, found, story: lines("story"), warnings: lines("warnings") })
}

fn waiting(name: &str, cause: std::io::Error) -> VmError {
    VmError::File { verb: "wait for VM", path: name.into(), cause }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A `tarn` that is a shell script.
    fn stand_in(directory: &Path, script: &str) -> VmOptions {
        let binary = directory.join("tarn");
        std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
        VmOptions::new("vm", directory).binary(binary).patience(Duration::from_millis(300))
    }

    #[test]
    fn a_launch_that_fails_says_what_tarn_said() {
        let directory = tempfile::tempdir().unwrap();
        let options = stand_in(directory.path(), "echo \"no disk for $*\" >&2; exit 1").disk("x.raw");
        let error = Vm::launch(&options).unwrap_err().to_string();
        assert!(
            error.contains("no disk for run --name vm --disk path=/") && error.ends_with("/x.raw"),
            "{error}"
        );
        assert!(error.starts_with("VM vm has ended (exit status: 1)"), "{error}");
        // The log is kept, and only this launch's part of it is told.
        let again = stand_in(directory.path(), "echo again >&2; exit 2");
        let error = Vm::launch(&again).unwrap_err().to_string();
        assert!(error.ends_with("ends in:\nagain"), "{error}");
    }

    #[test]
    fn a_guest_that_does_not_answer_in_time_is_an_error_and_gone() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let options = stand_in(directory.path(), &format!("echo $$ > {}; exec sleep 1000", pid.display()));
        let error = Vm::launch(&options).unwrap_err();
        assert!(matches!(error, VmError::NotReady { peer: Peer::Agent, .. }), "{error}");
        let pid = std::fs::read_to_string(&pid).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[test]
    fn a_binary_that_is_not_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let options = VmOptions::new("vm", directory.path()).binary("/nonexistent/tarn");
        let error = Vm::launch(&options).unwrap_err().to_string();
        assert!(error.contains("\"/nonexistent/tarn\"") && error.contains("VmOptions::binary"), "{error}");
    }

    #[test]
    fn a_vm_of_somebody_else_is_not_killed() {
        let server = crate::testing::Server::start(|client| client.negotiate());
        let connection = Connection { monitor: server.path().to_owned(), agent: None, foreign: true };
        let state = StateDir::below(Path::new("/nonexistent"), "other").unwrap();
        let mut vm = Vm::attach_to(connection, state).unwrap();
        assert!(matches!(vm.kill(), Err(VmError::NotOurs { .. })));
        assert_eq!((vm.pid(), vm.log_file()), (None, None));
    }
}
