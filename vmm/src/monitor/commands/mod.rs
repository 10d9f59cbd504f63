//! The commands, declared once.
//!
//! A [`Command`] is its name, the types of its arguments and of its result, and the function that runs it.
//! [`find`] dispatches by the same table that `query-commands` and `query-qmp-schema` show. A new family
//! is a new file with a table of its own, added to [`TABLES`].
//!
//! `guest-*` commands are not in the table: what a guest agent knows is up to the agent, and asked with
//! `guest-info`. [`is_relayed`] tells them apart.

mod agent;
mod backup;
mod block;
mod fds;
mod filters;
mod introspection;
mod jobs;
mod machine;
mod mirror;
mod nodes;
mod pivot;
mod run_state;
mod transaction;

use protocol::{Args, Error};
use serde_json::Value;

use super::fds::{FdSets, ReceivedFds};
use super::schema::{Object, Type};
use super::vm::{SessionId, Vm};

pub(super) use self::introspection::version;
pub use self::pivot::pivot_info;

/// What a command works with.
pub struct Call<'a> {
    /// The VM.
    pub vm: &'a mut dyn Vm,
    /// Descriptors of the client that calls.
    pub fds: &'a mut ReceivedFds,
    /// Descriptor sets of the VM.
    pub fdsets: &'a mut FdSets,
    /// The arguments, checked against the command's declaration.
    pub args: Args,
    /// The client that calls.
    pub session: SessionId,
    /// The answer comes later, with [`Monitor::complete`](super::Monitor::complete).
    pub later: bool,
}

impl Call<'_> {
    /// What a command returns whose answer may not be there yet.
    fn answer(&mut self, answer: Option<Value>) -> Value {
        self.later = answer.is_none();
        answer.unwrap_or_default()
    }
}

/// A command of the monitor.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it takes.
    pub arguments: &'static Object,
    /// What it returns.
    pub returns: Type,
    /// Runs it.
    pub run: fn(&mut Call<'_>) -> Result<Value, Error>,
}

/// Every family of commands.
static TABLES: &[&[Command]] = &[
    introspection::COMMANDS,
    run_state::COMMANDS,
    machine::COMMANDS,
    block::COMMANDS,
    nodes::COMMANDS,
    mirror::COMMANDS,
    backup::COMMANDS,
    transaction::COMMANDS,
    pivot::COMMANDS,
    jobs::COMMANDS,
    fds::COMMANDS,
    filters::COMMANDS,
    agent::COMMANDS,
];

/// Every command, in a fixed order.
pub fn all() -> impl Iterator<Item = &'static Command> {
    TABLES.iter().copied().flatten()
}

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Command> {
    all().find(|command| command.name == name)
}

/// Whether the guest agent is to answer.
pub fn is_relayed(name: &str) -> bool {
    name.starts_with("guest-") || name.starts_with("tarn-fsfreeze")
}

/// The result of a command that has none.
fn nothing() -> Value {
    Value::Object(protocol::Map::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_ours_carry_our_prefix() {
        let mut names: Vec<_> = all().map(|command| command.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.iter().all(|name| !is_relayed(name)));
    }
}
