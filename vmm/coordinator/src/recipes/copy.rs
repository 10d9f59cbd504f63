//! Copying a file into a guest and out of it, by guest-file-*.
//!
//! A file that goes into the guest is written beside its destination under a temporary name and renamed once all of it
//! is there, so that nobody in the guest ever sees half of it and a copy that fails leaves the old file alone. The
//! agent's protocol cannot rename: the guest's shell does. Where guest-exec is switched off, and where the destination
//! is a device or a symbolic link, the destination is written in place.

use std::io::{self, Read, Write};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};

use super::exec::{ExecError, ExecRequest, Output, Stream, exec};
use crate::{GuestSession, Map, Peer, SessionError};

/// Bytes per request: as base64 well below the megabyte that a monitor takes.
const CHUNK: usize = 512 << 10;
/// For one command. Writing may wait for the guest's disk.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a file was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The agent refused, or cannot be asked.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The source on this side failed.
    #[error("Cannot read the source")]
    Read {
        /// How.
        source: io::Error,
    },
    /// The destination on this side failed.
    #[error("Cannot write the destination")]
    Write {
        /// How.
        source: io::Error,
    },
    /// Not everything arrived.
    #[error(
        "{arrived} of {expected} bytes arrived: {path} in the guest was changed meanwhile, or its disk is full"
    )]
    Length {
        /// The file in the guest.
        path: String,
        /// Bytes there should be.
        expected: u64,
        /// Bytes there are.
        arrived: u64,
    },
    /// The destination cannot be looked at or put in place.
    #[error("Cannot put {path} in place in the guest: {message}")]
    Place {
        /// The file in the guest.
        path: String,
        /// In the guest's words.
        message: String,
    },
}

