//! Running, stopping, ending.

use protocol::Error;
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Object, Type, optional, required};
use super::pivot::uuid;
use super::{Call, Command, nothing};
use crate::pauses::Holder;

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-status",
        arguments: &EMPTY,
        returns: Type::Object(&STATUS_INFO),
        run: query_status,
    },
    Command { name: "stop", arguments: &STOP, returns: Type::Object(&EMPTY), run: stop },
    Command { name: "cont", arguments: &CONT, returns: Type::Object(&EMPTY), run: cont },
    Command {
        name: "tarn-query-status",
        arguments: &EMPTY,
        returns: Type::Object(&TARN_STATUS),
        run: tarn_query_status,
    },
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

/// QEMU's, and the operation that a pause belongs to.
static STOP: Object = Object::new(&[optional("tarn-op", Type::Str)]);
static CONT: Object = Object::new(&[optional("tarn-op", Type::Str), optional("tarn-force", Type::Bool)]);
static TARN_STATUS: Object = Object::new(&[
    required("status", Type::Enum(RUN_STATES)),
    required("running", Type::Bool),
    required("paused-by", Type::Array(&Type::Str)),
]);
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

fn stop(call: &mut Call<'_>) -> Result<Value, Error> {
    let by = holder(call)?;
    Ok(call.vm.stop(by).map(|()| nothing())?)
}

fn cont(call: &mut Call<'_>) -> Result<Value, Error> {
    let by = holder(call)?;
    let force = call.args.optional_bool("tarn-force")?.unwrap_or(false);
    Ok(call.vm.cont(by, force).map(|()| nothing())?)
}

fn holder(call: &mut Call<'_>) -> Result<Holder, Error> {
    let operation = call.args.optional_string("tarn-op")?;
    operation.map_or(Ok(Holder::User), |text| Ok(Holder::Operation(uuid("tarn-op", &text)?)))
}

/// `query-status`, and who has stopped the VM: "user", or the operation.
fn tarn_query_status(call: &mut Call<'_>) -> Result<Value, Error> {
    let mut status = query_status(call)?;
    let name = |holder: &Holder| match holder {
        Holder::User => "user".to_owned(),
        Holder::Operation(id) => id.to_string(),
    };
    status["paused-by"] = call.vm.paused_by().iter().map(name).collect();
    Ok(status)
}

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
