//! guest-exec and guest-exec-status.
//!
//! A child's streams are members of the agent's epoll, and SIGCHLD tells of its end, so that the agent
//! waits for no child, whatever it does with its pipes. A process counts as ended when it was reaped
//! and its captured streams are at their end: a grandchild that holds one of them holds up the report,
//! not the agent.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;

use protocol::{Args, Error, Map};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

use super::{errno_text, payload};
use crate::agent::Agent;
use crate::log;
use crate::poller::{Poller, Stream, Token};
use crate::schema::{Command as Declared, Run, Type, optional, required};
use crate::signals::unblock_for;

pub(crate) const COMMANDS: &[Declared] = &[
    Declared::new("guest-exec", "Starts a program and returns its pid at once", Run::Prompt(exec))
        .takes(&[
            required("path", Type::Str),
            optional("arg", Type::Array(&Type::Str)),
            optional("env", Type::Array(&Type::Str)),
            optional("input-data", Type::Base64),
            optional(
                "capture-output",
                Type::Alternate(
                    "GuestExecCaptureOutput",
                    &[Type::Bool, Type::Enum(&["none", "stdout", "stderr", "separated", "merged"])],
                ),
            ),
        ])
        .returns(Type::Object(&[required("pid", Type::Int)])),
    Declared::new(
        "guest-exec-status",
        "Whether a program has ended, and once it has, its status and output",
        Run::Prompt(exec_status),
    )
    .takes(&[required("pid", Type::Int)])
    .returns(Type::Object(&[
        required("exited", Type::Bool),
        optional("exitcode", Type::Int),
        optional("signal", Type::Int),
        optional("out-data", Type::Base64),
        optional("err-data", Type::Base64),
        optional("out-truncated", Type::Bool),
        optional("err-truncated", Type::Bool),
    ])),
];

/// Most bytes kept of each stream; the rest is read and dropped.
const CAPTURED: usize = 16 << 20;
/// Processes remembered. Beyond that the oldest one that ended is forgotten unasked.
const REMEMBERED: usize = 256;
/// Bytes moved per stream and event, so that one busy child does not starve the others.
const CHUNK: usize = 64 << 10;

/// What is captured of a child's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    None,
    Stdout,
    Stderr,
    Separated,
    Merged,
}

const MODES: &[(&str, Mode)] = &[
    ("none", Mode::None),
    ("stdout", Mode::Stdout),
    ("stderr", Mode::Stderr),
    ("separated", Mode::Separated),
    ("merged", Mode::Merged),
];

/// The processes that clients started and did not ask for after their end.
#[derive(Debug)]
pub(crate) struct Children {
    poller: Rc<Poller>,
    tracked: BTreeMap<u32, Tracked>,
    /// Counts starts, to tell which process is the oldest.
    started: u64,
}

#[derive(Debug)]
struct Tracked {
    child: Child,
    started: u64,
    status: Option<ExitStatus>,
    input: Option<Input>,
    output: Option<Capture>,
    error: Option<Capture>,
}

/// Data on its way into a child.
#[derive(Debug)]
struct Input {
    pipe: File,
    data: Vec<u8>,
    written: usize,
}

/// A stream on its way out of a child.
#[derive(Debug)]
struct Capture {
    /// Absent once the end was met.
    pipe: Option<File>,
    data: Vec<u8>,
    truncated: bool,
}

fn exec(agent: &mut Agent, mut args: Args) -> Result<Value, Error> {
    let path = args.string("path")?;
    let arguments = args.optional_strings("arg")?.unwrap_or_default();
    let environment = args.optional_strings("env")?;
    let input = args.optional_string("input-data")?;
    let mode = mode(&mut args)?;
    args.finish()?;
    let input = input.map(payload::decode).transpose()?;
    let mut command = Command::new(&path);
    command.args(arguments);
    if let Some(environment) = environment {
        command.env_clear();
        command.envs(environment.iter().filter_map(|entry| entry.split_once('=')));
    }
    let spawned = agent.children.spawn(unblock_for(&mut command), input, mode);
    let pid = spawned.map_err(|error| {
        Error::generic(format!("Failed to execute child process “{path}” ({})", errno_text(&error)))
    })?;
    Ok(json!({"pid": pid}))
}

/// A boolean, as ever, or one of the words of version 8.0.
fn mode(args: &mut Args) -> Result<Mode, Error> {
    match args.optional_value("capture-output") {
        None | Some(Value::Bool(false)) => Ok(Mode::None),
        Some(Value::Bool(true)) => Ok(Mode::Separated),
        Some(Value::String(word)) => {
            let known = MODES.iter().find(|(name, _)| *name == word);
            known.map(|&(_, mode)| mode).ok_or_else(|| Error::invalid_enum_value("capture-output", &word))
        }
        Some(_) => Err(Error::invalid_parameter_type("capture-output", "GuestExecCaptureOutput")),
    }
}

fn exec_status(agent: &mut Agent, mut args: Args) -> Result<Value, Error> {
    let pid = args.int("pid")?;
    args.finish()?;
    let unknown = || Error::generic(format!("PID {pid} does not exist"));
    let pid = u32::try_from(pid).map_err(|_| unknown())?;
    // A notice of its end may still be under way; the answer must not depend on that.
    agent.children.reap();
    let tracked = agent.children.tracked.get(&pid).ok_or_else(unknown)?;
    if !tracked.is_finished() {
        return Ok(json!({"exited": false}));
    }
    let tracked = agent.children.tracked.remove(&pid).ok_or_else(unknown)?;
    Ok(Value::Object(tracked.report()))
}

impl Children {
    pub(crate) fn new(poller: Rc<Poller>) -> Self {
        Self { poller, tracked: BTreeMap::new(), started: 0 }
    }

