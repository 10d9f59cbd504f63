//! The arguments, read as getopt_long(3) reads them: short options may be bundled, values may follow in
//! the same or the next argument, long names may be shortened as long as one setting is meant, `--` ends
//! the options, and other arguments are ignored.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::settings::{Kind, SETTINGS, Setting};
use super::{Assignment, Id};

/// A command line that cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Mistake {
    #[error("Unknown option '{0}'")]
    Unknown(String),
    #[error("Option '{0}' may mean more than one")]
    Ambiguous(String),
    #[error("Option '{0}' needs a value")]
    NoValue(String),
    #[error("Option '{0}' takes no value")]
    UnexpectedValue(String),
}

/// What was asked for, in order; the first of it that only prints something is the last.
pub(super) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Vec<Assignment>, Mistake> {
    let mut line = Line { arguments, given: Vec::new() };
    while let Some(argument) = line.arguments.next() {
        match argument.as_bytes() {
            b"--" => break,
            [b'-', b'-', long @ ..] => line.long(long)?,
            [b'-', short @ ..] if !short.is_empty() => line.short(short)?,
            _ => {}
        }
        if line.given.iter().any(|(id, value)| id.prints(value)) {
            break;
        }
    }
    Ok(line.given)
}

struct Line<I> {
    arguments: I,
    given: Vec<Assignment>,
}

impl<I: Iterator<Item = OsString>> Line<I> {
    fn long(&mut self, text: &[u8]) -> Result<(), Mistake> {
        let (name, value) = match text.iter().position(|&byte| byte == b'=') {
            Some(at) => (&text[..at], Some(OsString::from_vec(text[at + 1..].to_vec()))),
            None => (text, None),
        };
        let shown = || format!("--{}", String::from_utf8_lossy(name));
        let setting = find_long(name)
            .map_err(|found| if found { Mistake::Ambiguous(shown()) } else { Mistake::Unknown(shown()) })?;
        let value = match (setting.kind, value) {
            (Kind::Flag, Some(_)) => return Err(Mistake::UnexpectedValue(shown())),
            (Kind::Flag, None) => "true".into(),
            (_, Some(value)) => value,
            (Kind::OptionalValue(default), None) => default.into(),
            (Kind::Value, None) => self.arguments.next().ok_or_else(|| Mistake::NoValue(shown()))?,
        };
        self.given.push((setting.id, value));
        Ok(())
    }

    fn short(&mut self, text: &[u8]) -> Result<(), Mistake> {
        let mut rest = text;
        while let [letter, tail @ ..] = rest {
            let shown = || format!("-{}", char::from(*letter).escape_default());
            let known = SETTINGS.iter().find(|setting| setting.short == Some(*letter));
            let setting = known.ok_or_else(|| Mistake::Unknown(shown()))?;
            let value = match (setting.kind, tail) {
                (Kind::Flag, _) => {
                    self.given.push((setting.id, "true".into()));
                    rest = tail;
                    continue;
                }
                (Kind::OptionalValue(default), []) => default.into(),
                (Kind::Value, []) => self.arguments.next().ok_or_else(|| Mistake::NoValue(shown()))?,
                (_, tail) => OsStr::from_bytes(tail).to_owned(),
            };
            self.given.push((setting.id, value));
            break;
        }
        Ok(())
    }
}

/// The setting of this name or with the only name that begins so; else whether there are any.
fn find_long(name: &[u8]) -> Result<&'static Setting, bool> {
    let names = || {
        let spelled = |setting: &'static Setting| {
            [Some(setting.long), setting.former].into_iter().flatten().map(move |name| (name, setting))
        };
        SETTINGS.iter().flat_map(spelled)
    };
    if let Some((_, setting)) = names().find(|(own, _)| own.as_bytes() == name) {
        return Ok(setting);
    }
    let mut candidates = names().filter(|(own, _)| own.as_bytes().starts_with(name));
    let (_, setting) = candidates.next().ok_or(false)?;
    if candidates.any(|(_, other)| other.id != setting.id) { Err(true) } else { Ok(setting) }
}

impl Id {
    /// Whether this makes the agent print something and end, whatever else is given.
    fn prints(self, value: &OsStr) -> bool {
        match self {
            Self::Version | Self::Help | Self::Schema => true,
            Self::Block | Self::Allow => is_help(value),
            _ => false,
        }
    }
}

/// Whether a list is a question instead.
pub(super) fn is_help(value: &OsStr) -> bool {
    value == "help" || value == "?"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Vec<(Id, String)>, Mistake> {
        let given = parse(line.split_whitespace().map(OsString::from))?;
        Ok(given.into_iter().map(|(id, value)| (id, value.into_string().unwrap())).collect())
    }

    fn given(id: Id, value: &str) -> (Id, String) {
        (id, value.to_owned())
    }

    #[test]
    fn values_may_be_joined_or_follow() {
        let expected = vec![
            given(Id::Method, "unix-listen"),
            given(Id::Path, "/a"),
            given(Id::Verbose, "true"),
            given(Id::Logfile, "/c"),
        ];
        for line in [
            "-m unix-listen -p /a -v -l /c",
            "-munix-listen -p/a -vl/c",
            "-munix-listen -p/a -vl /c",
            "--method=unix-listen --path /a --verbose --logfile=/c",
            "--me=unix-listen --pat /a --verb --lo /c stray",
        ] {
            assert_eq!(parsed(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn the_value_of_a_hook_is_joined_or_absent() {
        assert_eq!(parsed("-F").unwrap(), [given(Id::Hook, "/etc/qemu/fsfreeze-hook")]);
        assert_eq!(parsed("-F /x").unwrap(), [given(Id::Hook, "/etc/qemu/fsfreeze-hook")]);
        assert_eq!(parsed("-F/x").unwrap(), [given(Id::Hook, "/x")]);
        assert_eq!(parsed("-vF/x").unwrap(), [given(Id::Verbose, "true"), given(Id::Hook, "/x")]);
        assert_eq!(parsed("--fsfreeze-hook=/x").unwrap(), [given(Id::Hook, "/x")]);
        assert_eq!(parsed("--fsfreeze-hook-dir").unwrap(), [given(Id::HookDir, "/etc/qemu/fsfreeze-hook.d")]);
    }

    #[test]
    fn former_names_mean_the_same() {
        let expected = [given(Id::Block, "a,b")];
        for line in ["-b a,b", "--block-rpcs=a,b", "--blacklist a,b", "--bl=a,b", "--black=a,b"] {
            assert_eq!(parsed(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn nothing_counts_after_two_dashes_or_a_question() {
        assert_eq!(parsed("stray -- -x").unwrap(), []);
        assert_eq!(parsed("-V -x").unwrap(), [given(Id::Version, "true")]);
        assert_eq!(parsed("-b ? -x").unwrap(), [given(Id::Block, "?")]);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parsed("-x"), Err(Mistake::Unknown("-x".into())));
        assert_eq!(parsed("-x -V"), Err(Mistake::Unknown("-x".into())));
        assert_eq!(parsed("--nope=1"), Err(Mistake::Unknown("--nope".into())));
        assert_eq!(parsed("--p=/x"), Err(Mistake::Ambiguous("--p".into())));
        assert_eq!(parsed("-vp"), Err(Mistake::NoValue("-p".into())));
        assert_eq!(parsed("--path"), Err(Mistake::NoValue("--path".into())));
        assert_eq!(parsed("--verbose=1"), Err(Mistake::UnexpectedValue("--verbose".into())));
    }
}
