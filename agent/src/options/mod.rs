//! The command line. Names and meanings are qemu-ga's, so that unit files keep working.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::access::Access;

/// How to reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// A named port of a virtio-serial device.
    VirtioSerial,
    /// A unix socket that the agent listens on.
    UnixListen,
}

/// What to run with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) method: Method,
    pub(crate) path: PathBuf,
    pub(crate) statedir: PathBuf,
    /// Standard error if absent.
    pub(crate) logfile: Option<PathBuf>,
    pub(crate) verbose: bool,
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
    Run(Options),
    Print(String),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("Unknown option '{0}'")]
    Unknown(String),
    #[error("Option '{0}' needs a value")]
    NoValue(String),
    #[error("Option '{0}' takes no value")]
    UnexpectedValue(String),
    #[error("Unsupported channel method '{0}' (virtio-serial, unix-listen)")]
    Method(String),
    #[error("Method unix-listen needs a --path for its socket")]
    NoPath,
}

/// What to print after a bad command line.
pub(crate) const HINT: &str = "Try 'tarn-agent --help' for more information.";

const DEFAULT_PORT: &str = "/dev/virtio-ports/org.qemu.guest_agent.0";
const DEFAULT_STATEDIR: &str = "/run";

const USAGE: &str = "\
Usage: tarn-agent [OPTION]...
The guest agent: answers its host over a virtio-serial port.

  -m, --method=METHOD    virtio-serial (default) or unix-listen
  -p, --path=PATH        port or socket (default for virtio-serial:
                         /dev/virtio-ports/org.qemu.guest_agent.0)
  -t, --statedir=DIR     where to keep state across restarts (default: /run)
  -l, --logfile=FILE     where to log to (default: standard error)
  -v, --verbose          log more
      --schema           print the schema of all commands as JSON and exit
  -V, --version          print the version and exit
  -h, --help             print this and exit

Example: tarn-agent -m unix-listen -p /tmp/agent.sock -t /tmp";

/// Whether an option has a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Flag,
    Value,
}

#[derive(Clone, Copy)]
enum Name {
    Method,
    Path,
    Statedir,
    Logfile,
    Verbose,
    Schema,
    Version,
    Help,
}

/// Every option once.
const OPTIONS: &[(u8, &str, Kind, Name)] = &[
    (b'm', "method", Kind::Value, Name::Method),
    (b'p', "path", Kind::Value, Name::Path),
    (b't', "statedir", Kind::Value, Name::Statedir),
    (b'l', "logfile", Kind::Value, Name::Logfile),
    (b'v', "verbose", Kind::Flag, Name::Verbose),
    (0, "schema", Kind::Flag, Name::Schema),
    (b'V', "version", Kind::Flag, Name::Version),
    (b'h', "help", Kind::Flag, Name::Help),
];

/// Values as given; defaults come last, when all is known.
#[derive(Default)]
struct Given {
    method: Option<Method>,
    path: Option<PathBuf>,
    statedir: Option<PathBuf>,
    logfile: Option<PathBuf>,
    verbose: bool,
    print: Option<String>,
}

/// Parses the arguments after the program's name. Like getopt: short options may be bundled, values
/// may follow in the same or the next argument, `--` ends the options, other arguments are ignored.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Parsed, OptionsError> {
    let mut arguments = arguments;
    let mut given = Given::default();
    while let Some(argument) = arguments.next() {
        match argument.as_bytes() {
            b"--" => break,
            [b'-', b'-', long @ ..] => parse_long(long, &mut arguments, &mut given)?,
            [b'-', short @ ..] if !short.is_empty() => parse_short(short, &mut arguments, &mut given)?,
            _ => {}
        }
    }
    given.finish()
}

fn parse_long(
    text: &[u8],
    arguments: &mut impl Iterator<Item = OsString>,
    given: &mut Given,
) -> Result<(), OptionsError> {
    let (name, value) = match text.iter().position(|&byte| byte == b'=') {
        Some(at) => (&text[..at], Some(OsString::from_vec(text[at + 1..].to_vec()))),
        None => (text, None),
    };
    let shown = || format!("--{}", String::from_utf8_lossy(name));
    let known = OPTIONS.iter().find(|(_, long, ..)| long.as_bytes() == name);
    let &(_, _, kind, name) = known.ok_or_else(|| OptionsError::Unknown(shown()))?;
    match (kind, value) {
        (Kind::Flag, None) => given.set(name, OsString::new()),
        (Kind::Flag, Some(_)) => Err(OptionsError::UnexpectedValue(shown())),
        (Kind::Value, Some(value)) => given.set(name, value),
        (Kind::Value, None) => {
            given.set(name, arguments.next().ok_or_else(|| OptionsError::NoValue(shown()))?)
        }
    }
}

