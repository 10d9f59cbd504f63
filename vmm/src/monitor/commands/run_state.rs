//! Running, stopping, ending.

use protocol::Error;
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Object, Type, required};
use super::{Call, Command, nothing};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-status",
        arguments: &EMPTY,
        returns: Type::Object(&STATUS_INFO),
        run: query_status,
    },
    verb("stop", |call| Ok(call.vm.stop().map(|()| nothing())?)),
    verb("cont", |call| Ok(call.vm.cont().map(|()| nothing())?)),
    verb("system_reset", |call| Ok(call.vm.system_reset().map(|()| nothing())?)),
    verb("system_powerdown", |call| Ok(call.vm.system_powerdown().map(|()| nothing())?)),
    verb("system_wakeup", |call| Ok(call.vm.system_wakeup().map(|()| nothing())?)),
    verb("quit", |call| {
        call.vm.quit();
        Ok(nothing())
    }),
];

const fn verb(name: &'static str, run: fn(&mut Call<'_>) -> Result<Value, Error>) -> Command {
    Command { name, arguments: &EMPTY, returns: Type::Object(&EMPTY), run }
}

static STATUS_INFO: Object =
    Object::new(&[required("status", Type::Enum(RUN_STATES)), required("running", Type::Bool)]);
const RUN_STATES: &[&str] = &[
    "prelaunch",
    "running",
    "paused",
    "io-error",
    "suspended",
    "guest-panicked",
    "internal-error",
    "shutdown",
];

fn query_status(call: &mut Call<'_>) -> Result<Value, Error> {
    let state = call.vm.run_state();
    Ok(json!({"status": state.name(), "running": state.is_running()}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_state::RunState;

    #[test]
    fn the_schema_names_every_run_state() {
        // One that is paused in its sleep is paused.
        let names =
            RunState::ALL.into_iter().filter(|state| *state != RunState::PausedAsleep).map(RunState::name);
        assert_eq!(names.collect::<Vec<_>>(), RUN_STATES);
        assert_eq!(RunState::PausedAsleep.name(), RunState::Paused.name());
    }
}
