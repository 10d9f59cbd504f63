//! Facts about the guest: guest-get-osinfo and guest-get-host-name.

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::os_release;
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("guest-get-osinfo", "The operating system and its kernel", Run::Worker(get_osinfo)).returns(
        Type::Object(&[
            optional("kernel-release", Type::Str),
            optional("kernel-version", Type::Str),
            optional("machine", Type::Str),
            optional("id", Type::Str),
            optional("name", Type::Str),
            optional("pretty-name", Type::Str),
            optional("version", Type::Str),
            optional("version-id", Type::Str),
            optional("variant", Type::Str),
            optional("variant-id", Type::Str),
        ]),
    ),
    Command::new("guest-get-host-name", "The guest's host name", Run::Worker(get_host_name))
        .returns(Type::Object(&[required("host-name", Type::Str)])),
];

fn get_host_name(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    let name = if name.is_empty() { "localhost".into() } else { name };
    Ok(json!({"host-name": name}))
}

fn get_osinfo(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let system = rustix::system::uname();
    let mut info = Map::new();
    let kernel = [
        ("kernel-release", system.release()),
        ("kernel-version", system.version()),
        ("machine", system.machine()),
    ];
    for (member, value) in kernel {
        info.insert(member.into(), value.to_string_lossy().into());
    }
    for (member, value) in os_release::read() {
        info.insert(member.into(), value.into());
    }
    Ok(Value::Object(info))
}
