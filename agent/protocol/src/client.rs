//! The client's side: build a request, understand a reply, get in step with an agent.

use serde_json::{Value, json};

use crate::{Error, ErrorClass, Item, Map, encode};

/// One request as a line, newline included.
///
/// ```
/// let line = protocol::request_line("guest-ping", None, None);
/// assert_eq!(line, "{\"execute\": \"guest-ping\"}\n");
/// ```
pub fn request_line(execute: &str, arguments: Option<Map>, id: Option<Value>) -> String {
    let mut request = Map::new();
    request.insert("execute".into(), execute.into());
    if let Some(arguments) = arguments {
        request.insert("arguments".into(), Value::Object(arguments));
    }
    if let Some(id) = id {
        request.insert("id".into(), id);
    }
    encode(&request) + "\n"
}

/// What a server may send.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// A command succeeded.
    Return {
        /// Its result.
        value: Value,
        /// The request's id.
        id: Option<Value>,
    },
    /// A command failed, or the input was no request (then there is no id).
    Error {
        /// What went wrong.
        error: Error,
        /// The request's id.
        id: Option<Value>,
    },
    /// Something happened; monitors only.
    Event(Event),
    /// The content of `QMP`, sent once on connection; monitors only.
    Greeting(Map),
}

/// An asynchronous message of a monitor.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data; empty where the event has none.
    pub data: Map,
    /// Wall clock time of the server in microseconds since 1970, if it gave one.
    pub timestamp_us: Option<u64>,
}

/// A message that is neither a reply nor an event nor a greeting.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("Not a reply: {0}")]
pub struct NotAReply(pub Value);

impl Reply {
    /// Classifies a message of a server. Members that this version does not know are ignored; an
    /// error class it does not know becomes [`ErrorClass::GenericError`].
    ///
    /// # Errors
    ///
    /// [`NotAReply`] with the message.
    pub fn parse(message: Value) -> Result<Self, NotAReply> {
        let Value::Object(mut members) = message else { return Err(NotAReply(message)) };
        if let Some(value) = members.remove("return") {
            return Ok(Self::Return { value, id: members.remove("id") });
        }
        if let Some(error) = members.get("error").and_then(error) {
            return Ok(Self::Error { error, id: members.remove("id") });
        }
        if let Some(name) = members.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            let timestamp_us = members.get("timestamp").and_then(timestamp_us);
            let data = match members.remove("data") {
                Some(Value::Object(data)) => data,
                _ => Map::new(),
            };
            return Ok(Self::Event(Event { name, data, timestamp_us }));
        }
        if let Some(Value::Object(greeting)) = members.get_mut("QMP") {
            return Ok(Self::Greeting(std::mem::take(greeting)));
        }
        Err(NotAReply(Value::Object(members)))
    }
}

fn error(value: &Value) -> Option<Error> {
    let class = value.get("class")?;
    let class = serde_json::from_value(class.clone()).unwrap_or(ErrorClass::GenericError);
    let desc = value.get("desc").and_then(Value::as_str).unwrap_or("No description").to_owned();
    Some(Error { class, desc })
}

fn timestamp_us(value: &Value) -> Option<u64> {
    let seconds = value.get("seconds")?.as_u64()?;
    let microseconds = value.get("microseconds")?.as_u64()?;
    seconds.checked_mul(1_000_000)?.checked_add(microseconds)
}

/// Getting in step with an agent: `guest-sync-delimited`.
///
/// Whatever a former client left behind, in either direction, the agent's answer to our token is the
/// first thing after a 0xFF that is worth reading.
///
/// ```text
///                    Sentinel                     {"return": token}
///  ┌──────────────┐ ─────────▶ ┌──────────────┐ ───────────────────▶ Progress::Done
///  │ AwaitingMark │            │ AwaitingToken│
///  └──────────────┘ ◀───────── └──────────────┘
///     stale replies              anything else
///     are dropped
/// ```
///
/// The caller writes [`request`](Self::request), gives every item of its decoder to
/// [`on`](Self::on), and bounds the wait. After a timeout it starts over with another token, so that
/// a late answer cannot be taken for the new one.
#[derive(Debug)]
pub struct Handshake {
    token: i64,
    state: HandshakeState,
}

#[derive(Debug, PartialEq, Eq)]
enum HandshakeState {
    AwaitingMark,
    AwaitingToken,
}