/// Copies `source` to `path` in the guest; into it under `name` when it is a directory. `progress` is told how many
/// bytes are through. Returns their number, which the guest has confirmed.
///
/// # Errors
/// The first thing that failed; the temporary file in the guest is gone then.
pub fn copy_to_guest(
    session: &mut GuestSession,
    source: &mut dyn Read,
    path: &str,
    name: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, CopyError> {
    let destination = Destination::find(session, path, name)?;
    let handle = open(session, destination.written(), "w")?;
    let sent = send(session, handle, source, progress);
    // Closing flushes: it may fail where writing did not.
    let closed = close(session, handle);
    match sent.and_then(|bytes| Ok(closed.map(|()| bytes)?)) {
        Ok(bytes) => destination.put_in_place(session).map(|()| bytes),
        Err(error) => {
            destination.discard(session);
            Err(error)
        }
    }
}

/// Copies `path` of the guest to `sink`. `progress` is told how many bytes are through, and of how many if the file
/// has a size. Returns their number.
///
/// # Errors
/// The first thing that failed. What `sink` has got by then is the caller's to remove.
pub fn copy_from_guest(
    session: &mut GuestSession,
    path: &str,
    sink: &mut dyn Write,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<u64, CopyError> {
    let handle = open(session, path, "r")?;
    let received = receive(session, handle, path, sink, progress);
    // Nothing can be lost by it any more, and a guest that has died says so with the first error.
    let _ = close(session, handle);
    received
}

fn send(
    session: &mut GuestSession,
    handle: i64,
    source: &mut dyn Read,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, CopyError> {
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    loop {
        let filled = fill(source, &mut buffer).map_err(|source| CopyError::Read { source })?;
        if filled == 0 {
            break;
        }
        write_chunk(session, handle, &buffer[..filled])?;
        sent += filled as u64;
        progress(sent);
    }
    call(session, "guest-file-flush", handle, [])?;
    // Of a pipe or a terminal in the guest there is no position to compare with.
    match position(session, handle, 0, 1) {
        Ok(arrived) if arrived != sent => {
            Err(CopyError::Length { path: "the file".into(), expected: sent, arrived })
        }
        Err(SessionError::Refused { .. } | SessionError::Frozen { .. }) | Ok(_) => Ok(sent),
        Err(error) => Err(error.into()),
    }
}

fn write_chunk(session: &mut GuestSession, handle: i64, mut bytes: &[u8]) -> Result<(), CopyError> {
    const COMMAND: &str = "guest-file-write";
    while !bytes.is_empty() {
        let text = ("buf-b64", json!(BASE64_STANDARD.encode(bytes)));
        let reply = call(session, COMMAND, handle, [text])?;
        let count = reply.get("count").and_then(Value::as_u64).and_then(|count| usize::try_from(count).ok());
        bytes = match count {
            Some(count) if (1..=bytes.len()).contains(&count) => &bytes[count..],
            _ => return Err(SessionError::unexpected(Peer::Agent, COMMAND, &reply).into()),
        };
    }
    Ok(())
}

fn receive(
    session: &mut GuestSession,
    handle: i64,
    path: &str,
    sink: &mut dyn Write,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<u64, CopyError> {
    const COMMAND: &str = "guest-file-read";
    let size = size(session, handle)?;
    let mut received = 0;
    loop {
        progress(received, size);
        let reply = call(session, COMMAND, handle, [("count", json!(CHUNK))])?;
        let unexpected = || SessionError::unexpected(Peer::Agent, COMMAND, &reply);
        let text = reply.get("buf-b64").and_then(Value::as_str).ok_or_else(unexpected)?;
        let bytes = BASE64_STANDARD.decode(text).map_err(|_| unexpected())?;
        sink.write_all(&bytes).map_err(|source| CopyError::Write { source })?;
        received += bytes.len() as u64;
        let at_end = reply.get("eof").and_then(Value::as_bool).unwrap_or(false);
        if at_end || bytes.is_empty() {
            break;
        }
    }
    progress(received, size);
    sink.flush().map_err(|source| CopyError::Write { source })?;
    match size {
        Some(expected) if received < expected => {
            Err(CopyError::Length { path: path.to_owned(), expected, arrived: received })
        }
        _ => Ok(received),
    }
}

/// The file's size; `None` of what has none (a pipe, or a file of the kernel's, which says 0).
fn size(session: &mut GuestSession, handle: i64) -> Result<Option<u64>, SessionError> {
    match position(session, handle, 0, 2) {
        Ok(0) | Err(SessionError::Refused { .. } | SessionError::Frozen { .. }) => Ok(None),
        Ok(size) => {
            position(session, handle, 0, 0)?;
            Ok(Some(size))
        }
        Err(error) => Err(error),
    }
}

/// Seeks as lseek(2) does and tells where that is. Numbers for `whence` are understood by every agent.
fn position(session: &mut GuestSession, handle: i64, offset: i64, whence: u8) -> Result<u64, SessionError> {
    const COMMAND: &str = "guest-file-seek";
    let reply = call(session, COMMAND, handle, [("offset", json!(offset)), ("whence", json!(whence))])?;
    let position = reply.get("position").and_then(Value::as_u64);
    position.ok_or_else(|| SessionError::unexpected(Peer::Agent, COMMAND, &reply))
}

fn open(session: &mut GuestSession, path: &str, mode: &str) -> Result<i64, SessionError> {
    const COMMAND: &str = "guest-file-open";
    let arguments = Map::from_iter([("path".into(), json!(path)), ("mode".into(), json!(mode))]);
    let reply = session.execute(COMMAND, Some(arguments), PATIENCE)?;
    reply.as_i64().ok_or_else(|| SessionError::unexpected(Peer::Agent, COMMAND, &reply))
}

fn close(session: &mut GuestSession, handle: i64) -> Result<(), SessionError> {
    call(session, "guest-file-close", handle, []).map(drop)
}

fn call<const N: usize>(
    session: &mut GuestSession,
    command: &str,
    handle: i64,
    arguments: [(&str, Value); N],
) -> Result<Value, SessionError> {
    let mut map: Map = arguments.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    map.insert("handle".into(), json!(handle));
    session.execute(command, Some(map), PATIENCE)
}

/// Reads until `buffer` is full or the source ends, so that a pipe does not make for tiny requests.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Where a file that goes into the guest ends up, and where it is written until then.
#[derive(Debug)]
struct Destination {
    path: String,
    /// `None`: in place.
    temporary: Option<String>,
}

impl Destination {
    fn find(session: &mut GuestSession, path: &str, name: &str) -> Result<Self, CopyError> {
        const KIND: &str = r#"if [ -d "$1" ]; then echo directory
            elif [ -L "$1" ] || { [ -e "$1" ] && [ ! -f "$1" ]; }; then echo special
            else echo file; fi"#;
        let inside = || format!("{}/{name}", path.trim_end_matches('/'));
        if !has_exec(session)? {
            let path = if path.ends_with('/') { inside() } else { path.to_owned() };
            return Ok(Self { path, temporary: None });
        }
        let mut path = path.to_owned();
        let mut kind = shell(session, KIND, &[&path]).map_err(|error| error.at(&path))?;
        if kind == "directory" || path.ends_with('/') {
            path = inside();
            kind = shell(session, KIND, &[&path]).map_err(|error| error.at(&path))?;
        }
        match kind.as_str() {
            "directory" => {
                Err(CopyError::Place { path, message: "there is a directory of that name".into() })
            }
            "special" => Ok(Self { path, temporary: None }),
            _ => {
                let (dir, file) =
                    path.rsplit_once('/').map_or(("", path.as_str()), |(dir, file)| (dir, file));
                let slash = if path.contains('/') { "/" } else { "" };
                let temporary = format!("{dir}{slash}.{file}.{:08x}", session.fresh_token() & 0xffff_ffff);
                Ok(Self { path, temporary: Some(temporary) })
            }
        }
    }

    fn written(&self) -> &str {
        self.temporary.as_ref().unwrap_or(&self.path)
    }

    fn put_in_place(self, session: &mut GuestSession) -> Result<(), CopyError> {
        let Some(temporary) = &self.temporary else { return Ok(()) };
        match shell(session, r#"exec mv -f -- "$1" "$2""#, &[temporary, &self.path]) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.discard(session);
                Err(error.at(&self.path))
            }
        }
    }

    /// Removes what was written, as far as the guest still does what it is told.
    fn discard(&self, session: &mut GuestSession) {
        if let Some(temporary) = &self.temporary {
            let _ = shell(session, r#"exec rm -f -- "$1""#, &[temporary]);
        }
    }
}

fn has_exec(session: &mut GuestSession) -> Result<bool, SessionError> {
    let info = session.execute("guest-info", None, PATIENCE)?;
    let commands = info.get("supported_commands").and_then(Value::as_array);
    Ok(commands.is_some_and(|commands| {
        commands.iter().any(|command| command["name"] == "guest-exec" && command["enabled"] == true)
    }))
}

/// Why a step in the guest's shell failed.
enum ShellError {
    Failed(String),
    Exec(ExecError),
}

impl ShellError {
    fn at(self, path: &str) -> CopyError {
        match self {
            Self::Exec(ExecError::Session(error)) => error.into(),
            Self::Exec(error) => CopyError::Place { path: path.to_owned(), message: error.to_string() },
            Self::Failed(message) => CopyError::Place { path: path.to_owned(), message },
        }
    }
}

/// Runs a script with arguments in the guest; gives its trimmed standard output.
fn shell(session: &mut GuestSession, script: &str, args: &[&str]) -> Result<String, ShellError> {
    let mut request = ExecRequest { timeout: Some(PATIENCE), ..ExecRequest::shell(script) };
    request.args.push("sh".into());
    request.args.extend(args.iter().map(|&arg| arg.to_owned()));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = exec(session, &request, &mut |output| {
        match output {
            Output::Bytes(Stream::Stdout, bytes) => out.extend_from_slice(bytes),
            Output::Bytes(Stream::Stderr, bytes) => err.extend_from_slice(bytes),
            Output::Truncated(_) => {}
        }
        Ok(())
    })
    .map_err(ShellError::Exec)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if status.code() == 0 { Ok(text(&out)) } else { Err(ShellError::Failed(text(&err))) }
}

#[cfg(test)]
mod tests;
