//! What to run with. Names and meanings are qemu-ga's, so that unit files and configurations keep working.
//!
//! ```text
//!   configuration ──▶ config ───────┐
//!                      keyfile      ├─▶ assignments, in order ──▶ Options ──▶ run, or --dump-conf
//!   arguments ──────▶ command_line ─┘        the last one counts; lists add up
//!                      settings: every spelling once
//! ```

mod command_line;
mod config;
mod keyfile;
mod settings;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::access::Access;
use crate::dispatch;

/// How to reach the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A named port of a virtio-serial device.
    VirtioSerial(PathBuf),
    /// A serial line.
    IsaSerial(PathBuf),
    /// A unix socket that the agent listens on.
    UnixListen(PathBuf),
    /// A vsock port that the agent listens on; a CID of `u32::MAX` means every one.
    VsockListen { cid: u32, port: u32 },
}

/// What to run with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) address: Address,
    pub(crate) statedir: PathBuf,
    /// Standard error if absent.
    pub(crate) logfile: Option<PathBuf>,
    pub(crate) verbose: bool,
    /// Whether to go to the background.
    pub(crate) daemon: bool,
    /// For a daemon only.
    pub(crate) pidfile: PathBuf,
    /// Of no consequence: a port is waited for anyway.
    pub(crate) retry_path: bool,
    pub(crate) access: Access,
    pub(crate) freeze: FreezeOptions,
}

/// How long a freeze may last, and whom it asks to be quiet first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FreezeOptions {
    /// From the end of a freeze to the thaw that nobody has to ask for; `None` is for ever.
    pub(crate) lease: Option<Duration>,
    /// The longest a freeze may take before it fails and is undone; `None` is for ever.
    pub(crate) timeout: Option<Duration>,
    /// Run with `freeze` before and with `thaw` after.
    pub(crate) hook: Option<PathBuf>,
    /// A directory of such programs.
    pub(crate) hook_dir: Option<PathBuf>,
    /// The longest that one hook may run.
    pub(crate) hook_timeout: Duration,
}

impl Default for FreezeOptions {
    fn default() -> Self {
        Self {
            lease: Some(Duration::from_secs(120)),
            timeout: Some(Duration::from_secs(60)),
            hook: None,
            hook_dir: None,
            hook_timeout: Duration::from_secs(30),
        }
    }
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    Run(Box<Options>),
    /// Only print this.
    Print(Vec<u8>),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error(transparent)]
    CommandLine(#[from] command_line::Mistake),
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error("Unsupported channel method/type: {0}")]
    Method(String),
    #[error("You must specify a path for this channel")]
    NoPath,
    #[error("'{0}' is no vsock address: CID:PORT is")]
    Vsock(String),
    #[error("'{1}' is no number of seconds for {0}")]
    Seconds(&'static str, String),
}

/// What a [`Setting`](settings::Setting) is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Id {
    Daemon,
    Method,
    Path,
    Logfile,
    Pidfile,
    Hook,
    Statedir,
    Verbose,
    RetryPath,
    Block,
    Allow,
    FreezeLease,
    FreezeTimeout,
    HookDir,
    HookTimeout,
    Config,
    DumpConf,
    Schema,
    Version,
    Help,
}

/// A setting and what it was given. A flag was given `true` or `false`.
type Assignment = (Id, OsString);

const DEFAULT_PORT: &str = "/dev/virtio-ports/org.qemu.guest_agent.0";
const DEFAULT_SERIAL: &str = "/dev/ttyS0";
const DEFAULT_STATEDIR: &str = "/run";
const DEFAULT_PIDFILE: &str = "/run/qemu-ga.pid";

/// Parses the arguments after the program's name and reads the configuration; `environment` is the variable
/// `QGA_CONF`. The command line counts more than the configuration.
pub(crate) fn parse(
    arguments: impl Iterator<Item = OsString>,
    environment: Option<OsString>,
) -> Result<Parsed, OptionsError> {
    let line = command_line::parse(arguments)?;
    if let Some(text) = line.last().and_then(|(id, value)| answer(*id, value)) {
        return Ok(Parsed::Print(text.into_bytes()));
    }
    let source = config::Source::new(last(&line, Id::Config).cloned(), environment);
    let mut given = config::load(&source)?;
    given.extend(line);
    let options = Options::new(&given)?;
    match last(&given, Id::DumpConf) {
        Some(_) => Ok(Parsed::Print(config::dump(&options))),
        None => Ok(Parsed::Run(Box::new(options))),
    }
}

/// What to print for an option that only asks for something.
fn answer(id: Id, value: &OsStr) -> Option<String> {
    match id {
        Id::Version => Some(format!("tarn-agent {}\n", env!("CARGO_PKG_VERSION"))),
        Id::Help => Some(include_str!("usage.txt").to_owned()),
        Id::Schema => Some(format!("{:#}\n", dispatch::schema())),
        Id::Block | Id::Allow if command_line::is_help(value) => {
            Some(dispatch::all().map(|command| format!("{}\n", command.name)).collect())
        }
        _ => None,
    }
}

fn last(given: &[Assignment], id: Id) -> Option<&OsString> {
    given.iter().rev().find(|(own, _)| *own == id).map(|(_, value)| value)
}

impl Options {
    fn new(given: &[Assignment]) -> Result<Self, OptionsError> {
        let path = |id| last(given, id).map(PathBuf::from);
        let flag = |id| last(given, id).is_some_and(|value| value == "true");
        let block = list(given, Id::Block);
        // Empty is what --dump-conf prints where there is none.
        let allow = Some(list(given, Id::Allow)).filter(|allow| !allow.is_empty());
        Ok(Self {
            address: Address::new(last(given, Id::Method), path(Id::Path))?,
            statedir: path(Id::Statedir).unwrap_or_else(|| DEFAULT_STATEDIR.into()),
            logfile: path(Id::Logfile),
            verbose: flag(Id::Verbose),
            daemon: flag(Id::Daemon),
            pidfile: path(Id::Pidfile).unwrap_or_else(|| DEFAULT_PIDFILE.into()),
            retry_path: flag(Id::RetryPath),
            access: Access { block, allow },
            freeze: FreezeOptions::new(given)?,
        })
    }