/// Where a [`Handshake`] stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The answer is still to come; the item was stale and is dropped.
    Pending,
    /// In step: the next item answers the next request.
    Done,
}

impl Handshake {
    /// `token` should differ from those of former attempts.
    pub fn new(token: i64) -> Self {
        Self { token, state: HandshakeState::AwaitingMark }
    }

    /// The bytes to send. The leading 0xFF makes the agent forget half a request of a former client;
    /// the reference agent answers that byte with an error line, which the handshake drops.
    pub fn request(&self) -> Vec<u8> {
        let arguments = Map::from_iter([("id".to_owned(), json!(self.token))]);
        let mut bytes = vec![0xFF];
        bytes.extend_from_slice(request_line("guest-sync-delimited", Some(arguments), None).as_bytes());
        bytes
    }

    /// The next item from the agent.
    pub fn on(&mut self, item: &Item) -> Progress {
        let answered = match item {
            Item::Value(value) => value.get("return").and_then(Value::as_i64) == Some(self.token),
            Item::Error(_) | Item::Sentinel => false,
        };
        if self.state == HandshakeState::AwaitingToken && answered {
            return Progress::Done;
        }
        self.state = match item {
            Item::Sentinel => HandshakeState::AwaitingToken,
            Item::Value(_) | Item::Error(_) => HandshakeState::AwaitingMark,
        };
        Progress::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoder, Limits};

    #[test]
    fn replies_are_told_apart() {
        assert_eq!(
            Reply::parse(json!({"return": 1, "id": null})),
            Ok(Reply::Return { value: json!(1), id: Some(Value::Null) })
        );
        let error = json!({"error": {"class": "CommandNotFound", "desc": "x", "data": {}}});
        let expected = Error { class: ErrorClass::CommandNotFound, desc: "x".into() };
        assert_eq!(Reply::parse(error), Ok(Reply::Error { error: expected, id: None }));
        let event = json!({"event": "STOP", "timestamp": {"seconds": 2, "microseconds": 5}});
        let expected = Event { name: "STOP".into(), data: Map::new(), timestamp_us: Some(2_000_005) };
        assert_eq!(Reply::parse(event), Ok(Reply::Event(expected)));
        assert!(matches!(Reply::parse(json!({"QMP": {}})), Ok(Reply::Greeting(_))));
        assert!(Reply::parse(json!({"execute": "x"})).is_err());
        assert!(Reply::parse(json!([])).is_err());
    }

    #[test]
    fn an_unknown_error_class_is_a_generic_error() {
        let reply = Reply::parse(json!({"error": {"class": "JSONParsing", "desc": "x"}}));
        assert_eq!(reply, Ok(Reply::Error { error: Error::generic("x"), id: None }));
    }

    /// Items of `bytes` up to and including the one that ends the handshake; `None` if none does.
    fn items_until_done(token: i64, bytes: &[u8]) -> Option<usize> {
        let mut decoder = Decoder::new(Limits::AGENT);
        let mut handshake = Handshake::new(token);
        decoder.feed(bytes);
        let mut items = std::iter::from_fn(|| decoder.next_item());
        items.position(|item| handshake.on(&item) == Progress::Done)
    }

    #[test]
    fn the_handshake_takes_the_reply_behind_the_mark() {
        assert_eq!(items_until_done(5, b"\xff{\"return\": 5}\n"), Some(1));
    }

    #[test]
    fn stale_replies_and_error_lines_before_the_mark_are_dropped() {
        let stale: &[u8] = b"turn\": {}}\n{\"return\": 5}\n{\"error\": {\"class\": \"GenericError\", \
            \"desc\": \"JSON parse error, stray '\\uFFFD'\"}}\n\xff{\"return\": 5}\n";
        assert!(items_until_done(5, stale).is_some());
    }

    #[test]
    fn the_answer_to_a_former_handshake_is_not_ours() {
        assert_eq!(items_until_done(5, b"\xff{\"return\": 4}\n\xff{\"return\": 5}\n"), Some(3));
        assert_eq!(items_until_done(5, b"\xff{\"return\": 4}\n{\"return\": 5}\n"), None);
        assert_eq!(items_until_done(5, b"{\"return\": 5}\n"), None);
    }

    #[test]
    fn the_request_starts_with_the_mark() {
        let request = Handshake::new(-3).request();
        assert_eq!(request, b"\xff{\"arguments\": {\"id\": -3}, \"execute\": \"guest-sync-delimited\"}\n");
    }
}
