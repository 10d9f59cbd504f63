//! guest-fsfreeze-freeze, -freeze-list, -thaw and -status, and tarn-fsfreeze-report; the engine is in
//! [`crate::freeze`].

use std::path::PathBuf;
use std::time::Duration;

use protocol::{Args, Error};
use serde_json::Value;

use crate::agent::Agent;
use crate::freeze::{FreezeError, REPORT, Selection};
use crate::guest::Guest;
use crate::schema::{Command, Field, Role, Run, Type, optional};

/// Milliseconds until the thaw that nobody has to ask for; 0 for never.
const LEASE: Field = optional("tarn-lease-ms", Type::Int);

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("tarn-fsfreeze-report", "What the last freeze did, and how it ended", Run::Prompt(report))
        .returns(REPORT)
        .while_frozen()
        .out_of_band(),
    Command::new(
        "guest-fsfreeze-status",
        "Whether filesystems are frozen; unless asked for out of band, renews the lease if they are",
        Run::Prompt(status),
    )
    .returns(Type::Enum(&["thawed", "frozen"]))
    .while_frozen()
    .out_of_band()
    .plays(Role::FreezeStatus),
    Command::new("guest-fsfreeze-freeze", "Freezes all filesystems; returns how many", Run::Worker(freeze))
        .takes(&[LEASE])
        .returns(Type::Int)
        .plays(Role::Freeze),
    Command::new(
        "guest-fsfreeze-freeze-list",
        "Freezes the filesystems mounted at these places, all if absent; returns how many",
        Run::Worker(freeze_list),
    )
    .takes(&[optional("mountpoints", Type::Array(&Type::Str)), LEASE])
    .returns(Type::Int)
    .plays(Role::Freeze),
    Command::new("guest-fsfreeze-thaw", "Thaws all filesystems; returns how many", Run::Worker(thaw))
        .returns(Type::Int)
        .while_frozen()
        .plays(Role::Thaw),
];

fn freeze(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let lease = lease(&mut args)?;
    args.finish()?;
    freeze_selection(guest, &Selection { mountpoints: None, lease })
}

fn freeze_list(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let mountpoints = args.optional_strings("mountpoints")?;
    let lease = lease(&mut args)?;
    args.finish()?;
    let mountpoints = mountpoints.map(|list| list.into_iter().map(PathBuf::from).collect());
    freeze_selection(guest, &Selection { mountpoints, lease })
}

fn lease(args: &mut Args) -> Result<Option<Duration>, Error> {
    Ok(args.optional_uint("tarn-lease-ms")?.map(Duration::from_millis))
}

fn freeze_selection(guest: &mut Guest, selection: &Selection) -> Result<Value, Error> {
    guest.freezer.freeze(selection).map(Value::from).map_err(|error| reply(&error))
}

/// Whoever froze them.
fn thaw(guest: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    guest.freezer.thaw().map(Value::from).map_err(|error| reply(&error))
}

/// As far as the agent knows.
fn status(agent: &mut Agent, args: Args) -> Result<Value, Error> {
    args.finish()?;
    Ok(if agent.freezing.is_frozen() { "frozen" } else { "thawed" }.into())
}

fn report(agent: &mut Agent, args: Args) -> Result<Value, Error> {
    args.finish()?;
    Ok(agent.freezing.report())
}

fn reply(error: &FreezeError) -> Error {
    Error::generic(error.text())
}
