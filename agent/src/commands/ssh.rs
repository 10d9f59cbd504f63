//! guest-ssh-get-authorized-keys, -add- and -remove-.
//!
//! The agent is root, and everything below a home directory belongs to somebody who may wish to read or
//! to own other people's files. So every step is taken from the descriptor of the step before:
//!
//! ```text
//!   home directory ──openat──▶ .ssh ──openat──▶ authorized_keys     no symbolic link is followed,
//!    (root chose it)            the user's        a regular file     nothing is waited for
//! ```
//!
//! A new list is written to a new file, given to the user through its descriptor, and renamed into
//! place: sshd sees the old list or the new one, and no file but these two is ever changed.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use protocol::{Args, Error};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, fstat, fsync, mkdirat, open, openat, renameat,
    unlinkat,
};
use serde_json::{Value, json};

use super::accounts::{self, Account};
use super::errno_text;
use super::root::Root;
use crate::guest::Guest;
use crate::schema::{Command, Field, Run, Type, optional, required};

const USERNAME: Field = required("username", Type::Str);
const KEYS: Field = required("keys", Type::Array(&Type::Str));

pub(crate) const COMMANDS: &[Command] = &[
    Command::new(
        "guest-ssh-remove-authorized-keys",
        "Removes public keys that may log in as a user",
        Run::Worker(remove_keys),
    )
    .takes(&[USERNAME, KEYS]),
    Command::new(
        "guest-ssh-add-authorized-keys",
        "Adds public keys that may log in as a user, or replaces all",
        Run::Worker(add_keys),
    )
    .takes(&[USERNAME, KEYS, optional("reset", Type::Bool)]),
    Command::new(
        "guest-ssh-get-authorized-keys",
        "The public keys that may log in as a user",
        Run::Worker(get_keys),
    )
    .takes(&[USERNAME])
    .returns(Type::Object(&[KEYS])),
];

const DIRECTORY: &str = ".ssh";
const FILE: &str = "authorized_keys";
/// The new list until it is complete.
const DRAFT: &str = ".authorized_keys.new";
/// Most bytes of a list.
const LENGTH: u64 = 1 << 20;

fn get_keys(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let username = args.string("username")?;
    args.finish()?;
    let user = User::look_up(&Root::guest(), &username)?;
    Ok(json!({"keys": user.keys()?}))
}

fn add_keys(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let username = args.string("username")?;
    let keys = args.strings("keys")?;
    let reset = args.optional_bool("reset")?.unwrap_or(false);
    args.finish()?;
    check(&keys)?;
    User::look_up(&Root::guest(), &username)?.add(&keys, reset)?;
    Ok(json!({}))
}

fn remove_keys(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let username = args.string("username")?;
    let keys = args.strings("keys")?;
    args.finish()?;
    check(&keys)?;
    User::look_up(&Root::guest(), &username)?.remove(&keys)?;
    Ok(json!({}))
}

/// A key that is a comment or several lines would be something else when it is read again.
fn check(keys: &[String]) -> Result<(), Error> {
    let is_key = |key: &String| !key.starts_with('#') && !key.contains(['\n', '\0']);
    match keys.iter().find(|key| !is_key(key)) {
        None => Ok(()),
        Some(key) => Err(Error::generic(format!("invalid OpenSSH public key: '{key}'"))),
    }
}

/// Somebody whose list of keys is asked for or changed.
struct User {
    account: Account,
    /// Where the home directory is.
    home: PathBuf,
}

impl User {
    fn look_up(root: &Root, name: &str) -> Result<Self, Error> {
        let account = accounts::look_up(root, name)?;
        let home = root.join(&account.home);
        Ok(Self { account, home })
    }

    /// Public keys without comments, the last one first, as the reference gives them.
    fn keys(&self) -> Result<Vec<String>, Error> {
        let list = self.read().map_err(|error| self.cannot_read(&error))?;
        let lines = lines(&list).map(<[u8]>::trim_ascii);
        let keys = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
        let mut keys: Vec<String> = keys.map(|key| String::from_utf8_lossy(key).into_owned()).collect();
        keys.reverse();
        Ok(keys)
    }

    fn add(&self, keys: &[String], reset: bool) -> Result<(), Error> {
        let old = match self.read() {
            _ if reset => Vec::new(),
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            list => list.map_err(|error| self.cannot_read(&error))?,
        };
        let mut list: Vec<&[u8]> = lines(&old).collect();
        for key in keys {
            if !list.contains(&key.as_bytes()) {
                list.push(key.as_bytes());
            }
        }
        let directory = self.create_directory()?;
        self.write(&directory, &list)
    }

    fn remove(&self, keys: &[String]) -> Result<(), Error> {
        let old = self.read().map_err(|error| self.cannot_read(&error))?;
        let is_kept = |line: &&[u8]| !keys.iter().any(|key| key.as_bytes() == *line);
        let list: Vec<&[u8]> = lines(&old).filter(is_kept).collect();
        let directory = self.open_directory().map_err(|error| self.cannot_write(&error))?;
        self.write(&directory, &list)
    }

