//! `tarn agent`.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use clap::Args;
use coordinator::{Event, GuestSession, SessionError};
use serde_json::Value;

use super::lines::{self, Interlocutor, Typed};
use super::vm_name::VmName;

/// Talk to the guest agent of a VM
///
/// With a command, runs it and prints its result. Without, reads commands from standard input, a line each. Every qemu-ga
/// command that the agent in the guest knows will do; `guest-info` lists them.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn agent web guest-get-osinfo\n  \
    tarn agent web guest-shutdown mode=reboot\n  tarn agent web '{\"execute\": \"guest-ping\"}'")]
pub(super) struct AgentArgs {
    #[command(flatten)]
    vm: VmName,
    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// VERB [KEY=VALUE…], or a request as JSON
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// How long a failure of a command that does not tell its success may take.
const SILENCE: Duration = Duration::from_secs(2);

struct Agent {
    session: GuestSession,
    timeout: Duration,
}

impl Interlocutor for Agent {
    fn execute(&mut self, typed: Typed) -> Result<Value, SessionError> {
        // These succeed in silence (success-response is false in guest-info).
        if typed.verb == "guest-shutdown" || typed.verb.starts_with("guest-suspend-") {
            let patience = self.timeout.min(SILENCE);
            self.session.execute_without_reply(&typed.verb, typed.arguments, patience)?;
            return Ok(Value::Object(coordinator::Map::new()));
        }
        self.session.execute(&typed.verb, typed.arguments, self.timeout)
    }

    /// Agents send none; what comes unasked is read, and dropped, with the next command.
    fn event(&mut self) -> Result<Option<Event>, SessionError> {
        self.session.check_open().map(|()| None)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

pub(super) fn run(args: &AgentArgs) -> anyhow::Result<u8> {
    let mut agent = Agent { session: args.vm.agent()?, timeout: Duration::from_secs(args.timeout) };
    if args.command.is_empty() {
        lines::converse(&mut agent, &format!("{}> ", args.vm.name))
    } else {
        lines::one(&mut agent, &args.command)
    }
}
