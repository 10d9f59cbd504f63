//! Why a VM has not done what was asked, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use crate::operation::OperationError;
use crate::recipes::{CopyError, ExecError, ExecStatus};
use crate::state_dir::StateDirError;
use crate::{Peer, SessionError, chain};

/// Why a VM has not done what was asked. A test that fails prints it as one text, so that has the causes in it.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No process.
    #[error(
        "Cannot start {binary:?}: {cause}; is it installed and in PATH? VmOptions::binary takes the path of another one"
    )]
    Start {
        /// What was started.
        binary: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A file on this side.
    #[error("Cannot {verb} {path:?}: {cause}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// It is not there any more.
    #[error("VM {name} has ended ({status}); {log:?} ends in:\n{tail}")]
    Ended {
        /// The VM.
        name: String,
        /// How its process ended.
        status: ExitStatus,
        /// What the VMM said.
        log: PathBuf,
        /// The last of it.
        tail: String,
    },
    /// It runs, but does not answer.
    #[error(
        "The {peer} of VM {name} did not answer within {seconds:.0} s of the launch; see {console:?} for what the guest \
         printed, {log:?} for what the VMM said; VmOptions::patience gives it more time{}", no_agent(*.peer)
    )]
    NotReady {
        /// The VM.
        name: String,
        /// Who was awaited.
        peer: Peer,
        /// How long.
        seconds: f64,
        /// What the guest printed.
        console: PathBuf,
        /// What the VMM said.
        log: PathBuf,
    },
    /// It does not end.
    #[error("VM {name} still runs {seconds:.0} s after it was asked to shut down; Vm::kill ends it at once")]
    StillRuns {
        /// The VM.
        name: String,
        /// How long was waited.
        seconds: f64,
    },
    /// It was started by somebody else, who has the right to kill it.
    #[error("VM {name} was not launched here, and is not killed from here; `tarn kill {name}` does")]
    NotOurs {
        /// The VM.
        name: String,
    },
    /// A command in the guest did not succeed.
    #[error("`{script}` ended with status {} in the guest: {stderr}", .status.code())]
    Failed {
        /// The command.
        script: String,
        /// How it ended.
        status: ExecStatus,
        /// What it complained about.
        stderr: String,
    },
    /// `tarn recover` of a VM that has ended.
    #[error("What VM {name} left open cannot be settled: {message}")]
    Recover {
        /// The VM.
        name: String,
        /// In the words of `tarn`.
        message: String,
    },
    /// Its monitor or agent.
    #[error("{}", chain(.0))]
    Session(SessionError),
    /// A command in the guest whose end is not known.
    #[error("{}", chain(.0))]
    Exec(ExecError),
    /// A file that was not copied.
    #[error("{}", chain(.0))]
    Copy(CopyError),
    /// A pivot, mirror or backup.
    #[error("{}", chain(.0))]
    Operation(OperationError),
    /// Where its journal is.
    #[error("{}", chain(.0))]
    State(StateDirError),
}

impl From<SessionError> for VmError {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl From<ExecError> for VmError {
    fn from(error: ExecError) -> Self {
        Self::Exec(error)
    }
}

impl From<CopyError> for VmError {
    fn from(error: CopyError) -> Self {
        Self::Copy(error)
    }
}

impl From<OperationError> for VmError {
    fn from(error: OperationError) -> Self {
        Self::Operation(error)
    }
}

impl From<StateDirError> for VmError {
    fn from(error: StateDirError) -> Self {
        Self::State(error)
    }
}

fn no_agent(peer: Peer) -> &'static str {
    match peer {
        Peer::Agent => ", VmOptions::without_agent does not wait for one",
        Peer::Monitor => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_told_and_told_once() {
        let source = protocol::Error {
            class: protocol::ErrorClass::GenericError,
            desc: "no filesystem can be frozen".into(),
        };
        let command = "guest-fsfreeze-freeze".to_owned();
        let error = VmError::from(SessionError::Refused { peer: Peer::Agent, command, source });
        let expected = "The guest agent refused guest-fsfreeze-freeze: no filesystem can be frozen";
        assert_eq!((error.to_string().as_str(), chain(&error).as_str()), (expected, expected));
        let error = VmError::File { verb: "open", path: "/x".into(), cause: io::ErrorKind::NotFound.into() };
        assert_eq!(chain(&error), "Cannot open \"/x\": entity not found");
    }
}