    /// What stands for a setting in a configuration, if it has to stand there.
    fn value(&self, id: Id) -> Option<OsString> {
        let Self { address, statedir, logfile, verbose, daemon, pidfile, retry_path, access, freeze } = self;
        let seconds = |time: Option<Duration>| Some(time.map_or(0, |time| time.as_secs()).to_string().into());
        let path = |path: &PathBuf| path.clone().into_os_string();
        match id {
            Id::Daemon => Some(daemon.to_string().into()),
            Id::Method => Some(address.method().into()),
            Id::Path => Some(address.path()),
            Id::Logfile => logfile.as_ref().map(path),
            Id::Pidfile => Some(path(pidfile)),
            Id::Hook => freeze.hook.as_ref().map(path),
            Id::Statedir => Some(path(statedir)),
            Id::Verbose => Some(verbose.to_string().into()),
            Id::RetryPath => Some(retry_path.to_string().into()),
            Id::Block => Some(access.block.join(",").into()),
            Id::Allow => Some(access.allow.as_deref().unwrap_or_default().join(",").into()),
            Id::FreezeLease => seconds(freeze.lease),
            Id::FreezeTimeout => seconds(freeze.timeout),
            Id::HookDir => freeze.hook_dir.as_ref().map(path),
            Id::HookTimeout => seconds(Some(freeze.hook_timeout)),
            Id::Config | Id::DumpConf | Id::Schema | Id::Version | Id::Help => None,
        }
    }
}

impl FreezeOptions {
    fn new(given: &[Assignment]) -> Result<Self, OptionsError> {
        let path = |id| last(given, id).filter(|value| !value.is_empty()).map(PathBuf::from);
        let Self { lease, timeout, hook: _, hook_dir: _, hook_timeout } = Self::default();
        let hook_limit = match seconds(given, Id::HookTimeout, "hook-timeout")? {
            None => hook_timeout,
            Some(None) => return Err(OptionsError::Seconds("hook-timeout", "0".into())),
            Some(Some(limit)) => limit,
        };
        Ok(Self {
            lease: seconds(given, Id::FreezeLease, "freeze-lease")?.unwrap_or(lease),
            timeout: seconds(given, Id::FreezeTimeout, "freeze-timeout")?.unwrap_or(timeout),
            hook: path(Id::Hook),
            hook_dir: path(Id::HookDir),
            hook_timeout: hook_limit,
        })
    }
}

/// A time if one was given; zero is `None`.
fn seconds(
    given: &[Assignment],
    id: Id,
    name: &'static str,
) -> Result<Option<Option<Duration>>, OptionsError> {
    let Some(text) = last(given, id) else { return Ok(None) };
    let number = text.to_str().and_then(|text| text.trim_ascii().parse::<u32>().ok());
    let number = number.ok_or_else(|| OptionsError::Seconds(name, text.to_string_lossy().into_owned()))?;
    Ok(Some((number > 0).then(|| Duration::from_secs(number.into()))))
}

/// Everything that was given for a list, by commas.
fn list(given: &[Assignment], id: Id) -> Vec<String> {
    let lists = given.iter().filter(|(own, _)| *own == id).map(|(_, value)| value.to_string_lossy());
    let names = lists.flat_map(|list| list.split(',').map(str::to_owned).collect::<Vec<_>>());
    names.filter(|name| !name.is_empty()).collect()
}

impl Address {
    fn new(method: Option<&OsString>, path: Option<PathBuf>) -> Result<Self, OptionsError> {
        let method = method.map_or(&b"virtio-serial"[..], |method| method.as_bytes());
        let default = match method {
            b"virtio-serial" => Some(DEFAULT_PORT.into()),
            b"isa-serial" => Some(DEFAULT_SERIAL.into()),
            _ => None,
        };
        let path = path.or(default).ok_or(OptionsError::NoPath)?;
        match method {
            b"virtio-serial" => Ok(Self::VirtioSerial(path)),
            b"isa-serial" => Ok(Self::IsaSerial(path)),
            b"unix-listen" => Ok(Self::UnixListen(path)),
            b"vsock-listen" => Self::vsock(&path.to_string_lossy()),
            other => Err(OptionsError::Method(String::from_utf8_lossy(other).into_owned())),
        }
    }

    fn vsock(text: &str) -> Result<Self, OptionsError> {
        let numbers =
            text.split_once(':').and_then(|(cid, port)| Some((cid.parse().ok()?, port.parse().ok()?)));
        let (cid, port) = numbers.ok_or_else(|| OptionsError::Vsock(text.to_owned()))?;
        Ok(Self::VsockListen { cid, port })
    }

    fn method(&self) -> &'static str {
        match self {
            Self::VirtioSerial(_) => "virtio-serial",
            Self::IsaSerial(_) => "isa-serial",
            Self::UnixListen(_) => "unix-listen",
            Self::VsockListen { .. } => "vsock-listen",
        }
    }

    fn path(&self) -> OsString {
        match self {
            Self::VirtioSerial(path) | Self::IsaSerial(path) | Self::UnixListen(path) => path.into(),
            Self::VsockListen { cid, port } => format!("{cid}:{port}").into(),
        }
    }

    fn path_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::VirtioSerial(path) | Self::IsaSerial(path) | Self::UnixListen(path) => Some(path),
            Self::VsockListen { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests;
