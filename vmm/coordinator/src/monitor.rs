//! A session with a VM's QMP monitor (docs/interop/qmp-spec: greeting, negotiation, commands, events).
//!
//! ```text
//!   connect ─▶ greeting ─▶ qmp_capabilities ─▶ execute, execute, …
//!                                                 └─ events that arrive meanwhile wait in a queue
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use protocol::{Event, Map, Reply, request_line};
use serde_json::Value;

use crate::connection::{Connection, Deadline};
use crate::{Peer, SessionError};

/// Events kept for a client that does not fetch them; beyond that the oldest are forgotten.
const MAX_EVENTS: usize = 1024;

/// A negotiated connection to a monitor.
///
/// Every command carries an id, so that a reply which comes after its command's timeout is recognised and dropped.
#[derive(Debug)]
pub struct MonitorSession {
    connection: Connection,
    greeting: Map,
    events: VecDeque<Event>,
    next_id: u64,
}

impl MonitorSession {
    /// Connects to the socket at `path` and negotiates; all of it within `timeout`.
    ///
    /// # Errors
    /// Nobody listens, the peer does not answer in time, or it is no monitor.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, SessionError> {
        let deadline = Deadline::after(timeout);
        let connection = Connection::open(Peer::Monitor, path)?;
        let mut session = Self { connection, greeting: Map::new(), events: VecDeque::new(), next_id: 1 };
        match session.next_reply("its greeting", deadline)? {
            None => return Err(deadline.missed(Peer::Monitor, "the connection with a greeting")),
            Some(Reply::Greeting(greeting)) => session.greeting = greeting,
            Some(other) => {
                let message = Value::String(format!("{other:?}"));
                return Err(SessionError::unexpected(Peer::Monitor, "the connection", &message));
            }
        }
        session.execute_until("qmp_capabilities", None, deadline)?;
        Ok(session)
    }

    /// The content of the server's greeting.
    pub fn greeting(&self) -> &Map {
        &self.greeting
    }

    /// Runs a command and waits for its result.
    ///
    /// # Errors
    /// [`SessionError::Refused`] with the monitor's words; a timeout, after which the session stays usable; or the
    /// end of the connection.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Option<Map>,
        timeout: Duration,
    ) -> Result<Value, SessionError> {
        self.execute_until(command, arguments, Deadline::after(timeout))
    }

    fn execute_until(
        &mut self,
        command: &str,
        arguments: Option<Map>,
        deadline: Deadline,
    ) -> Result<Value, SessionError> {
        let id = Value::from(self.next_id);
        self.next_id += 1;
        let line = request_line(command, arguments, Some(id.clone()));
        self.connection.send(line.as_bytes(), command, deadline)?;
        loop {
            match self.next_reply(command, deadline)? {
                None => return Err(deadline.missed(Peer::Monitor, command)),
                Some(Reply::Return { value, id: Some(of) }) if of == id => return Ok(value),
                Some(Reply::Error { error, id: of }) if of.as_ref().is_none_or(|of| *of == id) => {
                    let command = command.to_owned();
                    return Err(SessionError::Refused { peer: Peer::Monitor, command, source: error });
                }
                Some(Reply::Event(event)) => self.keep(event),
                // The reply to a command that timed out.
                Some(Reply::Return { .. } | Reply::Error { .. } | Reply::Greeting(_)) => {}
            }
        }
    }

    /// The next event, kept or fresh; `None` after `timeout`. With a timeout of zero nothing is awaited.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, SessionError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        // Zero would not even look at what has arrived.
        let deadline = Deadline::after(timeout.max(Duration::from_millis(1)));
        loop {
            match self.next_reply("an event", deadline)? {
                None => return Ok(None),
                Some(Reply::Event(event)) => return Ok(Some(event)),
                Some(_) => {}
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn next_reply(&mut self, command: &str, deadline: Deadline) -> Result<Option<Reply>, SessionError> {
        let Some(value) = self.connection.next_value(deadline)? else { return Ok(None) };
        Reply::parse(value).map(Some).map_err(|bad| SessionError::unexpected(Peer::Monitor, command, &bad.0))
    }
}

impl AsFd for MonitorSession {
    /// For poll(2): readable means that an event may have come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{Server, greeting};

    const SOON: Duration = Duration::from_secs(10);
    const BRIEF: Duration = Duration::from_millis(50);

    #[test]
    fn a_command_gets_its_own_reply_and_events_are_kept() {
        let server = Server::start(|client| {
            client.send(greeting());
            let id = client.request("qmp_capabilities")["id"].clone();
            client.send(json!({"return": {}, "id": id}));
            let id = client.request("stop")["id"].clone();
            client.send(json!({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}));
            client.send(json!({"return": {}, "id": "someone else's"}));
            client.send(json!({"return": {"ok": true}, "id": id}));
        });
        let mut session = MonitorSession::connect(server.path(), SOON).unwrap();
        assert!(session.greeting().contains_key("version"));
        assert_eq!(session.execute("stop", None, SOON).unwrap(), json!({"ok": true}));
        assert_eq!(session.next_event(Duration::ZERO).unwrap().unwrap().name, "STOP");
    }

    #[test]
    fn a_refusal_carries_the_monitors_words() {
        let server = Server::start(|client| {
            client.negotiate();
            let id = client.request("cont")["id"].clone();
            client.send(json!({"error": {"class": "GenericError", "desc": "Reset needed"}, "id": id}));
        });
        let mut session = MonitorSession::connect(server.path(), SOON).unwrap();
        let error = session.execute("cont", None, SOON).unwrap_err();
        assert_eq!(error.to_string(), "The monitor refused cont");
        assert_eq!(error.refusal().unwrap().desc, "Reset needed");
    }

    #[test]
    fn a_late_reply_is_not_taken_for_the_next_one() {
        let server = Server::start(|client| {
            client.negotiate();
            let slow = client.request("slow")["id"].clone();
            let quick = client.request("quick")["id"].clone();
            client.send(json!({"return": "slow", "id": slow}));
            client.send(json!({"return": "quick", "id": quick}));
        });
        let mut session = MonitorSession::connect(server.path(), SOON).unwrap();
        let error = session.execute("slow", None, BRIEF).unwrap_err();
        assert!(matches!(error, SessionError::Timeout { .. }), "{error}");
        assert_eq!(session.execute("quick", None, SOON).unwrap(), json!("quick"));
    }

    #[test]
    fn no_listener_no_greeting_no_json_and_a_hang_up_are_told_apart() {
        let nowhere = MonitorSession::connect(Path::new("/nonexistent/monitor.sock"), SOON);
        assert!(matches!(nowhere, Err(SessionError::Connect { .. })), "{nowhere:?}");

        let silent = Server::start(|client| client.wait_for_end());
        let result = MonitorSession::connect(silent.path(), BRIEF);
        assert!(matches!(result, Err(SessionError::Timeout { .. })), "{result:?}");

        let babbling = Server::start(|client| client.send_bytes(b"SSH-2.0-x\n"));
        let result = MonitorSession::connect(babbling.path(), SOON);
        assert!(matches!(result, Err(SessionError::NotJson { .. })), "{result:?}");

        let agent = Server::start(|client| client.send(json!({"return": {}})));
        let result = MonitorSession::connect(agent.path(), SOON);
        assert!(matches!(result, Err(SessionError::Unexpected { .. })), "{result:?}");

        let dying = Server::start(|client| client.send(greeting()));
        let result = MonitorSession::connect(dying.path(), SOON);
        assert!(matches!(result, Err(SessionError::Closed { .. })), "{result:?}");
    }

    #[test]
    fn events_are_awaited_no_longer_than_said() {
        let server = Server::start(|client| {
            client.negotiate();
            client.wait_for_end();
        });
        let mut session = MonitorSession::connect(server.path(), SOON).unwrap();
        assert_eq!(session.next_event(BRIEF).unwrap(), None);
    }
}
