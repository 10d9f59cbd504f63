//! guest-fsfreeze-freeze, -thaw and -status; the engine is in [`crate::freeze`].

use protocol::{Args, Error};
use serde_json::Value;

use super::errno_text;
use crate::agent::Agent;
use crate::freeze::FreezeError;
use crate::guest::Guest;
use crate::schema::{Command, Run, Type};
use crate::{log, pidfile};

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("guest-fsfreeze-status", "Whether filesystems are frozen", Run::Prompt(status))
        .returns(Type::Enum(&["thawed", "frozen"]))
        .while_frozen()
        .out_of_band(),
    Command::new("guest-fsfreeze-freeze", "Freezes all filesystems; returns how many", Run::Worker(freeze))
        .returns(Type::Int),
    Command::new("guest-fsfreeze-thaw", "Thaws all filesystems; returns how many", Run::Worker(thaw))
        .returns(Type::Int)
        .while_frozen(),
];

/// Freezes everything that can be frozen; returns the number of filesystems.
fn freeze(guest: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    // From here on nothing may wait for a disk.
    log::hold();
    let frozen = guest.freezer.freeze();
    if !guest.freezer.is_frozen() {
        log::release();
    }
    frozen.map(Value::from).map_err(|error| reply(&error))
}

/// Thaws everything, whoever froze it; returns the number of filesystems.
fn thaw(guest: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    thaw_now(guest).map(Value::from).map_err(|error| reply(&error))
}

fn thaw_now(guest: &mut Guest) -> Result<u64, FreezeError> {
    let thawed = guest.freezer.thaw();
    if !guest.freezer.is_frozen() {
        log::release();
        pidfile::release();
    }
    thawed
}

/// `frozen` or `thawed`, as far as the agent knows.
fn status(agent: &mut Agent, args: Args) -> Result<Value, Error> {
    args.finish()?;
    Ok(if agent.freezing.is_frozen() { "frozen" } else { "thawed" }.into())
}

fn reply(error: &FreezeError) -> Error {
    let text = match std::error::Error::source(error).and_then(|source| source.downcast_ref()) {
        Some(source) => format!("{error}: {}", errno_text(source)),
        None => error.to_string(),
    };
    Error::generic(text)
}
