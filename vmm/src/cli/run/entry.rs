//! Where the command line hands over to the VMM.

use crate::config::VmSpec;
use crate::run_dir::RunDir;

/// What the terminal of this process is to the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terminal {
    /// Standard input and output are the console's.
    Attached,
    /// They are not.
    Detached,
}

/// How a VM is run.
pub struct Foreground {
    /// Whether it has the terminal.
    pub terminal: Terminal,
    /// Called once vCPUs run (or are ready, in prelaunch) and the sockets accept.
    pub ready: Option<Box<dyn FnOnce() + Send>>,
}

/// How a VM ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status of the process.
    pub exit: u8,
    /// In words.
    pub cause: String,
}

/// Why a VM could not run.
#[derive(Debug, thiserror::Error)]
#[error("This binary has no VMM")]
pub struct RunError;

/// Runs a VM to its end.
pub fn run(_: &VmSpec, _: &RunDir, foreground: Foreground) -> Result<Outcome, RunError> {
    let Foreground { terminal, ready } = foreground;
    tracing::debug!("terminal {terminal:?}, awaited {}", ready.is_some());
    Err(RunError)
}
