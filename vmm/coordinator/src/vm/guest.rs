//! What runs in a VM.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::VmError;
use crate::recipes::{
    ExecError, ExecRequest, ExecStatus, Output, Stream, copy_from_guest, copy_to_guest, exec,
};
use crate::{GuestSession, SessionError};

/// How long a command in the guest may take if nothing else is said.
const PATIENCE: Duration = Duration::from_secs(120);

/// The guest of a [`Vm`](super::Vm), reached by its agent. Every call has a connection of its own, so that calls may be made
/// from several threads, and while the guest is frozen.
#[derive(Clone, Debug)]
pub struct Guest {
    socket: PathBuf,
}

/// How a command in the guest ended, and what it wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// How it ended.
    pub status: ExecStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Guest {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// A session with the agent, for whatever there is no function for here.
    ///
    /// # Errors
    /// [`SessionError::Connect`].
    pub fn session(&self) -> Result<GuestSession, SessionError> {
        GuestSession::connect(&self.socket)
    }

    /// Runs a shell script, which has to succeed, within 120 s; what it printed, without white space at the end.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let vm = coordinator::Vm::attach("web")?;
    /// assert_eq!(vm.guest().exec("cat /proc/sys/kernel/ostype")?, "Linux");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VmError::Failed`] with what it complained about; or it could not be run.
    pub fn exec(&self, script: &str) -> Result<String, VmError> {
        let request = ExecRequest { timeout: Some(PATIENCE), ..ExecRequest::shell(script) };
        let Executed { status, stdout, stderr } = self.run(&request)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
        match status {
            ExecStatus::Exited(0) => Ok(text(stdout)),
            status => Err(VmError::Failed { script: script.to_owned(), status, stderr: text(stderr) }),
        }
    }

    /// Runs a command, however it ends.
    ///
    /// ```no_run
    /// use coordinator::recipes::{ExecRequest, ExecStatus};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let vm = coordinator::Vm::attach("web")?;
    /// let grep = ExecRequest { input: Some(b"one\ntwo\n".to_vec()), ..ExecRequest::shell("grep three") };
    /// assert_eq!(vm.guest().run(&grep)?.status, ExecStatus::Exited(1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ExecError`].
    pub fn run(&self, request: &ExecRequest) -> Result<Executed, ExecError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = exec(&mut self.session()?, request, &mut |output| {
            match output {
                Output::Bytes(Stream::Stdout, bytes) => stdout.extend_from_slice(bytes),
                Output::Bytes(Stream::Stderr, bytes) => stderr.extend_from_slice(bytes),
                Output::Truncated(_) => {
                    return Err(std::io::Error::other("the agent has thrown a part of it away, over 16 MiB"));
                }
            }
            Ok(())
        })?;
        Ok(Executed { status, stdout, stderr })
    }

    /// Copies the file `from` to `to` in the guest, a path or a directory. The guest never sees half of it.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let vm = coordinator::Vm::attach("web")?;
    /// vm.guest().copy_to("fixtures/dump.sql", "/data/dump.sql")?;
    /// vm.guest().copy_from("/var/log/import.log", "import.log")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The first thing that failed.
    pub fn copy_to(&self, from: impl AsRef<Path>, to: &str) -> Result<u64, VmError> {
        let from = from.as_ref();
        let mut source = File::open(from).map_err(file("open", from))?;
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        Ok(copy_to_guest(&mut self.session()?, &mut source, to, &name, &mut |_| {})?)
    }

    /// Copies the file `from` of the guest to `to`; bytes copied. What a failure leaves of `to` is incomplete.
    ///
    /// # Errors
    /// The first thing that failed.
    pub fn copy_from(&self, from: &str, to: impl AsRef<Path>) -> Result<u64, VmError> {
        let to = to.as_ref();
        let mut session = self.session()?;
        let mut sink = File::create(to).map_err(file("create", to))?;
        let bytes = copy_from_guest(&mut session, from, &mut sink, &mut |_, _| {})?;
        sink.flush().map_err(file("write", to))?;
        Ok(bytes)
    }
}

pub(super) fn file(verb: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> VmError + use<> {
    let path = path.to_owned();
    move |cause| VmError::File { verb, path, cause }
}
