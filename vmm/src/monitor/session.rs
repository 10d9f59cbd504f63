//! One client of the monitor: its connection, its half-read input, what it has negotiated.
//!
//! ```text
//!              greeting                qmp_capabilities
//!   connect ─────────────▶ negotiating ────────────────▶ commanding ◀──┐ reply
//!                           no events                     │ guest-*    │
//!                                                         ▼            │
//!                                                       waiting ───────┘
//! ```
//!
//! Requests are served one at a time and in order. Input is not read while a relayed command is on its way
//! or while the client does not take its output, so a client cannot make the monitor hold more than one
//! message and one chunk of input.

use std::os::fd::OwnedFd;

use protocol::{Decoder, Dialect, Error, Item, Limits, Request, Response};
use serde_json::{Value, json};

use super::commands;
use super::events::EventLine;
use super::fds::ReceivedFds;
use super::schema::check_arguments;
use super::vm::SessionId;
use crate::event_loop::{Interest, Token, Watch};
use crate::socket::{Connection, Received};

/// Unsent output beyond which no further request is served.
const OUTPUT_PAUSE: usize = 256 << 10;
/// Unsent output beyond which the client is given up.
const OUTPUT_MAX: usize = 4 << 20;
/// Read at once.
const CHUNK: usize = 64 << 10;

#[derive(Debug, PartialEq)]
enum Mode {
    Negotiating,
    Commanding,
    /// A command with this id was relayed, or takes its time.
    Waiting(Option<Value>),
}

/// One client.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    /// Whether the guest channel has heard of this session.
    pub(super) relayed: bool,
    /// Descriptors it handed in.
    pub(super) fds: ReceivedFds,
    connection: Connection,
    decoder: Decoder,
    mode: Mode,
    /// The client sends no more.
    ended: bool,
    /// Too slow, or broken: to be closed without ado.
    lost: bool,
}

impl Session {
    pub(super) fn new(id: SessionId, connection: Connection) -> Self {
        let mut session = Self {
            id,
            relayed: false,
            fds: ReceivedFds::default(),
            connection,
            decoder: Decoder::new(Limits::MONITOR),
            mode: Mode::Negotiating,
            ended: false,
            lost: false,
        };
        let greeting = json!({"QMP": {"version": commands::version(), "capabilities": []}});
        session.connection.send(line(protocol::encode(&greeting)));
        session
    }

    /// Reads once, as much as fits.
    pub(super) fn read(&mut self) {
        if !self.is_reading() {
            return;
        }
        let (mut buffer, mut fds) = (vec![0; CHUNK], Vec::<OwnedFd>::new());
        match self.connection.receive(&mut buffer, &mut fds) {
            Received::Data(length) => self.decoder.feed(&buffer[..length]),
            Received::Nothing => {}
            Received::End => self.ended = true,
            Received::Broken => self.lost = true,
        }
        self.fds.push(fds);
    }

    /// The next request to serve now. Faulty ones are answered on the way.
    pub(super) fn next_request(&mut self) -> Option<Request> {
        loop {
            if self.connection.queued() > OUTPUT_PAUSE {
                self.connection.flush();
            }
            if !self.is_serving() {
                return None;
            }
            let refusal = match self.decoder.next_item()? {
                Item::Value(message) => match Request::parse(message, Dialect::InBand) {
                    Ok(request) if self.mode == Mode::Commanding => return Some(request),
                    Ok(request) => self.negotiate(request),
                    Err(refusal) => refusal,
                },
                Item::Error(error) => Response::error(error, None),
                // What was unfinished before it is forgotten. Clients of a guest agent send it.
                Item::Sentinel => continue,
            };
            self.respond(&refusal);
        }
    }

    fn negotiate(&mut self, request: Request) -> Response {
        let result = match commands::find(&request.execute) {
            Some(command) if command.name == "qmp_capabilities" => {
                check_arguments(&request.arguments, command.arguments)
                    .and_then(|()| enable(request.arguments.get("enable")))
            }
            _ => Err(Error::expecting_negotiation()),
        };
        if result.is_ok() {
            self.mode = Mode::Commanding;
        }
        request.respond(result)
    }

    /// Sends the response to a request.
    pub(super) fn respond(&mut self, response: &Response) {
        self.connection.send(line(response.encode()));
        self.bound_output();
    }

    /// Waits for the outcome of a command.
    pub(super) fn wait(&mut self, id: Option<Value>) {
        self.mode = Mode::Waiting(id);
    }

    /// The outcome of the command it waits for.
    pub(super) fn complete(&mut self, result: Result<Value, Error>) {
        if let Mode::Waiting(id) = std::mem::replace(&mut self.mode, Mode::Commanding) {
            self.respond(&Response { result, id });
        }
    }

    /// Whether events go to this client, and outcomes of relayed commands may.
    pub(super) fn is_negotiated(&self) -> bool {
        self.mode != Mode::Negotiating
    }

    /// Sends an event.
    pub(super) fn tell(&mut self, event: &EventLine) {
        if event.expendable {
            self.connection.send_expendable(event.bytes.clone());
        } else {
            self.connection.send(event.bytes.clone());
        }
        self.bound_output();
    }

    fn bound_output(&mut self) {
        if self.connection.queued() <= OUTPUT_MAX {
            return;
        }
        self.connection.flush();
        self.connection.drop_expendable();
        if self.connection.queued() > OUTPUT_MAX {
            tracing::warn!(session = self.id.0, "Monitor client does not read its output, giving it up");
            self.lost = true;
        }
    }

    /// Writes what the client takes.
    pub(super) fn flush(&mut self) {
        self.connection.flush();
    }

    /// The peer has closed both directions: nothing we send arrives. What it sent may still be served,
    /// unless we cannot read it now.
    pub(super) fn hung_up(&mut self) {
        self.lost |= !self.is_reading() && self.connection.is_hung_up();
    }

    /// Whether nothing is left to do for it.
    pub(super) fn is_over(&self) -> bool {
        let waiting = matches!(self.mode, Mode::Waiting(_));
        let served = self.ended && !waiting && self.decoder.unread_bytes() == 0;
        self.lost || self.connection.is_broken() || (served && self.connection.queued() == 0)
    }

    fn is_serving(&self) -> bool {
        let waiting = matches!(self.mode, Mode::Waiting(_));
        !waiting && !self.lost && self.connection.queued() <= OUTPUT_PAUSE
    }

    fn is_reading(&self) -> bool {
        self.is_serving() && !self.ended && self.decoder.unread_bytes() == 0
    }

    /// Tells the loop what to wait for.
    pub(super) fn watch(&mut self, token: Token, watch: &mut dyn Watch) {
        // Input that is already here is served once there is room for the answers.
        let backlog = self.is_serving() && self.decoder.unread_bytes() > 0;
        let write = backlog || self.connection.queued() > 0;
        self.connection.watch(token, Interest { read: self.is_reading(), write }, watch);
    }

    pub(super) fn close(self, watch: &mut dyn Watch) {
        self.connection.close(watch);
    }
}

/// No capability is offered, so none can be enabled.
fn enable(wanted: Option<&Value>) -> Result<Value, Error> {
    match wanted.and_then(|wanted| wanted.get(0)).and_then(Value::as_str) {
        None => Ok(json!({})),
        Some(name) => Err(Error::generic(format!("Capability {name} not available"))),
    }
}

fn line(message: String) -> Vec<u8> {
    let mut bytes = message.into_bytes();
    bytes.extend_from_slice(b"\r\n");
    bytes
}