    /// The whole list.
    fn read(&self) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = openat(self.open_directory()?, FILE, flags, Mode::empty())?;
        let stat = fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(errno(libc::EINVAL));
        }
        let mut list = Vec::new();
        File::from(file).take(LENGTH + 1).read_to_end(&mut list)?;
        if list.len() as u64 > LENGTH { Err(errno(libc::EFBIG)) } else { Ok(list) }
    }

    /// `.ssh`, which nobody but the user and root may own.
    fn open_directory(&self) -> io::Result<OwnedFd> {
        let directory = open_directory_at(&self.open_home()?)?;
        let owner = fstat(&directory)?.st_uid;
        if owner == self.account.uid || owner == 0 { Ok(directory) } else { Err(errno(libc::EPERM)) }
    }

    /// The home directory: where it is was decided by root, links in its path included.
    fn open_home(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(open(&self.home, flags, Mode::empty())?)
    }

    /// `.ssh`, made if it is not there.
    fn create_directory(&self) -> Result<OwnedFd, Error> {
        let path = self.home.join(DIRECTORY);
        let failed = |error: io::Error| {
            Error::generic(format!("failed to create directory '{}': {}", path.display(), errno_text(&error)))
        };
        match self.open_directory() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            directory => return directory.map_err(failed),
        }
        self.make_directory().map_err(failed)
    }

    fn make_directory(&self) -> io::Result<OwnedFd> {
        let home = self.open_home()?;
        mkdirat(&home, DIRECTORY, Mode::RWXU)?;
        let directory = open_directory_at(&home)?;
        self.give(&directory, Mode::RWXU)?;
        Ok(directory)
    }

    /// Replaces the list.
    fn write(&self, directory: &OwnedFd, lines: &[&[u8]]) -> Result<(), Error> {
        let written = self.write_draft(directory, lines).and_then(|()| {
            renameat(directory, DRAFT, directory, FILE)?;
            // The list is in place; that it will survive a power failure is the rest.
            Ok(fsync(directory)?)
        });
        written.map_err(|error| {
            let _ = unlinkat(directory, DRAFT, AtFlags::empty());
            self.cannot_write(&error)
        })
    }

    fn write_draft(&self, directory: &OwnedFd, lines: &[&[u8]]) -> io::Result<()> {
        // Of a former attempt, or a trap: it is not opened but removed.
        let _ = unlinkat(directory, DRAFT, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let draft = openat(directory, DRAFT, flags, Mode::RUSR | Mode::WUSR)?;
        self.give(&draft, Mode::RUSR | Mode::WUSR)?;
        let mut draft = File::from(draft);
        for line in lines {
            draft.write_all(&[line, &b"\n"[..]].concat())?;
        }
        Ok(fsync(&draft)?)
    }

    /// Makes the user the owner of what was just created.
    fn give(&self, file: impl AsFd, mode: Mode) -> io::Result<()> {
        fchmod(&file, mode)?;
        let (uid, gid) = (Uid::from_raw(self.account.uid), Gid::from_raw(self.account.gid));
        Ok(fchown(&file, Some(uid), Some(gid))?)
    }

    fn cannot_read(&self, error: &io::Error) -> Error {
        let path = self.home.join(DIRECTORY).join(FILE);
        let (path, why) = (path.display(), errno_text(error));
        Error::generic(format!("failed to read '{path}': Failed to open file “{path}”: {why}"))
    }

    fn cannot_write(&self, error: &io::Error) -> Error {
        let path = self.home.join(DIRECTORY).join(FILE);
        Error::generic(format!("failed to write to '{}': {}", path.display(), errno_text(error)))
    }
}