    /// Collects the status of every child that ended.
    pub(crate) fn reap(&mut self) {
        for (pid, tracked) in &mut self.tracked {
            if tracked.status.is_some() {
                continue;
            }
            match tracked.child.try_wait() {
                Ok(status) => tracked.status = status,
                Err(error) => log::error(format_args!("Cannot wait for process {pid}: {error}")),
            }
        }
    }

    /// A stream of a child is ready. A stream unknown by now is no error: the event was under way
    /// when the stream was closed.
    pub(crate) fn on_ready(&mut self, pid: u32, stream: Stream) {
        let Some(tracked) = self.tracked.get_mut(&pid) else { return };
        match stream {
            Stream::Input => {
                if tracked.input.as_mut().is_some_and(|input| !input.write()) {
                    tracked.input = None;
                }
            }
            Stream::Output => tracked.output.iter_mut().for_each(Capture::read),
            Stream::Error => tracked.error.iter_mut().for_each(Capture::read),
        }
    }

    fn spawn(&mut self, command: &mut Command, input: Option<Vec<u8>>, mode: Mode) -> io::Result<u32> {
        self.make_room()?;
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let (output, error) = match mode {
            Mode::None => (None, None),
            Mode::Stdout | Mode::Merged => (Some(pipe()?), None),
            Mode::Stderr => (None, Some(pipe()?)),
            Mode::Separated => (Some(pipe()?), Some(pipe()?)),
        };
        let writer = |pipe: &Option<(File, OwnedFd)>| match pipe {
            Some((_, writer)) => writer.try_clone().map(Stdio::from),
            None => Ok(Stdio::null()),
        };
        command.stdout(writer(&output)?);
        command.stderr(writer(if mode == Mode::Merged { &output } else { &error })?);
        let mut child = command.spawn()?;
        // The parent's copies of the child's ends must go, or no stream would ever end.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let pid = child.id();
        let stdin = child.stdin.take().map(OwnedFd::from);
        self.started += 1;
        let mut tracked = Tracked {
            child,
            started: self.started,
            status: None,
            input: stdin.zip(input).map(|(pipe, data)| Input { pipe: pipe.into(), data, written: 0 }),
            output: output.map(Capture::new),
            error: error.map(Capture::new),
        };
        if let Err(error) = tracked.watch(&self.poller, pid) {
            // Without events the streams would stand still: better closed than that.
            log::error(format_args!("Cannot watch the streams of process {pid}: {error}"));
            (tracked.input, tracked.output, tracked.error) = (None, None, None);
        }
        self.tracked.insert(pid, tracked);
        Ok(pid)
    }

    /// Forgets the oldest process that ended, if there are too many.
    fn make_room(&mut self) -> io::Result<()> {
        if self.tracked.len() < REMEMBERED {
            return Ok(());
        }
        self.reap();
        let ended = self.tracked.iter().filter(|(_, tracked)| tracked.is_finished());
        let oldest = ended.min_by_key(|(_, tracked)| tracked.started).map(|(&pid, _)| pid);
        let oldest = oldest.ok_or_else(|| io::Error::from_raw_os_error(libc::EAGAIN))?;
        self.tracked.remove(&oldest);
        Ok(())
    }
}

/// A pipe whose reading end, ours, never blocks.
fn pipe() -> io::Result<(File, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    Ok((reader.into(), writer))
}

impl Tracked {
    fn watch(&mut self, poller: &Poller, pid: u32) -> io::Result<()> {
        let token = |stream| Token::Child { pid, stream };
        if let Some(input) = &self.input {
            rustix::io::ioctl_fionbio(&input.pipe, true)?;
            poller.add_writable(input.pipe.as_fd(), token(Stream::Input))?;
        }
        for (capture, stream) in [(&self.output, Stream::Output), (&self.error, Stream::Error)] {
            if let Some(pipe) = capture.as_ref().and_then(|capture| capture.pipe.as_ref()) {
                poller.add_readable(pipe, token(stream))?;
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        let ended = |capture: &Option<Capture>| capture.as_ref().is_none_or(|capture| capture.pipe.is_none());
        self.status.is_some() && ended(&self.output) && ended(&self.error)
    }

    fn report(self) -> Map {
        let mut report = Map::new();
        report.insert("exited".into(), true.into());
        if let Some(code) = self.status.and_then(|status| status.code()) {
            report.insert("exitcode".into(), code.into());
        }
        if let Some(signal) = self.status.and_then(|status| status.signal()) {
            report.insert("signal".into(), signal.into());
        }
        for (capture, name) in [(self.output, "out"), (self.error, "err")] {
            let Some(capture) = capture.filter(|capture| !capture.data.is_empty()) else { continue };
            report.insert(format!("{name}-data"), payload::encode(&capture.data).into());
            report.insert(format!("{name}-truncated"), capture.truncated.into());
        }
        report
    }
}

impl Input {
    /// False when there is nothing more to write, or nobody to read it.
    fn write(&mut self) -> bool {
        let rest = &self.data[self.written..];
        match self.pipe.write(&rest[..rest.len().min(CHUNK)]) {
            Ok(count) => self.written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
        self.written < self.data.len()
    }
}

impl Capture {
    fn new((reader, _): (File, OwnedFd)) -> Self {
        Self { pipe: Some(reader), data: Vec::new(), truncated: false }
    }

    /// Takes one chunk. The pipe is reported again if there is more.
    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut chunk = [0; CHUNK];
        match pipe.read(&mut chunk) {
            Ok(0) => self.pipe = None,
            Ok(count) => {
                let kept = count.min(CAPTURED - self.data.len());
                self.data.extend_from_slice(&chunk[..kept]);
                self.truncated |= kept < count;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.pipe = None,
        }
    }
}
