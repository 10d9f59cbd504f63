//! Running a command in the guest.
//!
//! ```text
//!   guest-exec {path, arg, input-data, capture-output: separated} ─▶ pid
//!   guest-exec-status {pid}, at growing intervals                 ─▶ exited: outputs, exit code or signal
//! ```
//!
//! The reference protocol hands over the outputs at the end, at most 16 MiB of each. Callers take them piece by piece
//! through a function, so that nothing changes for them where an agent can send them earlier.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};

use crate::{GuestSession, Map, Peer, SessionError};

/// First and longest pause between two questions whether the command has ended. Nothing else tells of its end.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Without a time limit. Longer than any pause of a VM; when the VM ends, so does the connection.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long the agent may take to start a command, and to answer at all.
const START: Duration = Duration::from_secs(60);

/// What to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The program; looked up in the agent's `PATH` when it has no slash.
    pub path: String,
    /// Its arguments, without the program's own name.
    pub args: Vec<String>,
    /// Its standard input; `None` is `/dev/null`.
    pub input: Option<Vec<u8>>,
    /// How long it may take, all in all. The command itself is not ended when the time is over.
    pub timeout: Option<Duration>,
}

impl ExecRequest {
    /// `script`, run by the guest's shell.
    pub fn shell(script: impl Into<String>) -> Self {
        Self { path: "/bin/sh".into(), args: vec!["-c".into(), script.into()], ..Self::default() }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecStatus {
    /// It returned this.
    Exited(u8),
    /// This signal ended it.
    Signaled(u8),
}

impl ExecStatus {
    /// As a shell tells it: the exit status, or 128 and the signal's number.
    pub fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// One of a command's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output<'a> {
    /// These bytes.
    Bytes(Stream, &'a [u8]),
    /// The agent has thrown away what came after.
    Truncated(Stream),
}

/// Why a command's fate is not known.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The agent could not start it, or cannot be asked.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Nothing is started in a frozen guest.
    #[error("{path} was not started: the guest's filesystems are frozen; `tarn thaw` ends that")]
    Frozen {
        /// The program.
        path: String,
        /// In the agent's words.
        source: SessionError,
    },
    /// The agent that started it is not the one that answers, or has told someone else of its end.
    #[error(
        "{path} was started, but the agent does not know of it any more: the guest or its agent was started again"
    )]
    Lost {
        /// The program.
        path: String,
        /// In the agent's words.
        source: SessionError,
    },
    /// It takes too long.
    #[error("{path} still runs in the guest after {} s; it is left running", .limit.as_secs_f64())]
    Timeout {
        /// The program.
        path: String,
        /// The limit that was set.
        limit: Duration,
    },
    /// The caller could not take its output.
    #[error("Cannot pass on the output of {path}")]
    Output {
        /// The program.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// Runs a command and waits for its end; `output` gets what it wrote.
///
/// # Errors
/// The command could not be started, its end was not seen in time, or `output` failed.
pub fn exec(
    session: &mut GuestSession,
    request: &ExecRequest,
    output: &mut dyn FnMut(Output<'_>) -> io::Result<()>,
) -> Result<ExecStatus, ExecError> {
    let began = Instant::now();
    let pid = match start(session, request) {
        Err(SessionError::Frozen { command, refusal }) => {
            // The one reason is told once.
            let source = SessionError::Refused { peer: Peer::Agent, command, source: refusal };
            return Err(ExecError::Frozen { path: request.path.clone(), source });
        }
        pid => pid?,
    };
    let mut pause = FIRST_PAUSE;
    loop {
        let left = match request.timeout {
            None => FOR_EVER,
            Some(limit) => match limit.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
                Some(left) => left,
                None => return Err(ExecError::Timeout { path: request.path.clone(), limit }),
            },
        };
        let polled = poll(session, pid, left).map_err(|error| match error {
            source @ SessionError::Refused { .. } => ExecError::Lost { path: request.path.clone(), source },
            error => error.into(),
        });
        if let Some(ended) = polled? {
            deliver(&ended, output)
                .map_err(|source| ExecError::Output { path: request.path.clone(), source })?;
            return status(&ended);
        }
        thread::sleep(pause.min(left));
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

fn start(session: &mut GuestSession, request: &ExecRequest) -> Result<i64, SessionError> {
    let mut arguments = Map::from_iter([
        ("path".to_owned(), json!(request.path)),
        ("arg".to_owned(), json!(request.args)),
        ("capture-output".to_owned(), json!("separated")),
    ]);
    if let Some(input) = &request.input {
        arguments.insert("input-data".to_owned(), json!(BASE64_STANDARD.encode(input)));
    }
    let limit = request.timeout.unwrap_or(START);
    // Agents before 8.0 know only a boolean, which means the same.
    let reply = match session.execute("guest-exec", Some(arguments.clone()), limit) {
        Err(error) if error.refusal().is_some_and(|refusal| refusal.desc.contains("'capture-output'")) => {
            arguments.insert("capture-output".to_owned(), json!(true));
            session.execute("guest-exec", Some(arguments), limit)?
        }
        reply => reply?,
    };
    let pid = reply.get("pid").and_then(Value::as_i64);
    pid.ok_or_else(|| SessionError::unexpected(Peer::Agent, "guest-exec", &reply))
}

/// `None` while the command runs.
fn poll(session: &mut GuestSession, pid: i64, limit: Duration) -> Result<Option<Value>, SessionError> {
    const COMMAND: &str = "guest-exec-status";
    let arguments = Map::from_iter([("pid".to_owned(), json!(pid))]);
    let reply = match session.execute(COMMAND, Some(arguments.clone()), limit) {
        // Someone has frozen the filesystems: the answer comes after the thaw, which may have been just now.
        Err(SessionError::Frozen { .. }) => return Ok(None),
        Err(error) if error.refusal().is_some_and(GuestSession::is_disabled) => {
            session.execute(COMMAND, Some(arguments), limit)?
        }
        // Out of time is for the caller to tell.
        Err(SessionError::Timeout { .. }) => return Ok(None),
        reply => reply?,
    };
    match reply.get("exited").and_then(Value::as_bool) {
        Some(true) => Ok(Some(reply)),
        Some(false) => Ok(None),
        None => Err(SessionError::unexpected(Peer::Agent, COMMAND, &reply)),
    }
}

fn deliver(ended: &Value, output: &mut dyn FnMut(Output<'_>) -> io::Result<()>) -> io::Result<()> {
    let streams =
        [(Stream::Stdout, "out-data", "out-truncated"), (Stream::Stderr, "err-data", "err-truncated")];
    for (stream, data, truncated) in streams {
        if let Some(text) = ended.get(data).and_then(Value::as_str) {
            let bytes = BASE64_STANDARD.decode(text).map_err(io::Error::other)?;
            output(Output::Bytes(stream, &bytes))?;
        }
        if ended.get(truncated).and_then(Value::as_bool) == Some(true) {
            output(Output::Truncated(stream))?;
        }
    }
    Ok(())
}

fn status(ended: &Value) -> Result<ExecStatus, ExecError> {
    let member = |name: &str| ended.get(name).and_then(Value::as_i64);
    // An exit status has eight bits, signals end at 64.
    let exited = member("exitcode").and_then(|code| u8::try_from(code & 0xff).ok()).map(ExecStatus::Exited);
    let signaled = member("signal").and_then(|signal| u8::try_from(signal).ok()).map(ExecStatus::Signaled);
    signaled
        .or(exited)
        .ok_or_else(|| SessionError::unexpected(Peer::Agent, "guest-exec-status", ended).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Client, Server};

    /// Runs `request` against a script; gives the outputs as one text each.
    fn run(
        request: &ExecRequest,
        script: impl FnOnce(&mut Client) + Send + 'static,
    ) -> (Result<ExecStatus, ExecError>, [Vec<u8>; 2], Vec<Stream>) {
        let server = Server::start(script);
        let mut session = GuestSession::connect(server.path()).unwrap();
        let (mut out, mut err, mut truncated) = (Vec::new(), Vec::new(), Vec::new());
        let result = exec(&mut session, request, &mut |output| {
            match output {
                Output::Bytes(Stream::Stdout, bytes) => out.extend_from_slice(bytes),
                Output::Bytes(Stream::Stderr, bytes) => err.extend_from_slice(bytes),
                Output::Truncated(stream) => truncated.push(stream),
            }
            Ok(())
        });
        (result, [out, err], truncated)
    }

    #[test]
    fn outputs_are_kept_apart_and_the_exit_status_comes_back() {
        let request = ExecRequest { input: Some(b"in\0put".to_vec()), ..ExecRequest::shell("cat; exit 3") };
        let (status, [out, err], truncated) = run(&request, |client| {
            let arguments = client.request("guest-exec")["arguments"].clone();
            assert_eq!(arguments["path"], "/bin/sh");
            assert_eq!(arguments["arg"], json!(["-c", "cat; exit 3"]));
            assert_eq!(arguments["capture-output"], "separated");
            assert_eq!(arguments["input-data"], BASE64_STANDARD.encode(b"in\0put"));
            client.send(json!({"return": {"pid": 42}}));
            for _ in 0..3 {
                assert_eq!(client.request("guest-exec-status")["arguments"]["pid"], 42);
                client.send(json!({"return": {"exited": false}}));
            }
            client.request("guest-exec-status");
            client.send(json!({"return": {"exited": true, "exitcode": 3, "out-data": "aW4AcHV0",
                "err-data": "ZXJy", "out-truncated": false, "err-truncated": true}}));
        });
        assert_eq!(status.unwrap(), ExecStatus::Exited(3));
        assert_eq!((out.as_slice(), err.as_slice()), (&b"in\0put"[..], &b"err"[..]));
        assert_eq!(truncated, [Stream::Stderr]);
    }

    #[test]
    fn a_signal_is_told_as_a_shell_does() {
        let (status, ..) = run(&ExecRequest::shell("kill -9 $$"), |client| {
            client.request("guest-exec");
            client.send(json!({"return": {"pid": 1}}));
            client.request("guest-exec-status");
            client.send(json!({"return": {"exited": true, "signal": 9}}));
        });
        assert_eq!(status.unwrap().code(), 137);
    }

    #[test]
    fn a_command_that_cannot_start_is_an_error_in_the_agents_words() {
        let (result, ..) = run(&ExecRequest::shell("x"), |client| {
            client.request("guest-exec");
            client
                .send(json!({"error": {"class": "GenericError", "desc": "Failed to execute child process"}}));
        });
        let ExecError::Session(error) = result.unwrap_err() else { panic!("a session error") };
        assert_eq!(error.refusal().unwrap().desc, "Failed to execute child process");
    }

    #[test]
    fn a_frozen_guest_is_waited_for() {
        let (status, ..) = run(&ExecRequest::shell("x"), |client| {
            client.request("guest-exec");
            client.send(json!({"return": {"pid": 1}}));
            client.request("guest-exec-status");
            let desc = "Command guest-exec-status has been disabled: the agent is in frozen state";
            client.send(json!({"error": {"class": "CommandNotFound", "desc": desc}}));
            client.request("guest-exec-status");
            client.send(json!({"return": {"exited": true, "exitcode": 0}}));
        });
        assert_eq!(status.unwrap(), ExecStatus::Exited(0));
    }

    #[test]
    fn an_agent_that_does_not_say_why_is_asked_whether_it_is_frozen() {
        let refuse = |client: &mut Client, command: &str| {
            client.request(command);
            let desc = format!("Command {command} has been disabled: the command is not allowed");
            client.send(json!({"error": {"class": "CommandNotFound", "desc": desc}}));
            client.request("tarn-fsfreeze-report");
        };
        let (status, ..) = run(&ExecRequest::shell("x"), move |client| {
            client.request("guest-exec");
            client.send(json!({"return": {"pid": 1}}));
            refuse(client, "guest-exec-status");
            client.send(json!({"return": {"state": "frozen"}}));
            // Thawed between refusal and question.
            refuse(client, "guest-exec-status");
            client.send(json!({"return": {"state": "thawed"}}));
            client.request("guest-exec-status");
            client.send(json!({"return": {"exited": true, "exitcode": 0}}));
        });
        assert_eq!(status.unwrap(), ExecStatus::Exited(0));

        let (result, ..) = run(&ExecRequest::shell("x"), move |client| {
            refuse(client, "guest-exec");
            // qemu-ga has no such report, and no lease either.
            let desc = "The command tarn-fsfreeze-report has not been found";
            client.send(json!({"error": {"class": "CommandNotFound", "desc": desc}}));
            client.request("guest-fsfreeze-status");
            client.send(json!({"return": "frozen"}));
        });
        let error = result.unwrap_err().to_string();
        assert_eq!(
            error,
            "/bin/sh was not started: the guest's filesystems are frozen; `tarn thaw` ends that"
        );

        let (result, ..) = run(&ExecRequest::shell("x"), move |client| {
            refuse(client, "guest-exec");
            client.send(json!({"return": {"state": "thawed"}}));
        });
        assert!(matches!(result.unwrap_err(), ExecError::Session(_)), "blocked by its configuration");
    }

    #[test]
    fn an_old_agent_gets_a_boolean() {
        let (status, ..) = run(&ExecRequest::shell("x"), |client| {
            client.request("guest-exec");
            let desc = "Invalid parameter type for 'capture-output', expected: boolean";
            client.send(json!({"error": {"class": "GenericError", "desc": desc}}));
            assert_eq!(client.request("guest-exec")["arguments"]["capture-output"], true);
            client.send(json!({"return": {"pid": 1}}));
            client.request("guest-exec-status");
            client.send(json!({"return": {"exited": true, "exitcode": 256}}));
        });
        assert_eq!(status.unwrap(), ExecStatus::Exited(0));
    }

    #[test]
    fn a_limit_ends_the_wait_and_a_dead_guest_ends_it_too() {
        let limited =
            ExecRequest { timeout: Some(Duration::from_millis(80)), ..ExecRequest::shell("sleep 9") };
        let (result, ..) = run(&limited, |client| {
            client.request("guest-exec");
            client.send(json!({"return": {"pid": 1}}));
            client.wait_for_end();
        });
        assert!(result.unwrap_err().to_string().contains("still runs in the guest after 0.08 s"));

        let (result, ..) = run(&ExecRequest::shell("reboot"), |client| {
            client.request("guest-exec");
        });
        assert!(matches!(result, Err(ExecError::Session(SessionError::Closed { .. }))));
    }

    #[test]
    fn a_guest_that_starts_again_loses_the_command() {
        let (result, ..) = run(&ExecRequest::shell("reboot"), |client| {
            client.request("guest-exec");
            client.send(json!({"return": {"pid": 1}}));
            client.request("guest-exec-status");
            client.send(json!({"error": {"class": "GenericError", "desc": "PID 1 does not exist"}}));
        });
        assert!(matches!(result, Err(ExecError::Lost { .. })), "{result:?}");
    }

    #[test]
    fn nonsense_from_the_guest_is_an_error() {
        for answer in [json!({}), json!({"exited": true}), json!([])] {
            let (result, ..) = run(&ExecRequest::shell("x"), move |client| {
                client.request("guest-exec");
                client.send(json!({"return": {"pid": 1}}));
                client.request("guest-exec-status");
                client.send(json!({"return": answer}));
            });
            assert!(matches!(result, Err(ExecError::Session(SessionError::Unexpected { .. }))));
        }
    }
}
