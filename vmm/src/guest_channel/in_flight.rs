//! The command that the guest works on, and how it ends.

use std::time::{Duration, Instant};

use protocol::{Error, Reply};
use serde_json::Value;

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
    /// Token of the sync right behind it.
    pub(super) probe: Option<i64>,
    /// A 0xFF came, and no message since.
    pub(super) marked: bool,
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
    pub(super) fn new(asker: Asker, command: Command, deadline: Instant, probe: Option<i64>) -> Self {
        let Command { name, kind, line: _, overtaking: _, grace, reply_max } = command;
        Self { asker, name, kind, grace, reply_max, deadline, probe, marked: false }
    }

    /// What a message of the guest means for it; `None` if it is not about it. It was sent without an id, so
    /// no answer with one is.
    pub(super) fn on_message(&mut self, message: Value) -> Option<Ending> {
        let marked = std::mem::take(&mut self.marked);
        match Reply::parse(message) {
            Ok(Reply::Return { id: Some(id), .. } | Reply::Error { id: Some(id), .. }) if !id.is_null() => {
                None
            }
            Ok(Reply::Return { value, .. }) => {
                let token = value.as_i64();
                if marked && self.probe.is_some() && token == self.probe {
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
