//! guest-file-open, -close, -read, -write, -seek and -flush.
//!
//! Unlike the reference there is no buffer in between: a write that fails fails at once and not at
//! the flush, and switching between reading and writing needs no care.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use protocol::{Args, Error};
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use super::{errno_text, failed, payload};
use crate::guest::Guest;
use crate::log;
use crate::schema::{Command, Field, Run, Type, optional, required};

const HANDLE: Field = required("handle", Type::Int);
const TRANSFERRED: &[Field] = &[required("count", Type::Int), required("eof", Type::Bool)];

pub(crate) const COMMANDS: &[Command] = &[
    Command::new(
        "guest-file-open",
        "Opens a file by a mode of fopen(3); returns its handle",
        Run::Worker(open),
    )
    .takes(&[required("path", Type::Str), optional("mode", Type::Str)])
    .returns(Type::Int),
    Command::new("guest-file-close", "Closes a file", Run::Worker(close)).takes(&[HANDLE]),
    Command::new(
        "guest-file-read",
        "Reads up to count bytes, 4096 if absent, 48 MiB at most",
        Run::Worker(read),
    )
    .takes(&[HANDLE, optional("count", Type::Int)])
    .returns(Type::Object(&[
        required("count", Type::Int),
        required("buf-b64", Type::Base64),
        required("eof", Type::Bool),
    ])),
    Command::new("guest-file-write", "Writes bytes, count of them if given", Run::Worker(write))
        .takes(&[HANDLE, required("buf-b64", Type::Base64), optional("count", Type::Int)])
        .returns(Type::Object(TRANSFERRED)),
    Command::new("guest-file-seek", "Moves a file's position, as lseek(2)", Run::Worker(seek))
        .takes(&[
            HANDLE,
            required("offset", Type::Int),
            required(
                "whence",
                Type::Alternate("GuestFileWhence", &[Type::Int, Type::Enum(&["set", "cur", "end"])]),
            ),
        ])
        .returns(Type::Object(&[required("position", Type::Int), required("eof", Type::Bool)])),
    Command::new("guest-file-flush", "Flushes what was written", Run::Worker(flush)).takes(&[HANDLE]),
];

/// The first handle there ever is.
const FIRST_HANDLE: i64 = 1000;
/// Bytes read if the client does not say.
const READ_DEFAULT: i64 = 4096;
/// Most bytes read at once.
const READ_MOST: i64 = 48 << 20;
/// Handles open at the same time; what is left of the usual 1024 descriptors is for children.
const HANDLES: usize = 512;

/// Open files by handle.
#[derive(Debug)]
pub(crate) struct Files {
    state: PathBuf,
    /// The handle to give next; absent until the state file was read.
    next: Option<i64>,
    open: BTreeMap<i64, OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    /// The last read met the end.
    eof: bool,
}

impl Files {
    pub(crate) fn new(statedir: &Path) -> Self {
        Self { state: statedir.join("qga.state"), next: None, open: BTreeMap::new() }
    }

    /// A handle that no client has seen, from a former life of the agent either.
    fn new_handle(&mut self) -> i64 {
        let handle = match self.next {
            Some(next) => next,
            None => {
                fs::read_to_string(&self.state).ok().and_then(|text| counter(&text)).unwrap_or(FIRST_HANDLE)
            }
        };
        let next = handle.checked_add(1).unwrap_or(FIRST_HANDLE);
        self.next = Some(next);
        if let Err(error) = self.save(next) {
            log::warning(format_args!("Cannot save {}: {error}", self.state.display()));
        }
        handle
    }

    /// Replaces the state file, so that it is never half written.
    fn save(&self, next: i64) -> io::Result<()> {
        let draft = self.state.with_extension("state.new");
        fs::write(&draft, format!("[global]\nfd_counter={next}\n"))?;
        fs::rename(draft, &self.state)
    }

    fn get(&mut self, handle: i64) -> Result<&mut OpenFile, Error> {
        self.open.get_mut(&handle).ok_or_else(|| unknown(handle))
    }
}

fn unknown(handle: i64) -> Error {
    Error::generic(format!("handle '{handle}' has not been found"))
}

fn counter(state: &str) -> Option<i64> {
    let value = state.lines().find_map(|line| line.trim().strip_prefix("fd_counter="))?;
    value.parse().ok().filter(|&value| value >= FIRST_HANDLE)
}

fn open(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let path = args.string("path")?;
    let mode = args.optional_string("mode")?.unwrap_or_else(|| "r".into());
    args.finish()?;
    let flags = flags(&mode).ok_or_else(|| Error::generic(format!("invalid file open mode '{mode}'")))?;
    if guest.files.open.len() >= HANDLES {
        return Err(Error::generic(format!("failed to open file '{path}': {HANDLES} files are open")));
    }
    let file = open_file(Path::new(&path), flags).map_err(|error| {
        Error::generic(format!("failed to open file '{path}' (mode: '{mode}'): {}", errno_text(&error)))
    })?;
    let handle = guest.files.new_handle();
    guest.files.open.insert(handle, OpenFile { file, eof: false });
    Ok(handle.into())
}

