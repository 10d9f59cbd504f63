//! `/etc/passwd`, read by hand: the agent is static and has no name service switch, so that users from
//! elsewhere (LDAP, systemd-homed) are unknown to it.

use std::path::PathBuf;

use protocol::Error;

use super::failed;
use super::root::{Root, digits};

/// A user of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) home: PathBuf,
}

/// Finds a user by name.
pub(super) fn look_up(root: &Root, name: &str) -> Result<Account, Error> {
    let what = format!("failed to lookup user '{name}'");
    let text = root.text("/etc/passwd").map_err(|error| failed(&what, &error))?;
    // The reference's text: nothing went wrong, there is only no such user.
    let unknown = || Error::generic(format!("{what}: Success"));
    text.lines().find_map(|line| account(line, name)).ok_or_else(unknown)
}

/// A line like `root:x:0:0:root:/root:/bin/sh` (passwd(5)), if it is about this user.
fn account(line: &str, name: &str) -> Option<Account> {
    let fields: Vec<&str> = line.split(':').collect();
    let [user, _, uid, gid, _, home, ..] = fields[..] else { return None };
    if user != name || name.is_empty() || !home.starts_with('/') {
        return None;
    }
    Some(Account { uid: digits(uid)?, gid: digits(gid)?, home: home.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_the_whole_name() {
        let line = "bob:x:1000:1001:Bob,,,:/home/bob:/bin/sh";
        let bob = Account { uid: 1000, gid: 1001, home: "/home/bob".into() };
        assert_eq!(account(line, "bob"), Some(bob));
        assert_eq!(account(line, "bo"), None);
        assert_eq!(account("::0:0::/:", ""), None);
    }

    #[test]
    fn lines_that_are_not_as_documented_name_nobody() {
        for line in [
            "bob",
            "bob:x:1000",
            "bob:x:-1:0::/:",
            "bob:x:4294967296:0::/:",
            "bob:x:1:1::home:",
            "+bob::::::",
        ] {
            assert_eq!(account(line, "bob"), None, "{line}");
        }
    }

    #[test]
    fn an_unknown_user_is_refused_as_recorded() {
        let desc = look_up(&Root::guest(), "nosuchuser").unwrap_err().desc;
        assert_eq!(desc, "failed to lookup user 'nosuchuser': Success");
        let directory = tempfile::tempdir().unwrap();
        let desc = look_up(&Root::at(directory.path()), "x").unwrap_err().desc;
        assert_eq!(desc, "failed to lookup user 'x': No such file or directory");
    }
}
