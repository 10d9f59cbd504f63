//! What the monitor is and knows.

use serde_json::{Value, json};

use super::super::events::EVENTS;
use super::super::schema::{EMPTY, Introspection, Object, SCHEMA_INFO, Type, optional, required};
use super::{Command, all};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "qmp_capabilities",
        arguments: &CAPABILITIES,
        returns: Type::Object(&EMPTY),
        // Before the negotiation the session answers it itself.
        run: |_| Err(protocol::Error::already_negotiated()),
    },
    Command {
        name: "query-version",
        arguments: &EMPTY,
        returns: Type::Object(&VERSION_INFO),
        run: |_| Ok(version()),
    },
    Command {
        name: "query-commands",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&COMMAND_INFO)),
        run: |_| Ok(all().map(|command| json!({"name": command.name})).collect()),
    },
    Command {
        name: "query-qmp-schema",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&SCHEMA_INFO)),
        run: |_| Ok(schema()),
    },
];

static CAPABILITIES: Object = Object::new(&[optional("enable", Type::Array(&Type::Enum(CAPABILITY_NAMES)))]);
/// Capabilities the protocol knows; none is offered.
const CAPABILITY_NAMES: &[&str] = &["oob"];
static VERSION_INFO: Object =
    Object::new(&[required("qemu", Type::Object(&VERSION_TRIPLE)), required("package", Type::Str)]);
static VERSION_TRIPLE: Object =
    Object::new(&[required("major", Type::Int), required("minor", Type::Int), required("micro", Type::Int)]);
static COMMAND_INFO: Object = Object::new(&[required("name", Type::Str)]);

/// Our own version, where QEMU's clients look for one.
pub(in crate::monitor) fn version() -> Value {
    let number = |text: &str| text.parse::<u32>().unwrap_or_default();
    json!({
        "qemu": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("tarn-", env!("CARGO_PKG_VERSION")),
    })
}

fn schema() -> Value {
    let mut introspection = Introspection::default();
    for command in all() {
        introspection.command(command.name, command.arguments, &command.returns);
    }
    for (name, data) in EVENTS {
        introspection.event(name, data);
    }
    introspection.finish()
}
