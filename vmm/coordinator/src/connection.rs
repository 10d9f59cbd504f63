//! One connection to one of a VM's sockets: bytes in, items out, no wait without an end.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::{Decoder, Item, Limits, ParseError};
use serde_json::Value;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The VM's QMP monitor.
    Monitor,
    /// The agent in the guest, behind the VM's broker.
    Agent,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Monitor => "monitor",
            Self::Agent => "guest agent",
        })
    }
}

/// Why a session could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody listens.
    #[error("Cannot connect to the {peer} at {path:?}; the VM is not running, or still starting")]
    Connect {
        /// Who was to be reached.
        peer: Peer,
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The connection ended.
    #[error("The {peer} has closed the connection: the VM has ended, or has thrown this client out")]
    Closed {
        /// Who closed it.
        peer: Peer,
    },
    /// The connection broke.
    #[error("The connection to the {peer} broke")]
    Io {
        /// Who was at the other end.
        peer: Peer,
        /// How.
        source: io::Error,
    },
    /// No answer in time.
    #[error("The {peer} did not answer {command} within {seconds:.1} s{}", advice(*.peer))]
    Timeout {
        /// Who was asked.
        peer: Peer,
        /// What was asked.
        command: String,
        /// How long was waited.
        seconds: f64,
    },
    /// A command failed.
    #[error("The {peer} refused {command}")]
    Refused {
        /// Who refused.
        peer: Peer,
        /// What was asked.
        command: String,
        /// In the server's words.
        source: protocol::Error,
    },
    /// The guest agent does not do this while filesystems are frozen.
    #[error("The guest agent refused {command}: the guest's filesystems are frozen; `tarn thaw` ends that")]
    Frozen {
        /// What was asked.
        command: String,
        /// In the agent's words, which name another reason, or none.
        refusal: protocol::Error,
    },
    /// Bytes that are no message.
    #[error("The {peer} sent something that is not JSON")]
    NotJson {
        /// Who sent it.
        peer: Peer,
        /// What is wrong with it.
        source: ParseError,
    },
    /// A message that does not belong where it came.
    #[error("The {peer} sent an answer to {command} that makes no sense: {message}")]
    Unexpected {
        /// Who sent it.
        peer: Peer,
        /// What was asked.
        command: String,
        /// The message, shortened.
        message: String,
    },
}

fn advice(peer: Peer) -> &'static str {
    match peer {
        Peer::Monitor => "; the VM hangs, `tarn kill` ends it",
        Peer::Agent => {
            "; is an agent running in the guest, and the VM not paused? (`tarn console` shows the guest)"
        }
    }
}

impl SessionError {
    /// A refusal's own words, if it is one.
    pub fn refusal(&self) -> Option<&protocol::Error> {
        match self {
            Self::Refused { source: refusal, .. } | Self::Frozen { refusal, .. } => Some(refusal),
            _ => None,
        }
    }

    pub(crate) fn unexpected(peer: Peer, command: &str, message: &Value) -> Self {
        let mut message = protocol::encode(message);
        // Encoded messages are ASCII, so every byte is a boundary.
        message.truncate(200);
        Self::Unexpected { peer, command: command.to_owned(), message }
    }
}

/// A connected socket and what has come out of it so far.
#[derive(Debug)]
pub(crate) struct Connection {
    peer: Peer,
    stream: UnixStream,
    decoder: Decoder,
    buffer: Box<[u8]>,
}

impl Connection {
    pub(crate) fn open(peer: Peer, path: &Path) -> Result<Self, SessionError> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self {
                peer,
                stream,
                // Replies carry whole files and outputs, whoever sends them.
                decoder: Decoder::new(Limits::AGENT),
                buffer: vec![0; 64 << 10].into(),
            }),
            Err(source) => Err(SessionError::Connect { peer, path: path.to_owned(), source }),
        }
    }

    /// Sends all of `bytes`, or fails at `deadline` with half of them sent: then the connection is of no more use.
    pub(crate) fn send(
        &mut self,
        bytes: &[u8],
        command: &str,
        deadline: Deadline,
    ) -> Result<(), SessionError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let left = deadline.left().ok_or_else(|| deadline.missed(self.peer, command))?;
            let written = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write(rest));
            match written {
                Ok(count) => rest = &rest[count..],
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// The next item; `None` at `deadline`. What has arrived already is given even when the deadline has passed.
    pub(crate) fn next(&mut self, deadline: Deadline) -> Result<Option<Item>, SessionError> {
        loop {
            if let Some(item) = self.decoder.next_item() {
                return Ok(Some(item));
            }
            let Some(left) = deadline.left() else { return Ok(None) };
            let read =
                self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut self.buffer));
            match read {
                Ok(0) => return Err(SessionError::Closed { peer: self.peer }),
                Ok(count) => self.decoder.feed(&self.buffer[..count]),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    /// [`next`](Self::next), for peers that have no business sending anything but messages.
    pub(crate) fn next_value(&mut self, deadline: Deadline) -> Result<Option<Value>, SessionError> {
        loop {
            match self.next(deadline)? {
                None => return Ok(None),
                Some(Item::Value(value)) => return Ok(Some(value)),
                Some(Item::Sentinel) => {}
                Some(Item::Error(source)) => return Err(SessionError::NotJson { peer: self.peer, source }),
            }
        }
    }

    fn broken(&self, error: io::Error) -> SessionError {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                SessionError::Closed { peer: self.peer }
            }
            _ => SessionError::Io { peer: self.peer, source: error },
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A timeout of the socket, or a signal; the deadline decides what that means.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// When a wait that began now ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    began: Instant,
    limit: Duration,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Self {
        Self { began: Instant::now(), limit }
    }

    /// What is left; `None` when nothing is. Never zero, which a socket would take for "wait for ever".
    pub(crate) fn left(self) -> Option<Duration> {
        self.limit.checked_sub(self.began.elapsed()).filter(|left| !left.is_zero())
    }

    /// The earlier of the two.
    pub(crate) fn or(self, limit: Duration) -> Self {
        Self::after(self.left().unwrap_or_default().min(limit))
    }

    pub(crate) fn missed(self, peer: Peer, command: &str) -> SessionError {
        SessionError::Timeout { peer, command: command.to_owned(), seconds: self.limit.as_secs_f64() }
    }
}
