//! The guest channel, seen from the host.

use protocol::Error;
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Object, Type, optional, required};
use super::{Call, Command};

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "tarn-query-agent",
    arguments: &EMPTY,
    returns: Type::Object(&AGENT_INFO),
    run: query_agent,
}];

static AGENT_INFO: Object = Object::new(&[
    required("connected", Type::Bool),
    required("in-sync", Type::Bool),
    optional("out-of-band", Type::Bool),
    required("frozen", Type::Bool),
    optional("frozen-by", Type::Str),
    optional("thaw-in-ms", Type::Int),
    required("automatic-thaws", Type::Int),
    required("malformed-replies", Type::Int),
]);

fn query_agent(call: &mut Call<'_>) -> Result<Value, Error> {
    let status = call.vm.agent();
    let mut info = json!({
        "connected": status.connected,
        "in-sync": status.in_sync,
        "frozen": status.frozen.is_some(),
        "automatic-thaws": status.automatic_thaws,
        "malformed-replies": status.malformed_replies,
    });
    if let Some(out_of_band) = status.out_of_band {
        info["out-of-band"] = out_of_band.into();
    }
    if let Some(frozen) = status.frozen {
        if let Some(by) = frozen.by {
            info["frozen-by"] = by.into();
        }
        if let Some(thaw_in) = frozen.thaw_in {
            info["thaw-in-ms"] = u64::try_from(thaw_in.as_millis()).unwrap_or(u64::MAX).into();
        }
    }
    Ok(info)
}
