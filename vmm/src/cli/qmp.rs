//! `tarn qmp`.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use clap::Args;
use coordinator::{Event, MonitorSession, SessionError};
use serde_json::Value;

use super::lines::{self, Interlocutor, Typed};
use super::vm_name::{VmName, WITH_DISKS};

/// Talk QMP to the monitor of a VM
///
/// With a command, runs it and prints its result. Without, reads commands from standard input, a line each, and prints
/// results and events as they come.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn qmp web query-status\n  tarn qmp web getfd fdname=disk\n  \
    tarn qmp web '{\"execute\": \"stop\"}'\n  tarn qmp web")]
pub(super) struct QmpArgs {
    #[command(flatten)]
    vm: VmName,
    /// VERB [KEY=VALUE…], or a request as JSON
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Interlocutor for MonitorSession {
    fn execute(&mut self, typed: Typed) -> Result<Value, SessionError> {
        self.execute(&typed.verb, typed.arguments, WITH_DISKS)
    }

    fn event(&mut self) -> Result<Option<Event>, SessionError> {
        self.next_event(Duration::ZERO)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

pub(super) fn run(args: &QmpArgs) -> anyhow::Result<u8> {
    let mut monitor = args.vm.monitor()?;
    if args.command.is_empty() {
        lines::converse(&mut monitor, &format!("{}> ", args.vm.name))
    } else {
        lines::one(&mut monitor, &args.command)
    }
}
