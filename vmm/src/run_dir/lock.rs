//! An open-file-description lock: held until the file is closed, whichever way its process ends, and visible to
//! others without taking it (fcntl(2), "Open file description locks").
#![expect(unsafe_code, reason = "fcntl with a struct flock has no safe interface for OFD locks here")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

#[expect(clippy::cast_possible_truncation, reason = "1, in a field that is shorter than the constant")]
const WRITE: libc::c_short = libc::F_WRLCK as libc::c_short;
#[expect(clippy::cast_possible_truncation, reason = "0, in a field that is shorter than the constant")]
const FROM_START: libc::c_short = libc::SEEK_SET as libc::c_short;

/// Takes the write lock on the whole file; `false` when someone else has it.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether someone else holds the lock. Never disturbs who holds it or is about to take it.
pub(super) fn is_locked(file: &File) -> io::Result<bool> {
    Ok(call(file, libc::F_OFD_GETLK)? != libc::F_UNLCK)
}

fn call(file: &File, command: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: `flock` is a plain structure for which all zeroes are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = WRITE;
    lock.l_whence = FROM_START;
    // SAFETY: the descriptor is open for as long as `file` lives, `lock` is a valid `struct flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(lock.l_type.into()) }
}
