//! The configuration file: what it adds to the command line, and how the agent prints one.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::keyfile::{self, KeyfileError};
use super::settings::{Kind, SETTINGS};
use super::{Assignment, Options};

const DEFAULT_PATH: &str = "/etc/qemu/qemu-ga.conf";

/// Where to look for the configuration.
pub(super) enum Source {
    /// It was asked for, so it has to be there.
    Named(PathBuf),
    /// The environment, or nobody, named it: it may be absent.
    Usual(PathBuf),
}

impl Source {
    /// `option` is what `--config` says, `environment` the variable `QGA_CONF`.
    pub(super) fn new(option: Option<OsString>, environment: Option<OsString>) -> Self {
        match (option, environment) {
            (Some(path), _) => Self::Named(path.into()),
            (None, Some(path)) => Self::Usual(path.into()),
            (None, None) => Self::Usual(DEFAULT_PATH.into()),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("Error loading configuration from path: {}", path.display())]
pub(crate) struct ConfigError {
    path: PathBuf,
    source: ConfigErrorKind,
}

#[derive(Debug, thiserror::Error)]
enum ConfigErrorKind {
    #[error("Cannot read it")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Keyfile(#[from] KeyfileError),
}

/// What the configuration sets, in its order. Keys that no setting has are ignored: the file may have been
/// written for another agent.
pub(super) fn load(source: &Source) -> Result<Vec<Assignment>, ConfigError> {
    let (Source::Named(path) | Source::Usual(path)) = source;
    let failed = |kind| ConfigError { path: path.clone(), source: kind };
    match fs::read(path) {
        Ok(text) => settings(&text).map_err(|error| failed(error.into())),
        Err(error) if error.kind() == ErrorKind::NotFound && matches!(source, Source::Usual(_)) => {
            Ok(Vec::new())
        }
        Err(error) => Err(failed(ConfigErrorKind::Read(error))),
    }
}

fn settings(text: &[u8]) -> Result<Vec<Assignment>, KeyfileError> {
    let mut given = Vec::new();
    for (key, value) in keyfile::pairs(text)? {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.has_key(&key)) else { continue };
        let value = match setting.kind {
            Kind::Flag => keyfile::boolean(&key, value)?.to_string(),
            Kind::Value | Kind::OptionalValue(_) => keyfile::string(&key, value)?,
        };
        given.push((setting.id, value.into()));
    }
    Ok(given)
}

/// A configuration that means these options.
pub(super) fn dump(options: &Options) -> Vec<u8> {
    let mut text = b"[general]\n".to_vec();
    for setting in SETTINGS {
        if let (Some(key), Some(value)) = (setting.key, options.value(setting.id)) {
            keyfile::write_pair(&mut text, key, &value);
        }
    }
    text
}

impl Options {
    /// Makes every path absolute, for an agent that is going to work elsewhere.
    ///
    /// # Errors
    ///
    /// If the current directory cannot be told, and matters.
    pub(crate) fn make_absolute(&mut self) -> io::Result<()> {
        let Self {
            address,
            statedir,
            logfile,
            daemon: _,
            pidfile,
            verbose: _,
            retry_path: _,
            access: _,
            freeze,
        } = self;
        let paths = [address.path_mut(), Some(statedir), logfile.as_mut(), Some(pidfile)];
        let hooks = [freeze.hook.as_mut(), freeze.hook_dir.as_mut()];
        for path in paths.into_iter().chain(hooks).flatten().filter(|path| !is_empty(path)) {
            *path = std::path::absolute(&*path)?;
        }
        Ok(())
    }
}

/// `absolute` refuses these; whoever opens them will tell.
fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Id;

    #[test]
    fn keys_are_those_of_the_reference_and_ours() {
        let text =
            b"[general]\ndaemon=1\nblacklist=a\nblock-rpcs=b\nfreeze-lease=5\nunknown=x\ndaemonize=0\n";
        let expected: Vec<Assignment> = vec![
            (Id::Daemon, "true".into()),
            (Id::Block, "a".into()),
            (Id::Block, "b".into()),
            (Id::FreezeLease, "5".into()),
        ];
        assert_eq!(settings(text).unwrap(), expected);
    }

    #[test]
    fn a_value_counts_only_where_it_is_used() {
        assert_eq!(settings(b"[general]\nunknown=\\q\xff\n[x]\nverbose=maybe\n").unwrap(), []);
        assert!(settings(b"[general]\nverbose=maybe\n").is_err());
        assert!(settings(b"[general]\npath=\\q\n").is_err());
    }

    #[test]
    fn only_a_file_that_was_asked_for_has_to_be_there() {
        let absent = || PathBuf::from("/nonexistent/conf");
        assert_eq!(load(&Source::Usual(absent())).unwrap(), []);
        assert_eq!(
            load(&Source::Named(absent())).unwrap_err().to_string(),
            "Error loading configuration from path: /nonexistent/conf"
        );
        assert!(load(&Source::Usual("/".into())).is_err(), "a directory is none");
    }
}
