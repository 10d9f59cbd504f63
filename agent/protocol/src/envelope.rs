//! Requests and responses around the bare command.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::{Error, Map, encode};

/// Whose members the envelope may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `execute`, `arguments`, `id`: the guest agent, and a monitor session without out-of-band
    /// execution.
    InBand,
    /// `exec-oob` as well: a monitor session that negotiated the capability.
    OutOfBand,
    /// Tarn's agent: `exec-oob` instead of `execute`, if there is an `id` by which to tell the answer
    /// apart. Everything else is as the reference agent has it, which knows no `exec-oob`.
    Agent,
}

/// A request whose envelope is sound; the command may still not exist.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Name of the command.
    pub execute: String,
    /// Its arguments; absent and empty are the same.
    pub arguments: Map,
    /// Any JSON value, to be echoed in the response.
    pub id: Option<Value>,
    /// True for `exec-oob`.
    pub oob: bool,
}

impl Request {
    /// Takes the envelope apart.
    ///
    /// # Errors
    ///
    /// The complete response to send instead, the request's `id` in it; texts by QEMU's
    /// `qapi/qmp-dispatch.c`.
    pub fn parse(message: Value, dialect: Dialect) -> Result<Self, Response> {
        let Value::Object(mut members) = message else {
            return Err(Response::error(Error::generic("QMP input must be a JSON object"), None));
        };
        let id = members.remove("id");
        let dialect = match dialect {
            Dialect::Agent if id.is_some() && !members.contains_key("execute") => Dialect::OutOfBand,
            Dialect::Agent => Dialect::InBand,
            other => other,
        };
        match Self::parse_members(members, dialect) {
            Ok((execute, arguments, oob)) => Ok(Self { execute, arguments, id, oob }),
            Err(error) => Err(Response::error(error, id)),
        }
    }

    fn parse_members(mut members: Map, dialect: Dialect) -> Result<(String, Map, bool), Error> {
        let execute = command(&mut members, "execute")?;
        let exec_oob = match dialect {
            Dialect::InBand | Dialect::Agent => None,
            Dialect::OutOfBand => command(&mut members, "exec-oob")?,
        };
        let arguments = match members.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Error::generic("QMP input member 'arguments' must be an object")),
        };
        if let Some(name) = members.keys().next() {
            return Err(Error::generic(format!("QMP input member '{name}' is unexpected")));
        }
        match (execute, exec_oob) {
            (Some(execute), None) => Ok((execute, arguments, false)),
            (None, Some(execute)) => Ok((execute, arguments, true)),
            (None, None) => Err(Error::generic("QMP input lacks member 'execute'")),
            (Some(_), Some(_)) => Err(Error::generic("QMP input member 'execute' clashes with 'exec-oob'")),
        }
    }

    /// The response to this request.
    pub fn respond(self, result: Result<Value, Error>) -> Response {
        Response { result, id: self.id }
    }
}

fn command(members: &mut Map, member: &str) -> Result<Option<String>, Error> {
    match members.remove(member) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name)),
        Some(_) => Err(Error::generic(format!("QMP input member '{member}' must be a string"))),
    }
}

/// What goes back: `{"return": …}` or `{"error": …}`, with the request's `id` if it had one.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// The command's outcome; a command without a result returns an empty object.
    pub result: Result<Value, Error>,
    /// The request's `id`. Never invented.
    pub id: Option<Value>,
}

impl Response {
    /// A successful response.
    pub fn success(value: impl Into<Value>, id: Option<Value>) -> Self {
        Self { result: Ok(value.into()), id }
    }

    /// An error response.
    pub fn error(error: impl Into<Error>, id: Option<Value>) -> Self {
        Self { result: Err(error.into()), id }
    }

    /// One line without its terminator: the agent ends it with LF, the monitor with CR LF.
    pub fn encode(&self) -> String {
        encode(self)
    }
}

impl Serialize for Response {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_map(None)?;
        match &self.result {
            Ok(value) => object.serialize_entry("return", value)?,
            Err(error) => object.serialize_entry("error", error)?,
        }
        if let Some(id) = &self.id {
            object.serialize_entry("id", id)?;
        }
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn desc(message: Value, dialect: Dialect) -> String {
        Request::parse(message, dialect).unwrap_err().result.unwrap_err().desc
    }

    #[test]
    fn a_request_needs_nothing_but_a_command() {
        let request = Request::parse(json!({"execute": "guest-ping"}), Dialect::InBand).unwrap();
        assert_eq!(
            request,
            Request { execute: "guest-ping".into(), arguments: Map::new(), id: None, oob: false }
        );
    }

    #[test]
    fn every_id_is_kept_null_included() {
        for id in [json!(null), json!(1), json!({"a": [1, 2]}), json!("x"), json!(u64::MAX)] {
            let request = Request::parse(json!({"execute": "x", "id": id}), Dialect::InBand).unwrap();
            assert_eq!(request.id, Some(id));
        }
    }

    #[test]
    fn a_bad_envelope_is_refused_with_its_id() {
        let refused = Request::parse(json!({"execute": 1, "id": 7}), Dialect::InBand).unwrap_err();
        assert_eq!(refused.id, Some(json!(7)));
        assert_eq!(
            refused.encode(),
            r#"{"error": {"class": "GenericError", "desc": "QMP input member 'execute' must be a string"}, "id": 7}"#
        );
    }

    #[test]
    fn envelope_faults_have_the_recorded_texts() {
        let in_band = |message| desc(message, Dialect::InBand);
        assert_eq!(in_band(json!([])), "QMP input must be a JSON object");
        assert_eq!(in_band(json!({})), "QMP input lacks member 'execute'");
        assert_eq!(in_band(json!({"arguments": {}})), "QMP input lacks member 'execute'");
        assert_eq!(in_band(json!({"execute": "x", "foo": 1})), "QMP input member 'foo' is unexpected");
        assert_eq!(in_band(json!({"exec-oob": "x"})), "QMP input member 'exec-oob' is unexpected");
        for arguments in [json!([]), json!(null)] {
            assert_eq!(
                in_band(json!({"execute": "x", "arguments": arguments})),
                "QMP input member 'arguments' must be an object"
            );
        }
    }

    #[test]
    fn out_of_band_requests_are_known_once_negotiated() {
        let request = Request::parse(json!({"exec-oob": "yank"}), Dialect::OutOfBand).unwrap();
        assert!(request.oob);
        assert_eq!(
            desc(json!({"execute": "a", "exec-oob": "a"}), Dialect::OutOfBand),
            "QMP input member 'execute' clashes with 'exec-oob'"
        );
    }

    #[test]
    fn the_agent_takes_out_of_band_requests_that_can_be_told_apart() {
        let agent = |message| Request::parse(message, Dialect::Agent);
        assert!(agent(json!({"exec-oob": "guest-ping", "id": 1})).unwrap().oob);
        assert!(!agent(json!({"execute": "guest-ping", "id": 1})).unwrap().oob);
        for message in [
            json!({"exec-oob": "guest-ping"}),
            json!({"execute": "guest-ping", "exec-oob": "guest-ping"}),
            json!({"execute": "guest-ping", "exec-oob": "guest-ping", "id": 1}),
        ] {
            assert_eq!(desc(message, Dialect::Agent), "QMP input member 'exec-oob' is unexpected");
        }
    }

    #[test]
    fn responses_echo_an_id_only_if_there_was_one() {
        assert_eq!(Response::success(json!({}), None).encode(), r#"{"return": {}}"#);
        assert_eq!(Response::success(json!({}), Some(json!(null))).encode(), r#"{"return": {}, "id": null}"#);
    }
}