fn parse_short(
    text: &[u8],
    arguments: &mut impl Iterator<Item = OsString>,
    given: &mut Given,
) -> Result<(), OptionsError> {
    let mut rest = text;
    while let [letter, tail @ ..] = rest {
        let shown = || format!("-{}", char::from(*letter).escape_default());
        let known = OPTIONS.iter().find(|(short, ..)| short == letter);
        let &(_, _, kind, name) = known.ok_or_else(|| OptionsError::Unknown(shown()))?;
        if kind == Kind::Flag {
            given.set(name, OsString::new())?;
            rest = tail;
            continue;
        }
        let value = match tail {
            [] => arguments.next().ok_or_else(|| OptionsError::NoValue(shown()))?,
            tail => OsStr::from_bytes(tail).to_owned(),
        };
        return given.set(name, value);
    }
    Ok(())
}

impl Given {
    fn set(&mut self, name: Name, value: OsString) -> Result<(), OptionsError> {
        match name {
            Name::Method => self.method = Some(method(&value)?),
            Name::Path => self.path = Some(value.into()),
            Name::Statedir => self.statedir = Some(value.into()),
            Name::Logfile => self.logfile = Some(value.into()),
            Name::Verbose => self.verbose = true,
            Name::Schema => self.print = Some(schema()),
            Name::Version => self.print = Some(format!("tarn-agent {}", env!("CARGO_PKG_VERSION"))),
            Name::Help => self.print = Some(USAGE.into()),
        }
        Ok(())
    }

    fn finish(self) -> Result<Parsed, OptionsError> {
        let Self { method, path, statedir, logfile, verbose, print } = self;
        if let Some(text) = print {
            return Ok(Parsed::Print(text));
        }
        let method = method.unwrap_or(Method::VirtioSerial);
        let path = match (method, path) {
            (_, Some(path)) => path,
            (Method::VirtioSerial, None) => DEFAULT_PORT.into(),
            (Method::UnixListen, None) => return Err(OptionsError::NoPath),
        };
        let statedir = statedir.unwrap_or_else(|| DEFAULT_STATEDIR.into());
        Ok(Parsed::Run(Options {
            method,
            path,
            statedir,
            logfile,
            verbose,
            access: Access::default(),
            freeze: FreezeOptions::default(),
        }))
    }
}

/// The schema document as it is published.
fn schema() -> String {
    format!("{:#}", crate::dispatch::schema())
}

fn method(name: &OsStr) -> Result<Method, OptionsError> {
    match name.as_bytes() {
        b"virtio-serial" => Ok(Method::VirtioSerial),
        b"unix-listen" => Ok(Method::UnixListen),
        _ => Err(OptionsError::Method(name.to_string_lossy().into_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Parsed, OptionsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn options(line: &str) -> Options {
        match parsed(line) {
            Ok(Parsed::Run(options)) => options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn without_arguments_the_agent_serves_the_standard_port() {
        let options = options("");
        assert_eq!(options.method, Method::VirtioSerial);
        assert_eq!(options.path, PathBuf::from(DEFAULT_PORT));
        assert_eq!(options.statedir, PathBuf::from("/run"));
    }

    #[test]
    fn values_may_be_joined_or_follow() {
        let expected = Options {
            method: Method::UnixListen,
            path: "/a".into(),
            statedir: "/b".into(),
            logfile: Some("/c".into()),
            verbose: true,
            access: Access::default(),
            freeze: FreezeOptions::default(),
        };
        assert_eq!(options("-m unix-listen -p /a -t /b -l /c -v"), expected);
        assert_eq!(options("-munix-listen -p/a -t/b -vl/c"), expected);
        assert_eq!(options("--method=unix-listen --path /a --statedir=/b --logfile=/c --verbose"), expected);
    }

    #[test]
    fn other_arguments_are_ignored() {
        assert_eq!(options("stray -- -x"), options(""));
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parsed("-x"), Err(OptionsError::Unknown("-x".into())));
        assert_eq!(parsed("--nope=1"), Err(OptionsError::Unknown("--nope".into())));
        assert_eq!(parsed("-vp"), Err(OptionsError::NoValue("-p".into())));
        assert_eq!(parsed("--verbose=1"), Err(OptionsError::UnexpectedValue("--verbose".into())));
        assert_eq!(parsed("-m tcp"), Err(OptionsError::Method("tcp".into())));
        assert_eq!(parsed("-m unix-listen"), Err(OptionsError::NoPath));
    }

    #[test]
    fn help_and_version_only_print() {
        for line in ["-h", "--help -v", "-V", "--version"] {
            assert!(matches!(parsed(line), Ok(Parsed::Print(_))), "{line}");
        }
    }
}
