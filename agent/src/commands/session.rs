//! Commands about the conversation itself: guest-sync, guest-sync-delimited, guest-ping, guest-info.

use protocol::{Args, Error};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::dispatch;
use crate::schema::{Command, Run, Type, required};

pub(crate) const COMMANDS: &[Command] = &[
    Command::new(
        "guest-info",
        "The agent's version and commands, and which may be used now",
        Run::Prompt(info),
    )
    .returns(Type::Object(&[
        required("version", Type::Str),
        required(
            "supported_commands",
            Type::Array(&Type::Object(&[
                required("name", Type::Str),
                required("enabled", Type::Bool),
                required("success-response", Type::Bool),
            ])),
        ),
    ]))
    .while_frozen()
    .out_of_band(),
    Command::new("guest-ping", "Does nothing: the answer says that the agent is there", Run::Prompt(ping))
        .while_frozen()
        .out_of_band(),
    Command::new(
        "guest-sync",
        "Returns the id, so that the client knows what came before it",
        Run::Prompt(sync),
    )
    .takes(&[required("id", Type::Int)])
    .returns(Type::Int)
    .while_frozen()
    .out_of_band(),
    Command::new(
        "guest-sync-delimited",
        "Returns the id after a byte 0xFF, which is in no other reply",
        Run::Prompt(sync),
    )
    .takes(&[required("id", Type::Int)])
    .returns(Type::Int)
    .while_frozen()
    .out_of_band()
    .marked(),
];

fn ping(_: &mut Agent, args: Args) -> Result<Value, Error> {
    args.finish()?;
    Ok(json!({}))
}

fn sync(_: &mut Agent, mut args: Args) -> Result<Value, Error> {
    let id = args.int("id")?;
    args.finish()?;
    Ok(id.into())
}

fn info(agent: &mut Agent, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let frozen = agent.freezing.is_frozen();
    let supported = dispatch::all().map(|command| {
        json!({
            "name": command.name,
            "enabled": agent.access.permits(command, frozen),
            "success-response": command.success_response,
        })
    });
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "supported_commands": supported.collect::<Vec<_>>(),
    }))
}
