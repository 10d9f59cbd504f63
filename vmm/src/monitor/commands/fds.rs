//! File descriptors handed in with SCM_RIGHTS.

use protocol::Error;
use serde_json::Value;

use super::super::schema::{EMPTY, Object, Type, optional, required};
use super::{Call, Command, nothing};

pub(super) const COMMANDS: &[Command] = &[
    Command { name: "getfd", arguments: &FD_NAME, returns: Type::Object(&EMPTY), run: getfd },
    Command { name: "closefd", arguments: &FD_NAME, returns: Type::Object(&EMPTY), run: closefd },
    Command { name: "add-fd", arguments: &ADD_FD, returns: Type::Object(&ADD_FD_INFO), run: add_fd },
    Command { name: "remove-fd", arguments: &REMOVE_FD, returns: Type::Object(&EMPTY), run: remove_fd },
    Command {
        name: "query-fdsets",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&FDSET_INFO)),
        run: |call| Ok(call.fdsets.list()),
    },
];

static FD_NAME: Object = Object::new(&[required("fdname", Type::Str)]);
static ADD_FD: Object = Object::new(&[optional("fdset-id", Type::Int), optional("opaque", Type::Str)]);
static ADD_FD_INFO: Object = Object::new(&[required("fdset-id", Type::Int), required("fd", Type::Int)]);
static REMOVE_FD: Object = Object::new(&[required("fdset-id", Type::Int), optional("fd", Type::Int)]);
static FDSET_INFO: Object = Object::new(&[
    required("fdset-id", Type::Int),
    required("fds", Type::Array(&Type::Object(&FDSET_FD_INFO))),
]);
static FDSET_FD_INFO: Object = Object::new(&[required("fd", Type::Int), optional("opaque", Type::Str)]);

fn getfd(call: &mut Call<'_>) -> Result<Value, Error> {
    let name = call.args.string("fdname")?;
    call.fds.name(name).map(|()| nothing())
}

fn closefd(call: &mut Call<'_>) -> Result<Value, Error> {
    let name = call.args.string("fdname")?;
    call.fds.close(&name).map(|()| nothing())
}

fn add_fd(call: &mut Call<'_>) -> Result<Value, Error> {
    let set = call.args.optional_int("fdset-id")?;
    let opaque = call.args.optional_string("opaque")?;
    let fd = call.fds.take_pending()?;
    call.fdsets.add(set, opaque, fd)
}

fn remove_fd(call: &mut Call<'_>) -> Result<Value, Error> {
    let set = call.args.int("fdset-id")?;
    let fd = call.args.optional_int("fd")?;
    call.fdsets.remove(set, fd).map(|()| nothing())
}