/// The modes of fopen(3).
fn flags(mode: &str) -> Option<OFlags> {
    Some(match mode {
        "r" | "rb" => OFlags::RDONLY,
        "w" | "wb" => OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC,
        "a" | "ab" => OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND,
        "r+" | "rb+" | "r+b" => OFlags::RDWR,
        "w+" | "wb+" | "w+b" => OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC,
        "a+" | "ab+" | "a+b" => OFlags::RDWR | OFlags::CREATE | OFlags::APPEND,
        _ => return None,
    })
}

/// Opens without ever waiting for the other end of a FIFO or for a terminal. A file that is created
/// gets mode 0666 whatever the umask: it is the client's, and the agent's umask says nothing of it.
fn open_file(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let existing = flags - OFlags::CREATE;
    if !flags.contains(OFlags::CREATE) {
        return Ok(rustix::fs::open(path, existing, Mode::empty())?.into());
    }
    match rustix::fs::open(path, flags | OFlags::EXCL, Mode::empty()) {
        Ok(fd) => {
            let everyone = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
            rustix::fs::fchmod(&fd, everyone)?;
            Ok(fd.into())
        }
        Err(rustix::io::Errno::EXIST) => Ok(rustix::fs::open(path, existing, Mode::empty())?.into()),
        Err(error) => Err(error.into()),
    }
}

fn close(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let handle = args.int("handle")?;
    args.finish()?;
    guest.files.open.remove(&handle).ok_or_else(|| unknown(handle))?;
    Ok(json!({}))
}

fn read(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let handle = args.int("handle")?;
    let count = args.optional_int("count")?.unwrap_or(READ_DEFAULT);
    args.finish()?;
    let open = guest.files.get(handle)?;
    let wanted = u64::try_from(count).ok().filter(|_| count <= READ_MOST);
    let wanted = wanted.ok_or_else(|| invalid_count(count))?;
    let mut data = Vec::new();
    // What came before an error is delivered; the error, if it lasts, with the next read.
    match (&open.file).take(wanted).read_to_end(&mut data) {
        Err(error) if data.is_empty() => return Err(failed("failed to read file", &error)),
        Err(_) => open.eof = false,
        Ok(_) => open.eof = (data.len() as u64) < wanted,
    }
    Ok(json!({"count": data.len(), "buf-b64": payload::encode(&data), "eof": open.eof}))
}

fn write(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let handle = args.int("handle")?;
    let data = args.string("buf-b64")?;
    let count = args.optional_int("count")?;
    args.finish()?;
    let open = guest.files.get(handle)?;
    let data = payload::decode(data)?;
    let data = match count {
        None => data.as_slice(),
        Some(count) => usize::try_from(count)
            .ok()
            .and_then(|wanted| data.get(..wanted))
            .ok_or_else(|| invalid_count(count))?,
    };
    let written =
        write_all(&mut open.file, data).map_err(|error| failed("failed to write to file", &error))?;
    Ok(json!({"count": written, "eof": open.eof}))
}

fn invalid_count(count: i64) -> Error {
    Error::generic(format!("value '{count}' is invalid for argument count"))
}

/// Writes as much as the file takes without waiting. An error counts only if nothing was written.
fn write_all(file: &mut File, data: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < data.len() {
        match file.write(&data[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if written == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(written)
}

fn seek(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let handle = args.int("handle")?;
    let offset = args.int("offset")?;
    let whence = whence(&mut args)?;
    args.finish()?;
    let open = guest.files.get(handle)?;
    let what = "failed to seek file";
    let to = match whence {
        Whence::Set => SeekFrom::Start(u64::try_from(offset).map_err(|_| {
            let error = io::Error::from_raw_os_error(libc::EINVAL);
            failed(what, &error)
        })?),
        Whence::Current => SeekFrom::Current(offset),
        Whence::End => SeekFrom::End(offset),
    };
    let position = open.file.seek(to).map_err(|error| failed(what, &error))?;
    open.eof = false;
    Ok(json!({"position": position, "eof": false}))
}

#[derive(Clone, Copy, Debug)]
enum Whence {
    Set,
    Current,
    End,
}

/// A number as for lseek(2), or a word.
fn whence(args: &mut Args) -> Result<Whence, Error> {
    match args.optional_value("whence") {
        None => Err(Error::missing_parameter("whence")),
        Some(Value::String(word)) => match word.as_str() {
            "set" => Ok(Whence::Set),
            "cur" => Ok(Whence::Current),
            "end" => Ok(Whence::End),
            _ => Err(Error::invalid_enum_value("whence", &word)),
        },
        Some(value) => match value.as_i64() {
            Some(0) => Ok(Whence::Set),
            Some(1) => Ok(Whence::Current),
            Some(2) => Ok(Whence::End),
            Some(code) => Err(Error::generic(format!("invalid whence code {code}"))),
            None => Err(Error::invalid_parameter_type("whence", "GuestFileWhence")),
        },
    }
}

/// Nothing is buffered in the agent, so there is nothing to do but to check the handle.
fn flush(guest: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let handle = args.int("handle")?;
    args.finish()?;
    let open = guest.files.get(handle)?;
    open.file.flush().map_err(|error| failed("failed to flush file", &error))?;
    Ok(json!({}))
}
