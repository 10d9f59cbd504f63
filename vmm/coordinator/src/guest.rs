//! A session with the guest agent: in step by guest-sync-delimited, then one command at a time.
//!
//! The protocol has no ids that every agent echoes, so order is all that ties a reply to its command. A command that
//! timed out leaves the session out of step; the next one first synchronises again, with a fresh token, and drops
//! whatever comes before the answer to it.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protocol::{Error, ErrorClass, Handshake, Item, Map, Progress, Reply, request_line};
use serde_json::Value;

use crate::connection::{Connection, Deadline};
use crate::{Peer, SessionError};

const SYNC: &str = "guest-sync-delimited";
/// How long the first attempt to get in step waits before it is repeated; each one waits twice as long as the last.
/// Tarn's broker holds a request until the guest has an agent: then repeating it only makes more work. Elsewhere, what is
/// sent before the agent is there is lost.
const FIRST_ATTEMPT: Duration = Duration::from_secs(4);
/// And after an attempt was answered with an error, by the broker or by an agent of the old school.
const AFTER_ERROR: Duration = Duration::from_millis(5);
const LONGEST_ATTEMPT: Duration = Duration::from_secs(32);
/// How long an agent may take to say whether filesystems are frozen.
const WHETHER_FROZEN: Duration = Duration::from_secs(60);

/// A connection to a guest agent.
#[derive(Debug)]
pub struct GuestSession {
    connection: Connection,
    in_step: bool,
    next_token: i64,
    first_attempt: Duration,
}

