//! What the broker has to know about a command of the guest agent.

use std::time::Duration;

use protocol::{Error, Map, encode, request_line};
use serde_json::{Value, json};

use super::ChannelConfig;

/// Argument of the freeze commands that stays with the broker: how many milliseconds the freeze outlives
/// its client; `null` for ever.
pub(super) const GRACE_ARGUMENT: &str = "tarn-thaw-grace-ms";

/// How the broker treats a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Answered soon.
    Ordinary,
    /// Answered when the filesystems are frozen, which may take long.
    Freeze,
    /// Answered when the filesystems are thawed.
    Thaw,
    /// Tells whether they are frozen.
    Status,
    /// Tells what the agent can do.
    Info,
    /// Answered with this token.
    Sync(i64),
    /// Answered when the guest's storage is done with it, which may take long.
    Trim,
    /// Answered only if it fails.
    NoReply,
}

impl Kind {
    /// Whether it waits for the guest's writers, storage or hooks.
    pub(super) fn may_take_long(self) -> bool {
        matches!(self, Self::Freeze | Self::Thaw | Self::Trim)
    }
}

/// A command ready to be sent.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The request as it goes to the guest, without an id: old agents refuse one.
    pub(super) line: Vec<u8>,
    /// Its arguments, if it may be asked out of band.
    pub(super) overtaking: Option<Map>,
    /// How long a freeze outlives its client; `None` is for ever.
    pub(super) grace: Option<Duration>,
    /// Longest answer, in bytes.
    pub(super) reply_max: usize,
}

impl Command {
    /// Prepares a request.
    ///
    /// # Errors
    ///
    /// The broker's own argument is malformed. Everything else is for the agent to judge.
    pub(super) fn new(name: String, mut arguments: Map, config: &ChannelConfig) -> Result<Self, Error> {
        let kind = kind(&name, &arguments);
        let mut grace = config.thaw_grace;
        if kind == Kind::Freeze
            && let Some(value) = arguments.remove(GRACE_ARGUMENT)
        {
            grace = explicit_grace(&value)?;
        }
        let reply_max = reply_max(&name, &arguments);
        let simple = is_simple(&name).then(|| arguments.clone());
        let arguments = if arguments.is_empty() { None } else { Some(arguments) };
        let line = request_line(&name, arguments, None).into_bytes();
        let overtaking = simple.filter(|_| line.len() <= OVERTAKING_MAX);
        if line.len() > REQUEST_MAX {
            return Err(Error::generic(format!("Request is longer than {REQUEST_MAX} bytes")));
        }
        Ok(Self { name, kind, line, overtaking, grace, reply_max })
    }

    /// The thaw that the broker sends when nobody else does.
    pub(super) fn thaw() -> Self {
        Self::of_broker("guest-fsfreeze-thaw", Kind::Thaw)
    }

    /// The broker's own question to the agent, what it can do.
    pub(super) fn info() -> Self {
        Self::of_broker("guest-info", Kind::Info)
    }

    fn of_broker(name: &str, kind: Kind) -> Self {
        let line = request_line(name, None, None).into_bytes();
        Self { name: name.into(), kind, line, overtaking: None, grace: None, reply_max: REPLY_MAX }
    }

    /// The request as it goes to the guest out of band.
    pub(super) fn out_of_band_line(&self, id: i64) -> Vec<u8> {
        let mut request = json!({"exec-oob": self.name, "id": id});
        if let Some(arguments) = self.overtaking.as_ref().filter(|arguments| !arguments.is_empty()) {
            request["arguments"] = Value::Object(arguments.clone());
        }
        (encode(&request) + "\n").into_bytes()
    }
}

/// Whether the agent need not do anything to answer.
fn is_simple(name: &str) -> bool {
    matches!(
        name,
        "guest-ping"
            | "guest-info"
            | "guest-sync"
            | "guest-sync-delimited"
            | "guest-fsfreeze-status"
            | "tarn-fsfreeze-report"
    )
}

fn kind(name: &str, arguments: &Map) -> Kind {
    match name {
        "guest-sync" | "guest-sync-delimited" => {
            arguments.get("id").and_then(Value::as_i64).map_or(Kind::Ordinary, Kind::Sync)
        }
        "guest-fsfreeze-freeze" | "guest-fsfreeze-freeze-list" | "tarn-fsfreeze-freeze" => Kind::Freeze,
        "guest-fsfreeze-thaw" | "tarn-fsfreeze-thaw" => Kind::Thaw,
        "guest-fsfreeze-status" => Kind::Status,
        "guest-info" => Kind::Info,
        "guest-fstrim" => Kind::Trim,
        "guest-shutdown" | "guest-suspend-disk" | "guest-suspend-ram" | "guest-suspend-hybrid" => {
            Kind::NoReply
        }
        _ => Kind::Ordinary,
    }
}

