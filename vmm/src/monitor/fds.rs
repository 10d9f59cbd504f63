//! File descriptors that clients hand in.
//!
//! ```text
//!  SCM_RIGHTS ─▶ ReceivedFds ──getfd NAME──▶ names of this connection ──▶ a command takes it by name
//!                  (pending) ──add-fd──────▶ FdSets of the VM ──────────▶ opened as /dev/fdset/N
//! ```
//!
//! A descriptor may come with any byte before the command that wants it, also with bytes that belong to
//! another command; it waits, in order, until one takes it.
//!
//! Names belong to the connection and go with it: a name is an intention of one client, and a client that
//! died before its command consumed the descriptor hands it in again. (QEMU keeps them per monitor, which
//! has one client at a time; here many clients share a socket, and names that outlive theirs would leak
//! and collide.) Sets belong to the VM and survive their clients, as in QEMU.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use protocol::Error;
use serde_json::{Value, json};

// All bounds together stay well below the customary limit of 1024 descriptors: clients cannot take those that
// the VM needs.

/// Descriptors of one client that no command has taken yet; the oldest go when there are more.
const PENDING_MAX: usize = 4;
/// Names of one client.
const NAMES_MAX: usize = 12;
/// Descriptors in all sets of the VM.
const SET_FDS_MAX: usize = 64;

/// What one client handed in.
#[derive(Debug, Default)]
pub struct ReceivedFds {
    pending: VecDeque<OwnedFd>,
    names: BTreeMap<String, OwnedFd>,
}

impl ReceivedFds {
    /// Keeps descriptors that just arrived.
    pub fn push(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.pending.extend(fds);
        while self.pending.len() > PENDING_MAX {
            self.pending.pop_front();
        }
    }

    /// `getfd`: gives the oldest pending descriptor a name. A descriptor of that name is closed.
    ///
    /// # Errors
    ///
    /// The name begins with a digit, there is no descriptor, or there are too many names.
    pub fn name(&mut self, name: String) -> Result<(), Error> {
        let fd = self.take_pending()?;
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(Error::invalid_parameter_value("fdname", "a name not starting with a digit"));
        }
        if self.names.len() >= NAMES_MAX && !self.names.contains_key(&name) {
            return Err(Error::generic(format!("Too many named file descriptors, at most {NAMES_MAX}")));
        }
        self.names.insert(name, fd);
        Ok(())
    }

    /// `closefd`.
    ///
    /// # Errors
    ///
    /// There is no descriptor of that name.
    pub fn close(&mut self, name: &str) -> Result<(), Error> {
        match self.names.remove(name) {
            Some(_) => Ok(()),
            None => Err(Error::generic(format!("File descriptor named '{name}' not found"))),
        }
    }

    /// Hands a named descriptor to the command that uses it; the name is free again.
    ///
    /// # Errors
    ///
    /// There is no descriptor of that name.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, Error> {
        let missing = || Error::generic(format!("File descriptor named '{name}' has not been found"));
        self.names.remove(name).ok_or_else(missing)
    }

    /// The oldest pending descriptor.
    ///
    /// # Errors
    ///
    /// None has arrived.
    pub fn take_pending(&mut self) -> Result<OwnedFd, Error> {
        let missing = || Error::generic("No file descriptor supplied via SCM_RIGHTS");
        self.pending.pop_front().ok_or_else(missing)
    }
}

/// One descriptor of a set.
#[derive(Debug)]
struct SetFd {
    fd: OwnedFd,
    opaque: Option<String>,
}

/// The VM's descriptor sets, by number.
#[derive(Debug, Default)]
pub struct FdSets {
    sets: BTreeMap<i64, Vec<SetFd>>,
}

impl FdSets {
    /// `add-fd`: into that set, which is made if need be, or into a new one with the lowest free number.
    ///
    /// # Errors
    ///
    /// The number is negative, or there are too many descriptors.
    pub fn add(&mut self, set: Option<i64>, opaque: Option<String>, fd: OwnedFd) -> Result<Value, Error> {
        if set.is_some_and(i64::is_negative) {
            return Err(Error::invalid_parameter_value("fdset-id", "a non-negative value"));
        }
        if self.sets.values().map(Vec::len).sum::<usize>() >= SET_FDS_MAX {
            let text = format!("Too many file descriptors in sets, at most {SET_FDS_MAX}");
            return Err(Error::generic(text));
        }
        let lowest_free = || (0..).find(|number| !self.sets.contains_key(number)).unwrap_or_default();
        let set = set.unwrap_or_else(lowest_free);
        let number = fd.as_raw_fd();
        self.sets.entry(set).or_default().push(SetFd { fd, opaque });
        Ok(json!({"fdset-id": set, "fd": number}))
    }

    /// `remove-fd`: one descriptor, or the whole set. Whoever opened it keeps what it opened.
    ///
    /// # Errors
    ///
    /// There is no such set or no such descriptor in it.
    pub fn remove(&mut self, set: i64, fd: Option<i64>) -> Result<(), Error> {
        let missing = || {
            let fd = fd.map(|fd| format!(", fd:{fd}")).unwrap_or_default();
            Error::generic(format!("File descriptor named 'fdset-id:{set}{fd}' not found"))
        };
        let fds = self.sets.get_mut(&set).ok_or_else(missing)?;
        let before = fds.len();
        fds.retain(|member| fd.is_some_and(|fd| i64::from(member.fd.as_raw_fd()) != fd));
        if fds.len() == before {
            return Err(missing());
        }
        if fds.is_empty() {
            self.sets.remove(&set);
        }
        Ok(())
    }

