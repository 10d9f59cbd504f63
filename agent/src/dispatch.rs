//! From a decoded message to the bytes of its reply.

use std::path::Path;
use std::rc::Rc;

use protocol::{Args, Dialect, Error, Item, Request, Response};
use serde_json::{Value, json};

use crate::commands::exec::Children;
use crate::commands::file::Files;
use crate::commands::{exec, file, fsfreeze, shutdown, system};
use crate::freeze::{Freezer, Linux};
use crate::log;
use crate::poller::Poller;

/// What the commands work on.
pub(crate) struct Guest {
    pub(crate) files: Files,
    pub(crate) children: Children,
    pub(crate) freezer: Freezer<Linux>,
}

/// A command's code. `Err` is the complete error reply.
type Handler = fn(&mut Guest, Args) -> Result<Value, Error>;

/// A command, declared once.
struct Command {
    name: &'static str,
    handler: Handler,
    /// Whether it may run while filesystems are frozen: only if it can neither write to a disk nor
    /// wait for somebody who does.
    while_frozen: bool,
    /// Whether success is answered at all.
    success_response: bool,
    /// Whether 0xFF precedes a successful reply.
    marked: bool,
}

/// Every command; `guest-info` lists them in this order.
const COMMANDS: &[Command] = &[
    command("guest-get-osinfo", system::get_osinfo),
    command("guest-get-host-name", system::get_host_name),
    command("guest-get-time", system::get_time),
    command("guest-exec", exec::exec),
    command("guest-exec-status", exec::exec_status),
    command("guest-fsfreeze-freeze", fsfreeze::freeze),
    command("guest-fsfreeze-thaw", fsfreeze::thaw).while_frozen(),
    command("guest-fsfreeze-status", fsfreeze::status).while_frozen(),
    command("guest-file-open", file::open),
    command("guest-file-close", file::close),
    command("guest-file-read", file::read),
    command("guest-file-write", file::write),
    command("guest-file-seek", file::seek),
    command("guest-file-flush", file::flush),
    command("guest-shutdown", shutdown::shutdown).without_success_response(),
    command("guest-info", info).while_frozen(),
    command("guest-ping", ping).while_frozen(),
    command("guest-sync", sync).while_frozen(),
    command("guest-sync-delimited", sync).while_frozen().marked(),
];

const fn command(name: &'static str, handler: Handler) -> Command {
    Command { name, handler, while_frozen: false, success_response: true, marked: false }
}

impl Command {
    const fn while_frozen(self) -> Self {
        Self { while_frozen: true, ..self }
    }

    const fn without_success_response(self) -> Self {
        Self { success_response: false, ..self }
    }

    const fn marked(self) -> Self {
        Self { marked: true, ..self }
    }
}

impl Guest {
    pub(crate) fn new(statedir: &Path, poller: Rc<Poller>) -> Self {
        Self {
            files: Files::new(statedir),
            children: Children::new(poller),
            freezer: Freezer::new(Linux, statedir),
        }
    }

    /// The reply to one item, newline included; `None` if there is none to be sent.
    pub(crate) fn answer(&mut self, item: Item) -> Option<Vec<u8>> {
        let message = match item {
            Item::Value(message) => message,
            Item::Sentinel => return None,
            Item::Error(error) => return Some(line(&Response::error(error, None), false)),
        };
        let mut request = match Request::parse(message, Dialect::InBand) {
            Ok(request) => request,
            Err(refusal) => return Some(line(&refusal, false)),
        };
        let args = Args::new(std::mem::take(&mut request.arguments));
        let (result, quiet, marked) = match self.find(&request.execute) {
            Ok(command) => {
                log::debug(format_args!("{}", command.name));
                let result = (command.handler)(self, args);
                let success = result.is_ok();
                (result, success && !command.success_response, success && command.marked)
            }
            Err(error) => (Err(error), false, false),
        };
        (!quiet).then(|| line(&request.respond(result), marked))
    }

    /// Thaws what is frozen when nobody is left to ask for it.
    pub(crate) fn thaw_for_nobody(&mut self, why: &str) {
        if self.freezer.is_frozen() {
            log::warning(format_args!("Thawing: {why}"));
            if let Err(error) = fsfreeze::thaw_now(self) {
                log::error(format_args!("Cannot thaw: {error}"));
            }
        }
    }

    fn find(&self, name: &str) -> Result<&'static Command, Error> {
        let found = COMMANDS.iter().find(|command| command.name == name);
        let command = found.ok_or_else(|| Error::command_not_found(name))?;
        if !self.is_enabled(command) {
            return Err(Error::command_disabled(name, Some("the command is not allowed")));
        }
        Ok(command)
    }

    fn is_enabled(&self, command: &Command) -> bool {
        command.while_frozen || !self.freezer.is_frozen()
    }
}

fn line(response: &Response, marked: bool) -> Vec<u8> {
    let mut bytes = response.encode().into_bytes();
    if marked {
        bytes.insert(0, 0xFF);
    }
    bytes.push(b'\n');
    bytes
}

fn ping(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    Ok(json!({}))
}

fn sync(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let id = args.int("id")?;
    args.finish()?;
    Ok(id.into())
}

fn info(guest: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let supported = COMMANDS.iter().map(|command| {
        json!({
            "name": command.name,
            "enabled": guest.is_enabled(command),
            "success-response": command.success_response,
        })
    });
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "supported_commands": supported.collect::<Vec<_>>(),
    }))
}
