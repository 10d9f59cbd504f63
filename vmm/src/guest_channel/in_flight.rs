//! The command that the guest works on, and how it ends.

use std::time::{Duration, Instant};

use protocol::{Error, Map, Reply, request_line};
use serde_json::{Value, json};

use super::Client;
use super::command::{Command, Kind};

/// The command that the guest works on.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) asker: Asker,
    pub(super) name: String,
    pub(super) kind: Kind,
    /// How long a freeze outlives its client; `None` is for ever.
    pub(super) grace: Option<Duration>,
    pub(super) reply_max: usize,
    pub(super) deadline: Instant,
    /// The question right behind it.
    pub(super) probe: Option<Probe>,
    /// A 0xFF came, and no message since.
    pub(super) marked: bool,
}

/// A question right behind a command that answers only if it fails: answered first, it tells that the command
/// was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Probe {
    /// `guest-sync-delimited` with this token, which any agent answers after the command.
    Sync(i64),
    /// `guest-ping` with this id. An agent that knows ids and out-of-band execution takes a sync for a sign
    /// that nobody waits for the command any longer.
    Ping(i64),
}

impl Probe {
    /// The question as it goes to the guest.
    pub(super) fn line(self) -> String {
        match self {
            // Without the usual 0xFF before it: that would be answered, too, by an error.
            Self::Sync(token) => {
                let arguments = Map::from_iter([("id".to_owned(), json!(token))]);
                request_line("guest-sync-delimited", Some(arguments), None)
            }
            Self::Ping(id) => request_line("guest-ping", None, Some(json!(id))),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    Client(Client),
    /// The client that asked is gone.
    Nobody,
    /// The broker itself, thawing.
    Broker,
}

/// How a command ended.
#[derive(Debug)]
pub(super) enum Ending {
    Answered(Result<Value, Error>),
    /// It has no answer, and was accepted.
    Accepted,
    /// It will never be known; the client gets this.
    Unknown(Error),
}

impl InFlight {
    /// The rest of the command is its line, which is on its way.
    pub(super) fn new(asker: Asker, command: Command, deadline: Instant, probe: Option<Probe>) -> Self {
        let Command { name, kind, line: _, overtaking: _, grace, reply_max } = command;
        Self { asker, name, kind, grace, reply_max, deadline, probe, marked: false }
    }

    /// What a message of the guest means for it; `None` if it is not about it. It was sent without an id, so
    /// no answer with one is.
    pub(super) fn on_message(&mut self, message: Value) -> Option<Ending> {
        let marked = std::mem::take(&mut self.marked);
        match Reply::parse(message) {
            Ok(Reply::Return { id: Some(id), .. }) if !id.is_null() => {
                let is_probe = id.as_i64().is_some_and(|id| self.probe == Some(Probe::Ping(id)));
                is_probe.then_some(Ending::Accepted)
            }
            Ok(Reply::Error { id: Some(id), .. }) if !id.is_null() => None,
            Ok(Reply::Return { value, .. }) => {
                let token = value.as_i64();
                let is_probe = token.is_some_and(|token| self.probe == Some(Probe::Sync(token)));
                if marked && is_probe {
                    Some(Ending::Accepted)
                } else if matches!(self.kind, Kind::Sync(expected) if token != Some(expected)) {
                    None
                } else {
                    Some(Ending::Answered(Ok(value)))
                }
            }
            Ok(Reply::Error { error, .. }) => Some(Ending::Answered(Err(error))),
            Ok(Reply::Event(_) | Reply::Greeting(_)) | Err(_) => None,
        }
    }

    /// Its answer will not come, for the reason in `text`.
    pub(super) fn lost(&self, text: String) -> Ending {
        match self.kind {
            Kind::NoReply => Ending::Accepted,
            _ => Ending::Unknown(Error::generic(text)),
        }
    }
}