impl GuestSession {
    /// Connects to the socket at `path`. Whether an agent answers shows with the first command.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, SessionError> {
        let connection = Connection::open(Peer::Agent, path)?;
        // A start that former clients have not used: their answers may still be under way.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let token = i64::try_from(now.as_micros()).unwrap_or_default();
        Ok(Self { connection, in_step: false, next_token: token, first_attempt: FIRST_ATTEMPT })
    }

    /// Gets in step with the agent, as often as it takes: also the way to wait for a guest that is still booting.
    ///
    /// # Errors
    /// No answer within `timeout`, or the end of the connection.
    pub fn wait_for_agent(&mut self, timeout: Duration) -> Result<(), SessionError> {
        let deadline = Deadline::after(timeout);
        let (mut patience, mut after_error) = (self.first_attempt, AFTER_ERROR);
        while deadline.left().is_some() {
            if self.synchronise(deadline.or(patience), after_error)? {
                return Ok(());
            }
            patience = (patience * 2).min(LONGEST_ATTEMPT);
            after_error = (after_error * 2).min(LONGEST_ATTEMPT);
        }
        Err(deadline.missed(Peer::Agent, SYNC))
    }

    /// One attempt; `false` when it was in vain. An error line ends it `after_error` later: it is either the reference
    /// agent's remark on the 0xFF, then the answer follows at once, or it is all that will come.
    fn synchronise(&mut self, deadline: Deadline, after_error: Duration) -> Result<bool, SessionError> {
        self.in_step = false;
        let mut handshake = Handshake::new(self.fresh_token());
        if let Err(error) = self.connection.send(&handshake.request(), SYNC, deadline) {
            return if matches!(error, SessionError::Timeout { .. }) { Ok(false) } else { Err(error) };
        }
        let mut limit = deadline;
        while let Some(item) = self.connection.next(limit)? {
            if handshake.on(&item) == Progress::Done {
                self.in_step = true;
                return Ok(true);
            }
            if matches!(&item, Item::Value(value) if value.get("error").is_some()) {
                limit = deadline.or(after_error);
            }
        }
        Ok(false)
    }

    /// A number that this host has not used before, as far as its clock goes.
    pub(crate) fn fresh_token(&mut self) -> i64 {
        self.next_token += 1;
        self.next_token
    }

    /// Runs a command and waits for its result; gets in step first where that is needed.
    ///
    /// # Errors
    /// [`SessionError::Refused`] with the agent's words; [`SessionError::Frozen`] if a freeze is why; a timeout, after
    /// which the session stays usable; or the end of the connection.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Option<Map>,
        timeout: Duration,
    ) -> Result<Value, SessionError> {
        match self.ask(command, arguments, timeout) {
            Err(SessionError::Refused { command, source, .. })
                if Self::is_disabled(&source) && self.is_frozen(&source) =>
            {
                Err(SessionError::Frozen { command, refusal: source })
            }
            result => result,
        }
    }

    pub(crate) fn is_disabled(refusal: &Error) -> bool {
        refusal.class == ErrorClass::CommandNotFound && refusal.desc.contains("disabled")
    }

    /// Whether a freeze is why a command is disabled. qemu-ga says so up to 9.0; after that one has to ask. Tarn's agent is
    /// not asked by guest-fsfreeze-status, which would renew a lease that is not ours.
    fn is_frozen(&mut self, refusal: &Error) -> bool {
        if refusal.desc.contains("frozen") {
            return true;
        }
        match self.ask("tarn-fsfreeze-report", None, WHETHER_FROZEN) {
            Ok(report) => report["state"] != "thawed",
            Err(SessionError::Refused { .. }) => {
                let status = self.ask("guest-fsfreeze-status", None, WHETHER_FROZEN);
                status.is_ok_and(|status| status == "frozen")
            }
            Err(_) => false,
        }
    }

    fn ask(
        &mut self,
        command: &str,
        arguments: Option<Map>,
        timeout: Duration,
    ) -> Result<Value, SessionError> {
        let deadline = Deadline::after(timeout);
        match self.exchange(command, arguments, deadline)? {
            Some(value) => Ok(value),
            None => Err(deadline.missed(Peer::Agent, command)),
        }
    }

    /// Runs a command that does not answer when it succeeds (guest-shutdown, guest-suspend-*): an error reply within
    /// `patience` is its failure, silence and the end of the connection are its success.
    ///
    /// # Errors
    /// [`SessionError::Refused`], or no agent to send it to.
    pub fn execute_without_reply(
        &mut self,
        command: &str,
        arguments: Option<Map>,
        patience: Duration,
    ) -> Result<(), SessionError> {
        if !self.in_step {
            self.wait_for_agent(patience)?;
        }
        match self.exchange(command, arguments, Deadline::after(patience)) {
            Ok(_) | Err(SessionError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes and drops what the agent sent unasked, if anything.
    ///
    /// # Errors
    /// [`SessionError::Closed`], or the connection broke.
    pub fn check_open(&mut self) -> Result<(), SessionError> {
        while self.connection.next(Deadline::after(Duration::from_millis(1)))?.is_some() {}
        Ok(())
    }

    fn exchange(
        &mut self,
        command: &str,
        arguments: Option<Map>,
        deadline: Deadline,
    ) -> Result<Option<Value>, SessionError> {
        if !self.in_step {
            self.wait_for_agent(deadline.left().unwrap_or_default())?;
        }
        // Until its reply is here.
        self.in_step = false;
        self.connection.send(request_line(command, arguments, None).as_bytes(), command, deadline)?;
        let Some(value) = self.connection.next_value(deadline)? else { return Ok(None) };
        match Reply::parse(value) {
            Ok(Reply::Return { value, .. }) => {
                self.in_step = true;
                Ok(Some(value))
            }
            Ok(Reply::Error { error, .. }) => {
                self.in_step = true;
                let command = command.to_owned();
                Err(SessionError::Refused { peer: Peer::Agent, command, source: error })
            }
            Ok(other) => {
                let message = Value::String(format!("{other:?}"));
                Err(SessionError::unexpected(Peer::Agent, command, &message))
            }
            Err(bad) => Err(SessionError::unexpected(Peer::Agent, command, &bad.0)),
        }
    }
}

impl AsFd for GuestSession {
    /// For poll(2): readable while nothing was asked means that the connection has ended, or nearly so.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Server;

    const SOON: Duration = Duration::from_secs(10);
    const BRIEF: Duration = Duration::from_millis(60);

    #[test]
    fn a_command_follows_the_handshake() {
        let server = Server::start(|client| {
            client.synchronise();
            client.request("guest-ping");
            client.send(json!({"return": {}}));
        });
        let mut session = GuestSession::connect(server.path()).unwrap();
        assert_eq!(session.execute("guest-ping", None, SOON).unwrap(), json!({}));
    }

    #[test]
    fn an_agent_that_is_not_there_yet_is_awaited() {
        let server = Server::start(|client| {
            // Twice in vain: once with an error, as of a broker without an agent, once in silence.
            client.request(SYNC);
            client.send(json!({"error": {"class": "GenericError", "desc": "not connected"}}));
            client.request(SYNC);
            client.synchronise_until_end();
        });
        let mut session = GuestSession::connect(server.path()).unwrap();
        session.first_attempt = BRIEF;
        session.wait_for_agent(SOON).unwrap();
    }

    #[test]
    fn a_guest_without_an_agent_is_given_up_in_time() {
        let server = Server::start(|client| client.wait_for_end());
        let mut session = GuestSession::connect(server.path()).unwrap();
        let error = session.execute("guest-ping", None, BRIEF).unwrap_err();
        assert!(error.to_string().contains("is an agent running in the guest"), "{error}");
    }

    #[test]
    fn after_a_timeout_the_late_reply_is_dropped() {
        let server = Server::start(|client| {
            client.synchronise();
            client.request("guest-slow");
            let token = client.request(SYNC)["arguments"]["id"].clone();
            client.send(json!({"return": "late"}));
            client.send_bytes(b"\xff");
            client.send(json!({"return": token}));
            client.request("guest-ping");
            client.send(json!({"return": "on time"}));
        });
        let mut session = GuestSession::connect(server.path()).unwrap();
        session.wait_for_agent(SOON).unwrap();
        assert!(matches!(session.execute("guest-slow", None, BRIEF), Err(SessionError::Timeout { .. })));
        assert_eq!(session.execute("guest-ping", None, SOON).unwrap(), json!("on time"));
    }

    #[test]
    fn a_guest_that_is_frozen_already_is_said_to_be() {
        let server = Server::start(|client| {
            client.synchronise();
            client.request("guest-fsfreeze-freeze");
            let desc = "Command guest-fsfreeze-freeze has been disabled: the command is not allowed";
            client.send(json!({"error": {"class": "CommandNotFound", "desc": desc}}));
            client.request("tarn-fsfreeze-report");
            client.send(json!({"return": {"state": "frozen"}}));
        });
        let mut session = GuestSession::connect(server.path()).unwrap();
        let error = session.execute("guest-fsfreeze-freeze", None, SOON).unwrap_err();
        assert!(error.refusal().unwrap().desc.contains("disabled"));
        let expected = "The guest agent refused guest-fsfreeze-freeze: the guest's filesystems are frozen; `tarn thaw` \
                        ends that";
        assert_eq!(crate::chain(&error), expected);
    }

    #[test]
    fn a_refusal_leaves_the_session_in_step() {
        let server = Server::start(|client| {
            client.synchronise();
            client.request("guest-nope");
            client.send(json!({"error": {"class": "CommandNotFound", "desc": "no such thing"}}));
            client.request("guest-ping");
            client.send(json!({"return": {}}));
        });
        let mut session = GuestSession::connect(server.path()).unwrap();
        let error = session.execute("guest-nope", None, SOON).unwrap_err();
        assert_eq!(error.refusal().unwrap().desc, "no such thing");
        session.execute("guest-ping", None, SOON).unwrap();
    }

    #[test]
    fn a_shutdown_succeeds_in_silence_and_by_hanging_up_and_fails_with_an_error() {
        let silent = Server::start(|client| {
            client.synchronise();
            client.request("guest-shutdown");
            client.wait_for_end();
        });
        let mut session = GuestSession::connect(silent.path()).unwrap();
        session.wait_for_agent(SOON).unwrap();
        session.execute_without_reply("guest-shutdown", None, BRIEF).unwrap();

        let dying = Server::start(|client| {
            client.synchronise();
            client.request("guest-shutdown");
        });
        let mut session = GuestSession::connect(dying.path()).unwrap();
        session.execute_without_reply("guest-shutdown", None, SOON).unwrap();

        let refusing = Server::start(|client| {
            client.synchronise();
            client.request("guest-shutdown");
            client.send(json!({"error": {"class": "GenericError", "desc": "frozen"}}));
        });
        let mut session = GuestSession::connect(refusing.path()).unwrap();
        let error = session.execute_without_reply("guest-shutdown", None, SOON).unwrap_err();
        assert_eq!(error.refusal().unwrap().desc, "frozen");
    }
}
