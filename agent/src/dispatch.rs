//! From a decoded message to a command, and from its result to the bytes of the reply.

use protocol::{Dialect, Error, Item, Request, Response};
use serde_json::{Value, json};

use crate::access::Access;
use crate::commands;
use crate::schema::Command;

/// Every family of commands; `guest-info` lists them in this order.
const FAMILIES: &[&[Command]] = &[
    commands::network::COMMANDS,
    commands::statistics::COMMANDS,
    commands::ssh::COMMANDS,
    commands::system::COMMANDS,
    commands::time::COMMANDS,
    commands::users::COMMANDS,
    commands::memory_blocks::COMMANDS,
    commands::vcpus::COMMANDS,
    commands::disks::COMMANDS,
    commands::filesystems::COMMANDS,
    commands::exec::COMMANDS,
    commands::fsfreeze::COMMANDS,
    commands::file::COMMANDS,
    commands::shutdown::COMMANDS,
    commands::suspend::COMMANDS,
    commands::session::COMMANDS,
];

/// Every command.
pub(crate) fn all() -> impl Iterator<Item = &'static Command> {
    FAMILIES.iter().copied().flatten()
}

/// The schema document: every command, its arguments and results, and when it may run.
pub(crate) fn schema() -> Value {
    json!({"commands": all().map(Command::document).collect::<Vec<_>>()})
}

/// What a peer sent, as far as it concerns the agent.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// 0xFF: the peer starts anew.
    Sentinel,
    /// Nothing that can be carried out; this is the reply.
    Refused(Vec<u8>),
    Request(Request),
}

impl Incoming {
    pub(crate) fn parse(item: Item) -> Self {
        match item {
            Item::Value(message) => match Request::parse(message, Dialect::Agent) {
                Ok(request) => Self::Request(request),
                Err(refusal) => Self::Refused(line(&refusal, false)),
            },
            Item::Sentinel => Self::Sentinel,
            Item::Error(error) => Self::Refused(line(&Response::error(error, None), false)),
        }
    }

    /// Whether the peer says by it that it does not wait for earlier replies any more: whoever
    /// synchronises discards what comes before the answer.
    pub(crate) fn is_fresh_start(&self) -> bool {
        match self {
            Self::Sentinel => true,
            Self::Refused(_) => false,
            Self::Request(request) => {
                !request.oob && matches!(request.execute.as_str(), "guest-sync" | "guest-sync-delimited")
            }
        }
    }

    pub(crate) fn is_out_of_band(&self) -> bool {
        matches!(self, Self::Request(request) if request.oob)
    }
}

/// The command a request means, if it may run now.
pub(crate) fn find(request: &Request, access: &Access, frozen: bool) -> Result<&'static Command, Error> {
    let name = request.execute.as_str();
    let command = all().find(|command| command.name == name).ok_or_else(|| Error::command_not_found(name))?;
    if request.oob && !command.out_of_band {
        return Err(Error::generic(format!("The command {name} does not support OOB")));
    }
    check_enabled(command, access, frozen)?;
    Ok(command)
}

pub(crate) fn check_enabled(command: &Command, access: &Access, frozen: bool) -> Result<(), Error> {
    if access.permits(command, frozen) {
        return Ok(());
    }
    Err(Error::command_disabled(command.name, Some("the command is not allowed")))
}

/// The reply to a request, newline included; `None` if there is none to be sent.
pub(crate) fn reply(
    command: Option<&Command>,
    request: Request,
    result: Result<Value, Error>,
) -> Option<Vec<u8>> {
    let success = result.is_ok();
    let quiet = success && command.is_some_and(|command| !command.success_response);
    let marked = success && command.is_some_and(|command| command.marked);
    (!quiet).then(|| line(&request.respond(result), marked))
}

fn line(response: &Response, marked: bool) -> Vec<u8> {
    let mut bytes = response.encode().into_bytes();
    if marked {
        bytes.insert(0, 0xFF);
    }
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Run;

    #[test]
    fn every_name_is_declared_once_and_what_runs_out_of_band_is_prompt() {
        let mut names: Vec<&str> = all().map(|command| command.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        for command in all() {
            assert!(!command.out_of_band || matches!(command.run, Run::Prompt(_)), "{}", command.name);
            assert!(!command.about.is_empty() && !command.about.ends_with('.'), "{}", command.name);
        }
    }

    #[test]
    fn while_frozen_exactly_these_commands_run() {
        let mut names: Vec<&str> =
            all().filter(|command| command.while_frozen).map(|command| command.name).collect();
        names.sort_unstable();
        let expected = [
            "guest-fsfreeze-status",
            "guest-fsfreeze-thaw",
            "guest-info",
            "guest-ping",
            "guest-sync",
            "guest-sync-delimited",
            "tarn-fsfreeze-report",
        ];
        assert_eq!(names, expected);
    }
}