fn open_directory_at(home: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(home, DIRECTORY, flags, Mode::empty())?)
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The lines of a list; the last one may lack its newline.
fn lines(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.strip_suffix(b"\n").unwrap_or(list).split(|&byte| byte == b'\n').filter(|_| !list.is_empty())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::Path;

    use super::*;

    const RETURNS: Type = Type::Object(&[KEYS]);

    /// Whoever runs the test, with a home directory.
    fn user() -> (tempfile::TempDir, User) {
        let directory = tempfile::tempdir().unwrap();
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let home = directory.path().join("home");
        fs::create_dir(&home).unwrap();
        (directory, User { account: Account { uid, gid, home: "/home".into() }, home })
    }

    fn owned(keys: &[&str]) -> Vec<String> {
        keys.iter().map(|&key| key.to_owned()).collect()
    }

    fn content(user: &User) -> String {
        fs::read_to_string(user.home.join(".ssh/authorized_keys")).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn keys_are_added_once_replaced_and_removed() {
        let (_directory, user) = user();
        user.add(&owned(&["a 1", "b 2", "a 1"]), false).unwrap();
        assert_eq!(content(&user), "a 1\nb 2\n");
        user.add(&owned(&["b 2", "c 3"]), false).unwrap();
        let keys = user.keys().unwrap();
        assert_eq!(keys, ["c 3", "b 2", "a 1"]);
        RETURNS.check(&json!({"keys": keys})).unwrap();
        user.remove(&owned(&["b 2", "d 4"])).unwrap();
        assert_eq!(content(&user), "a 1\nc 3\n");
        user.add(&owned(&["e 5"]), true).unwrap();
        assert_eq!(content(&user), "e 5\n");
        user.remove(&owned(&["e 5"])).unwrap();
        assert_eq!(content(&user), "");
        assert_eq!(user.keys().unwrap(), [""; 0]);
        assert_eq!(mode(&user.home.join(".ssh")), 0o700);
        assert_eq!(mode(&user.home.join(".ssh/authorized_keys")), 0o600);
        assert_eq!(fs::read_dir(user.home.join(".ssh")).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn comments_and_unknown_bytes_stay_and_are_no_keys() {
        let (_directory, user) = user();
        fs::create_dir(user.home.join(".ssh")).unwrap();
        let list = user.home.join(".ssh/authorized_keys");
        fs::write(&list, b"# mine\n\n  a 1\nb \xFF").unwrap();
        assert_eq!(user.keys().unwrap(), ["b \u{FFFD}", "a 1"]);
        user.add(&owned(&["c 3"]), false).unwrap();
        assert_eq!(fs::read(&list).unwrap(), b"# mine\n\n  a 1\nb \xFF\nc 3\n");
    }

    #[test]
    fn what_would_not_be_one_key_is_refused() {
        for key in ["#a", "a\nb", "a\0b"] {
            let expected = format!("invalid OpenSSH public key: '{key}'");
            assert_eq!(check(&owned(&["good", key])).unwrap_err().desc, expected);
        }
        check(&owned(&["ssh-ed25519 AAAA me"])).unwrap();
    }

    #[test]
    fn a_list_that_is_not_there_is_refused_as_recorded() {
        let (_directory, user) = user();
        let path = user.home.join(".ssh/authorized_keys");
        let path = path.display();
        let expected =
            format!("failed to read '{path}': Failed to open file “{path}”: No such file or directory");
        assert_eq!(user.keys().unwrap_err().desc, expected);
        assert_eq!(user.remove(&owned(&["a"])).unwrap_err().desc, expected);
        assert!(!user.home.join(".ssh").exists());
    }

    #[test]
    fn a_directory_that_is_a_link_leads_nowhere() {
        let (directory, user) = user();
        let other = directory.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("authorized_keys"), "secret\n").unwrap();
        symlink(&other, user.home.join(".ssh")).unwrap();
        assert!(user.keys().unwrap_err().desc.ends_with("Not a directory"));
        assert!(user.add(&owned(&["mine"]), true).unwrap_err().desc.ends_with("Not a directory"));
        assert!(user.remove(&owned(&["secret"])).is_err());
        assert_eq!(fs::read_to_string(other.join("authorized_keys")).unwrap(), "secret\n");
        assert_eq!(fs::read_dir(&other).unwrap().count(), 1);
    }

    #[test]
    fn a_list_that_is_a_link_is_not_read_and_replaced_but_not_followed() {
        let (directory, user) = user();
        let other = directory.path().join("shadow");
        fs::write(&other, "secret\n").unwrap();
        fs::create_dir(user.home.join(".ssh")).unwrap();
        for trap in [FILE, DRAFT] {
            symlink(&other, user.home.join(".ssh").join(trap)).unwrap();
        }
        assert!(user.keys().unwrap_err().desc.contains("Too many levels of symbolic links"));
        assert!(user.add(&owned(&["mine"]), false).is_err());
        user.add(&owned(&["mine"]), true).unwrap();
        assert_eq!(content(&user), "mine\n");
        assert!(fs::symlink_metadata(user.home.join(".ssh/authorized_keys")).unwrap().is_file());
        assert_eq!(fs::read_to_string(&other).unwrap(), "secret\n");
    }

    #[test]
    fn neither_a_fifo_nor_an_endless_file_is_read() {
        let (_directory, user) = user();
        let list = user.home.join(".ssh/authorized_keys");
        fs::create_dir(user.home.join(".ssh")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&list).status().unwrap().success());
        assert!(user.keys().unwrap_err().desc.ends_with("Invalid argument"));
        fs::remove_file(&list).unwrap();
        File::create(&list).unwrap().set_len(1 << 40).unwrap();
        assert!(user.keys().unwrap_err().desc.ends_with("File too large"));
        assert!(user.add(&owned(&["a"]), false).is_err());
    }

    #[test]
    fn what_is_made_is_the_users_and_what_is_somebody_elses_is_left_alone() {
        let (_directory, mut user) = user();
        if !rustix::process::getuid().is_root() {
            return;
        }
        user.account.uid = 4711;
        user.account.gid = 4712;
        user.add(&owned(&["a"]), false).unwrap();
        for path in [user.home.join(".ssh"), user.home.join(".ssh/authorized_keys")] {
            let metadata = fs::metadata(path).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (4711, 4712));
        }
        user.account.uid = 4713;
        assert!(user.keys().unwrap_err().desc.ends_with("Operation not permitted"));
        assert!(user.add(&owned(&["b"]), true).is_err());
        assert_eq!(content(&user), "a\n");
    }
}
