//! Every setting once: its spellings on the command line and its key in the configuration.

use super::Id;

/// What a setting is given as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing on the command line; true or false in the configuration.
    Flag,
    /// A value.
    Value,
    /// A value, or nothing for this one. On the command line the value is joined to the option.
    OptionalValue(&'static str),
}

/// A setting.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) id: Id,
    pub(super) short: Option<u8>,
    pub(super) long: &'static str,
    /// The key in the configuration, if it may stand there.
    pub(super) key: Option<&'static str>,
    /// What option and key were called once.
    pub(super) former: Option<&'static str>,
    pub(super) kind: Kind,
}

impl Setting {
    const fn new(id: Id, short: Option<u8>, long: &'static str, kind: Kind) -> Self {
        Self { id, short, long, key: Some(long), former: None, kind }
    }

    const fn key(self, key: Option<&'static str>) -> Self {
        Self { key, ..self }
    }

    const fn formerly(self, name: &'static str) -> Self {
        Self { former: Some(name), ..self }
    }

    /// Whether the configuration means this one by `key`.
    pub(super) fn has_key(&self, key: &str) -> bool {
        self.key.is_some_and(|own| own == key || self.former == Some(key))
    }
}

const DEFAULT_HOOK: &str = "/etc/qemu/fsfreeze-hook";
const DEFAULT_HOOK_DIR: &str = "/etc/qemu/fsfreeze-hook.d";

/// In the order in which `--dump-conf` prints them.
pub(super) const SETTINGS: &[Setting] = &[
    Setting::new(Id::Daemon, Some(b'd'), "daemonize", Kind::Flag).key(Some("daemon")),
    Setting::new(Id::Method, Some(b'm'), "method", Kind::Value),
    Setting::new(Id::Path, Some(b'p'), "path", Kind::Value),
    Setting::new(Id::Logfile, Some(b'l'), "logfile", Kind::Value),
    Setting::new(Id::Pidfile, Some(b'f'), "pidfile", Kind::Value),
    Setting::new(Id::Hook, Some(b'F'), "fsfreeze-hook", Kind::OptionalValue(DEFAULT_HOOK)),
    Setting::new(Id::Statedir, Some(b't'), "statedir", Kind::Value),
    Setting::new(Id::Verbose, Some(b'v'), "verbose", Kind::Flag),
    Setting::new(Id::RetryPath, Some(b'r'), "retry-path", Kind::Flag),
    Setting::new(Id::Block, Some(b'b'), "block-rpcs", Kind::Value).formerly("blacklist"),
    Setting::new(Id::Allow, Some(b'a'), "allow-rpcs", Kind::Value),
    Setting::new(Id::FreezeLease, None, "freeze-lease", Kind::Value),
    Setting::new(Id::FreezeTimeout, None, "freeze-timeout", Kind::Value),
    Setting::new(Id::HookDir, None, "fsfreeze-hook-dir", Kind::OptionalValue(DEFAULT_HOOK_DIR)),
    Setting::new(Id::HookTimeout, None, "hook-timeout", Kind::Value),
    Setting::new(Id::Config, Some(b'c'), "config", Kind::Value).key(None),
    Setting::new(Id::DumpConf, Some(b'D'), "dump-conf", Kind::Flag).key(None),
    Setting::new(Id::Schema, None, "schema", Kind::Flag).key(None),
    Setting::new(Id::Version, Some(b'V'), "version", Kind::Flag).key(None),
    Setting::new(Id::Help, Some(b'h'), "help", Kind::Flag).key(None),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_settings_share_a_spelling() {
        let names = SETTINGS.iter().flat_map(|setting| [Some(setting.long), setting.former]).flatten();
        let mut names: Vec<&str> = names.collect();
        let mut letters: Vec<u8> = SETTINGS.iter().filter_map(|setting| setting.short).collect();
        let count = (names.len(), letters.len());
        names.sort_unstable();
        names.dedup();
        letters.sort_unstable();
        letters.dedup();
        assert_eq!((names.len(), letters.len()), count);
    }
}