    /// `query-fdsets`: the highest number first.
    pub fn list(&self) -> Value {
        let member = |member: &SetFd| match &member.opaque {
            Some(opaque) => json!({"fd": member.fd.as_raw_fd(), "opaque": opaque}),
            None => json!({"fd": member.fd.as_raw_fd()}),
        };
        let set = |(number, fds): (&i64, &Vec<SetFd>)| json!({"fdset-id": number, "fds": fds.iter().map(member).collect::<Vec<_>>()});
        self.sets.iter().rev().map(set).collect()
    }

    /// Opens `/dev/fdset/N`: a duplicate of the set's first descriptor whose access mode is `access`
    /// (`O_RDONLY`, `O_WRONLY` or `O_RDWR`).
    ///
    /// # Errors
    ///
    /// ENOENT if there is no such set, EACCES if none of its descriptors allows that access.
    pub fn open(&self, set: i64, access: libc::c_int) -> io::Result<OwnedFd> {
        let os_error = io::Error::from_raw_os_error;
        let fds = self.sets.get(&set).ok_or_else(|| os_error(libc::ENOENT))?;
        for member in fds {
            if access_mode(member.fd.as_raw_fd())? == access & libc::O_ACCMODE {
                return member.fd.try_clone();
            }
        }
        Err(os_error(libc::EACCES))
    }
}

/// The access mode of an open descriptor, by /proc/self/fdinfo (proc(5)).
fn access_mode(fd: RawFd) -> io::Result<libc::c_int> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.map(|flags| flags & libc::O_ACCMODE).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn descriptors_wait_in_order_and_the_oldest_go_first() {
        let mut fds = ReceivedFds::default();
        assert_eq!(fds.name("a".into()).unwrap_err().desc, "No file descriptor supplied via SCM_RIGHTS");
        let (first, second) = (null(), null());
        let numbers = [first.as_raw_fd(), second.as_raw_fd()];
        fds.push([first, second]);
        fds.name("a".into()).unwrap();
        fds.name("b".into()).unwrap();
        assert_eq!(fds.take("a").unwrap().as_raw_fd(), numbers[0]);
        assert_eq!(fds.take("b").unwrap().as_raw_fd(), numbers[1]);
        assert_eq!(fds.take("a").unwrap_err().desc, "File descriptor named 'a' has not been found");
        fds.push((0..100).map(|_| null()));
        assert_eq!(fds.pending.len(), PENDING_MAX);
    }

    #[test]
    fn a_name_given_again_closes_the_old_descriptor() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut fds = ReceivedFds::default();
        fds.push([writer.into(), null()]);
        fds.name("a".into()).unwrap();
        fds.name("a".into()).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        fds.close("a").unwrap();
        assert_eq!(fds.close("a").unwrap_err().desc, "File descriptor named 'a' not found");
    }

    #[test]
    fn names_do_not_start_with_a_digit_and_are_not_endless() {
        let mut fds = ReceivedFds::default();
        fds.push([null()]);
        let error = fds.name("1a".into()).unwrap_err();
        assert_eq!(error.desc, "Parameter 'fdname' expects a name not starting with a digit");
        for index in 0..NAMES_MAX {
            fds.push([null()]);
            fds.name(format!("n{index}")).unwrap();
        }
        fds.push([null()]);
        assert!(fds.name("one-more".into()).is_err());
    }

    #[test]
    fn sets_are_numbered_listed_and_removed_as_in_qemu() {
        let mut sets = FdSets::default();
        assert_eq!(sets.add(None, None, null()).unwrap()["fdset-id"], 0);
        let added = sets.add(Some(7), Some("note".into()), null()).unwrap();
        assert_eq!(sets.add(None, None, null()).unwrap()["fdset-id"], 1);
        let list = sets.list();
        assert_eq!(list[0], json!({"fdset-id": 7, "fds": [{"fd": added["fd"], "opaque": "note"}]}));
        assert_eq!(list[2]["fdset-id"], 0);
        let error = sets.remove(7, Some(-3)).unwrap_err();
        assert_eq!(error.desc, "File descriptor named 'fdset-id:7, fd:-3' not found");
        sets.remove(7, added["fd"].as_i64()).unwrap();
        assert_eq!(sets.remove(7, None).unwrap_err().desc, "File descriptor named 'fdset-id:7' not found");
        sets.remove(0, None).unwrap();
        assert!(sets.add(Some(-1), None, null()).is_err());
    }

    #[test]
    fn sets_are_not_endless() {
        let mut sets = FdSets::default();
        for _ in 0..SET_FDS_MAX {
            sets.add(Some(1), None, null()).unwrap();
        }
        assert!(sets.add(None, None, null()).is_err());
    }

    #[test]
    fn a_set_is_opened_with_the_access_that_was_asked_for() {
        let mut sets = FdSets::default();
        let writable = File::options().write(true).open("/dev/null").unwrap();
        sets.add(Some(1), None, null()).unwrap();
        let kind = |result: io::Result<OwnedFd>| result.unwrap_err().raw_os_error().unwrap();
        assert_eq!(kind(sets.open(1, libc::O_WRONLY)), libc::EACCES);
        assert_eq!(kind(sets.open(2, libc::O_WRONLY)), libc::ENOENT);
        sets.add(Some(1), None, writable.into()).unwrap();
        sets.open(1, libc::O_WRONLY).unwrap();
        sets.open(1, libc::O_RDONLY).unwrap();
    }
}
