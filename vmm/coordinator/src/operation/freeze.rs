//! What operations ask of the guest's agent: to freeze under a lease, to thaw, and what the freeze was worth.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::request::ms;
use crate::journal::Consistency;
use crate::{GuestSession, SessionError};

/// For an agent to be there and to thaw.
const PATIENCE: Duration = Duration::from_secs(30);
/// For a guest to write out what it has before it is frozen.
const FREEZE_PATIENCE: Duration = Duration::from_secs(90);

/// The session that froze a guest: it stays open as long as the guest is frozen, so that its end is noticed. Whatever
/// becomes of the operation, the guest is thawed when this goes, or by its lease.
#[derive(Debug)]
pub(crate) struct Freezer {
    session: GuestSession,
    /// By this session, perhaps.
    frozen: bool,
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if self.frozen {
            let _ = self.thaw();
        }
    }
}

impl Freezer {
    pub(crate) fn connect(path: &Path) -> Result<Self, SessionError> {
        let mut session = GuestSession::connect(path)?;
        session.wait_for_agent(PATIENCE)?;
        Ok(Self { session, frozen: false })
    }

    fn ask(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, SessionError> {
        let arguments = match arguments {
            Value::Object(arguments) => Some(arguments.into_iter().collect()),
            _ => None,
        };
        self.session.execute(command, arguments, limit)
    }

    /// Whether somebody has frozen the guest.
    pub(crate) fn is_frozen(&mut self) -> Result<bool, SessionError> {
        Ok(self.ask("guest-fsfreeze-status", Value::Null, PATIENCE)? == "frozen")
    }

    /// Freezes; how many filesystems. Never without a lease, which is what 0 ms would mean.
    pub(crate) fn freeze(&mut self, lease: Duration) -> Result<u64, SessionError> {
        let lease = json!({"tarn-lease-ms": ms(lease).max(1)});
        self.frozen = true;
        let frozen = self.ask("guest-fsfreeze-freeze", lease, FREEZE_PATIENCE);
        // Then the guest is as it was: if it is frozen, then by somebody else, who is not done.
        self.frozen = !frozen.as_ref().is_err_and(|error| error.refusal().is_some());
        Ok(frozen?.as_u64().unwrap_or_default())
    }

    /// Thaws, whoever froze.
    pub(crate) fn thaw(&mut self) -> Result<(), SessionError> {
        self.ask("guest-fsfreeze-thaw", Value::Null, PATIENCE)?;
        self.frozen = false;
        Ok(())
    }

    /// Leaves the guest to another coordinator, as it is.
    pub(crate) fn leave(mut self) {
        self.frozen = false;
    }

    /// What a copy is worth that was made since the freeze: asked before the thaw.
    pub(crate) fn consistency(&mut self) -> Result<Consistency, SessionError> {
        if !self.is_frozen()? {
            return Ok(Consistency::Void);
        }
        let report = match self.ask("tarn-fsfreeze-report", Value::Null, PATIENCE) {
            Ok(report) => report,
            // An agent that has no such report; it has not told of hooks either.
            Err(error) if error.refusal().is_some() => return Ok(Consistency::Filesystem),
            Err(error) => return Err(error),
        };
        Ok(judge(&report))
    }
}

fn judge(report: &Value) -> Consistency {
    let hooks = report["hooks"].as_array();
    let clean = |hook: &Value| hook.get("error").is_none_or(Value::is_null);
    match hooks {
        _ if report["void"] == true => Consistency::Void,
        Some(hooks) if !hooks.is_empty() && hooks.iter().all(clean) => Consistency::Application,
        _ => Consistency::Filesystem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_freeze_is_worth_is_what_its_report_says() {
        let hook = |error: Value| json!({"program": "/etc/hooks/db", "phase": "freeze", "error": error});
        let cases = [
            (json!({"void": false, "hooks": []}), Consistency::Filesystem),
            (json!({"void": false, "hooks": [hook(Value::Null)]}), Consistency::Application),
            (json!({"void": false, "hooks": [hook(json!("exit status 1"))]}), Consistency::Filesystem),
            (json!({"void": true, "hooks": [hook(Value::Null)]}), Consistency::Void),
            (json!({}), Consistency::Filesystem),
        ];
        for (report, expected) in cases {
            assert_eq!(judge(&report), expected, "{report}");
        }
    }
}