fn explicit_grace(value: &Value) -> Result<Option<Duration>, Error> {
    match (value, value.as_i64()) {
        (Value::Null, _) => Ok(None),
        (_, Some(milliseconds)) => match u64::try_from(milliseconds) {
            Ok(milliseconds) => Ok(Some(Duration::from_millis(milliseconds))),
            Err(_) => Err(Error::invalid_parameter_value(GRACE_ARGUMENT, "a non-negative value")),
        },
        _ => Err(Error::invalid_parameter_type(GRACE_ARGUMENT, "integer")),
    }
}

/// Longest request, as the guest sees it: what the reference agent takes.
const REQUEST_MAX: usize = 64 << 20;
/// Longest request that is asked out of band.
const OVERTAKING_MAX: usize = 4 << 10;
/// Longest answer to most commands: what libvirt reads.
pub(super) const REPLY_MAX: usize = 10 << 20;
/// Longest answer at all: 48 MiB of file (the reference agent's limit) in base64, and its envelope.
pub(super) const FILE_REPLY_MAX: usize = (64 << 20) + (64 << 10);
/// Two outputs of 16 MiB (the reference agent's limit) in base64, and their envelope.
const EXEC_REPLY_MAX: usize = (43 << 20) + (64 << 10);

fn reply_max(name: &str, arguments: &Map) -> usize {
    match name {
        "guest-file-read" => {
            let count = arguments.get("count").and_then(Value::as_u64).unwrap_or(4096);
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            (count / 3).saturating_mul(4).saturating_add(64 << 10).min(FILE_REPLY_MAX)
        }
        "guest-exec-status" => EXEC_REPLY_MAX,
        _ => REPLY_MAX,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn command(name: &str, arguments: Value) -> Result<Command, Error> {
        let Value::Object(arguments) = arguments else { panic!("not an object") };
        Command::new(name.into(), arguments, &ChannelConfig::default())
    }

    #[test]
    fn the_guest_sees_the_request_without_id_and_without_the_brokers_argument() {
        let freeze = command("guest-fsfreeze-freeze", json!({GRACE_ARGUMENT: 1500})).unwrap();
        assert_eq!(freeze.line, b"{\"execute\": \"guest-fsfreeze-freeze\"}\n");
        assert_eq!(freeze.grace, Some(Duration::from_millis(1500)));
        let list = json!({"mountpoints": ["/"], GRACE_ARGUMENT: null});
        let list = command("guest-fsfreeze-freeze-list", list).unwrap();
        assert_eq!(
            list.line,
            b"{\"arguments\": {\"mountpoints\": [\"/\"]}, \"execute\": \"guest-fsfreeze-freeze-list\"}\n"
        );
        assert_eq!(list.grace, None);
    }

    #[test]
    fn a_malformed_grace_is_refused_before_anything_freezes() {
        let refusal = |value| command("guest-fsfreeze-freeze", json!({GRACE_ARGUMENT: value})).unwrap_err();
        assert_eq!(refusal(json!(-1)).desc, "Parameter 'tarn-thaw-grace-ms' expects a non-negative value");
        let wrong_type = "Invalid parameter type for 'tarn-thaw-grace-ms', expected: integer";
        for value in [json!("5"), json!(1.5), json!(true)] {
            assert_eq!(refusal(value).desc, wrong_type);
        }
    }

    #[test]
    fn long_answers_are_expected_where_they_were_asked_for() {
        let max = |name, arguments| command(name, arguments).unwrap().reply_max;
        assert_eq!(max("guest-ping", json!({})), REPLY_MAX);
        assert!(max("guest-file-read", json!({"handle": 1})) < 128 << 10);
        assert_eq!(max("guest-file-read", json!({"count": 48 << 20})), FILE_REPLY_MAX);
        assert_eq!(max("guest-file-read", json!({"count": u64::MAX})), FILE_REPLY_MAX);
        assert_eq!(max("guest-file-read", json!({"count": -1})), 4096 / 3 * 4 + (64 << 10));
    }
}
