//! A listening socket from systemd: `LISTEN_PID` is ours, `LISTEN_FDS` tells how many descriptors wait from
//! number 3 on (`sd_listen_fds(3)`).
#![expect(unsafe_code, reason = "a descriptor is taken over by its number, and the environment is changed")]

use std::env;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::net::{AddressFamily, getsockname, sockopt};

/// Why the socket that was handed over cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActivationError {
    #[error("The agent only supports listening on one socket, and {0} were passed")]
    TooMany(u32),
    #[error("Cannot use the socket that was passed")]
    Socket(#[source] Errno),
    #[error("The socket that was passed does not listen on a unix or vsock address")]
    Kind,
}

const FIRST: RawFd = 3;

/// Takes the socket over, if there is one. The method of the options does not count then.
pub(crate) fn socket() -> Result<Option<OwnedFd>, ActivationError> {
    let [pid, count, names] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];
    let passed = passed(env::var_os(pid).as_deref(), env::var_os(count).as_deref(), std::process::id());
    for name in [pid, count, names] {
        // SAFETY: the agent has no other thread yet.
        unsafe { env::remove_var(name) };
    }
    match passed {
        0 => Ok(None),
        1 => {
            // SAFETY: only borrowed to ask whether it is open, which the kernel checks.
            let fd = unsafe { BorrowedFd::borrow_raw(FIRST) };
            check(fd)?;
            // SAFETY: it is open, by the check, and systemd gave it to this process, where nobody else knows it.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(FIRST) }))
        }
        more => Err(ActivationError::TooMany(more)),
    }
}

/// How many descriptors were passed to this very process.
fn passed(pid: Option<&OsStr>, count: Option<&OsStr>, own: u32) -> u32 {
    let number =
        |text: Option<&OsStr>| text.and_then(OsStr::to_str).and_then(|text| text.parse::<u32>().ok());
    if number(pid) == Some(own) { number(count).unwrap_or(0) } else { 0 }
}

/// Whether somebody can be accepted from it, and makes it one of ours.
fn check(fd: impl AsFd) -> Result<(), ActivationError> {
    let socket = |error| ActivationError::Socket(error);
    let family = getsockname(&fd).map_err(socket)?.address_family();
    let is_ours = matches!(family, AddressFamily::UNIX | AddressFamily::VSOCK);
    if !is_ours || !sockopt::socket_acceptconn(&fd).map_err(socket)? {
        return Err(ActivationError::Kind);
    }
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(socket)?;
    ioctl_fionbio(&fd, true).map_err(socket)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn only_what_was_passed_to_this_process_counts() {
        let given = |pid: &str, count: &str| passed(Some(OsStr::new(pid)), Some(OsStr::new(count)), 7);
        assert_eq!(given("7", "2"), 2);
        assert_eq!(given("8", "2"), 0);
        assert_eq!(given("7", "x"), 0);
        assert_eq!(passed(None, Some(OsStr::new("1")), 7), 0);
        assert_eq!(passed(Some(OsStr::new("7")), None, 7), 0);
    }

    #[test]
    fn only_a_listening_local_socket_will_do() {
        let directory = tempfile::tempdir().unwrap();
        assert!(check(UnixListener::bind(directory.path().join("socket")).unwrap()).is_ok());
        assert!(matches!(check(UnixStream::pair().unwrap().0), Err(ActivationError::Kind)));
        assert!(matches!(check(TcpListener::bind("127.0.0.1:0").unwrap()), Err(ActivationError::Kind)));
        assert!(matches!(check(tempfile::tempfile().unwrap()), Err(ActivationError::Socket(_))));
    }
}
