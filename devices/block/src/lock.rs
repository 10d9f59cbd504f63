//! Image locks that QEMU, `qemu-img` and we understand alike.
//!
//! QEMU guards an image with open-file-description locks on single bytes of it, which need not exist
//! (`block/file-posix.c`). All of them are *read* locks, so they never exclude each other by
//! themselves; a conflict is found by asking whether a *write* lock would be refused:
//!
//! ```text
//!   byte 100 + p   held by whoever uses permission p
//!   byte 200 + p   held by whoever does not let others use permission p
//!
//!   p = 0 consistent read · 1 write · 2 write unchanged · 3 resize
//!
//!   to use p:     lock 100 + p, then nobody may hold 200 + p
//!   to forbid p:  lock 200 + p, then nobody may hold 100 + p
//! ```
//!
//! First lock, then look: two openers may both back off, but never both succeed.
//!
//! | opener | uses | forbids to others |
//! |---|---|---|
//! | writer | consistent read, write, resize | write, resize |
//! | reader | consistent read | write, resize |
//!
//! So readers share, and a writer is alone, among ourselves and against QEMU. What reads an image
//! and can live with changes, like `qemu-img info`, forbids nothing and is let in by both sides.

#![expect(unsafe_code, reason = "fcntl(2) with struct flock has no wrapper in std")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use crate::error::Holder;

const PERMISSION_BASE: u8 = 100;
const SHARED_BASE: u8 = 200;

const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

/// The locks one disk holds, given back when dropped.
pub(crate) struct ImageLock {
    file: Arc<File>,
    held: Vec<u8>,
}

/// Why an image cannot be locked.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Somebody else's use excludes ours.
    Held(Holder),
    /// No locks here.
    Unsupported(io::Error),
}

impl ImageLock {
    /// Locks `file`, which must be open for reading.
    pub(crate) fn acquire(file: &Arc<File>, read_only: bool) -> Result<Self, LockError> {
        let uses: &[u8] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] };
        let forbids: &[u8] = &[WRITE, RESIZE];
        let mine = uses.iter().map(|p| PERMISSION_BASE + p).chain(forbids.iter().map(|p| SHARED_BASE + p));
        let against = uses.iter().map(|p| SHARED_BASE + p).chain(forbids.iter().map(|p| PERMISSION_BASE + p));

        let mut lock = Self { file: Arc::clone(file), held: Vec::new() };
        for byte in mine {
            match set(file, libc::F_RDLCK, byte) {
                Ok(()) => lock.held.push(byte),
                // A write lock, which neither QEMU nor we take.
                Err(error) if is_conflict(&error) => return Err(LockError::Held(find_holder(file, byte))),
                Err(error) => return Err(LockError::Unsupported(error)),
            }
        }
        for byte in against {
            if let Some(pid) = conflict(file, byte).map_err(LockError::Unsupported)? {
                let holder = match pid {
                    Some(pid) => Holder::Process { pid, name: process_name(pid) },
                    None => find_holder(file, byte),
                };
                return Err(LockError::Held(holder));
            }
        }
        Ok(lock)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // Closing the file would do, unless its description came from outside and lives on there.
        for &byte in &self.held {
            // Nothing to do about an unlock that fails.
            let _ = set(&self.file, libc::F_UNLCK, byte);
        }
    }
}

fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

fn flock(kind: i32, byte: u8) -> libc::flock {
    // SAFETY: `flock` is plain old data; l_pid must be zero for OFD locks.
    let mut flock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are 0, 1 and 2.
    flock.l_type = i16::try_from(kind).unwrap_or(0);
    flock.l_whence = 0; // SEEK_SET
    flock.l_start = i64::from(byte);
    flock.l_len = 1;
    flock
}

fn set(file: &File, kind: i32, byte: u8) -> io::Result<()> {
    let flock = flock(kind, byte);
    // SAFETY: F_OFD_SETLK reads one struct flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const flock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody else holds `byte`: `Some(Some(pid))` when it is a classic POSIX lock, which has
/// an owner.
fn conflict(file: &File, byte: u8) -> io::Result<Option<Option<u32>>> {
    let mut flock = flock(libc::F_WRLCK, byte);
    // SAFETY: F_OFD_GETLK reads and writes one struct flock.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let free = i32::from(flock.l_type) == libc::F_UNLCK;
    Ok((!free).then(|| u32::try_from(flock.l_pid).ok().filter(|pid| *pid > 0)))
}

fn process_name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".into(), |name| name.trim_end().into())
}

/// Open-file-description locks have no owner, but /proc/PID/fdinfo shows the locks of each open file.
fn find_holder(file: &File, byte: u8) -> Holder {
    let Ok(ours) = file.metadata() else { return Holder::Unknown };
    let me = std::process::id();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for entry in files {
            let name = entry.file_name();
            let fd = name.to_string_lossy();
            if pid == me && *fd == file.as_raw_fd().to_string() {
                continue;
            }
            // Follows the link to the open file itself, even when it was renamed or removed.
            let same = fs::metadata(entry.path()).is_ok_and(|theirs| is_same(&ours, &theirs));
            let holds = || {
                fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))
                    .is_ok_and(|info| info.lines().any(|line| covers(line, byte)))
            };
            if same && holds() {
                return if pid == me {
                    Holder::Ourselves
                } else {
                    Holder::Process { pid, name: process_name(pid) }
                };
            }
        }
    }
    Holder::Unknown
}

/// Whether both are one file, or nodes of one block device.
fn is_same(ours: &fs::Metadata, theirs: &fs::Metadata) -> bool {
    let are_devices = ours.file_type().is_block_device() && theirs.file_type().is_block_device();
    (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) || are_devices && ours.rdev() == theirs.rdev()
}

/// Who has the block device at `path` so that the kernel gives it to nobody else.
pub(crate) fn find_claimant(path: &Path) -> Holder {
    let Ok(device) = fs::metadata(path).map(|metadata| metadata.rdev()) else { return Holder::Unknown };
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(at) = mounted_at(&mounts, &number) {
        return Holder::Mount { at: at.to_owned() };
    }
    let mut parts = fs::read_dir(format!("/sys/dev/block/{number}/holders")).into_iter().flatten().flatten();
    match parts.next() {
        Some(part) => Holder::Device { name: part.file_name().to_string_lossy().into_owned() },
        None => File::open(path)
            .map_or(Holder::Unknown, |file| find_holder(&file, PERMISSION_BASE + CONSISTENT_READ)),
    }
}

/// proc(5): `36 35 98:0 /mnt1 /mnt2 rw,noatime …`.
fn mounted_at<'a>(mounts: &'a str, device: &str) -> Option<&'a str> {
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines.find_map(|mut fields| (fields.nth(2)? == device).then(|| fields.nth(1))?)
}

/// Whether a line of fdinfo is a lock on `byte`:
/// `lock:⇥1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101`.
fn covers(line: &str, byte: u8) -> bool {
    let Some(rest) = line.strip_prefix("lock:") else { return false };
    let mut range = rest.split_whitespace().skip(6);
    let start = range.next().and_then(|start| start.parse::<u64>().ok());
    let end = range.next().map(|end| end.parse::<u64>().unwrap_or(u64::MAX)); // "EOF"
    matches!((start, end), (Some(start), Some(end)) if (start..=end).contains(&u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> Arc<File> {
        Arc::new(File::options().read(true).write(true).open(path).unwrap())
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let reader = ImageLock::acquire(&open(image.path()), true).unwrap();
        let second = ImageLock::acquire(&open(image.path()), true).unwrap();
        assert!(matches!(
            ImageLock::acquire(&open(image.path()), false),
            Err(LockError::Held(Holder::Ourselves))
        ));
        drop((reader, second));
        let writer = ImageLock::acquire(&open(image.path()), false).unwrap();
        assert!(ImageLock::acquire(&open(image.path()), true).is_err());
        assert!(ImageLock::acquire(&open(image.path()), false).is_err());
        drop(writer);
        ImageLock::acquire(&open(image.path()), false).unwrap();
    }

    #[test]
    fn a_lock_that_was_refused_leaves_nothing_behind() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let reader = ImageLock::acquire(&open(image.path()), true).unwrap();
        let file = open(image.path());
        assert!(ImageLock::acquire(&file, false).is_err());
        // The file stays open, and yet another reader is welcome.
        ImageLock::acquire(&open(image.path()), true).unwrap();
        drop(reader);
    }

    #[test]
    fn a_mount_is_found_by_its_device() {
        let mounts =
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n36 22 7:0 / /mnt/x\\040y rw - ext4 /dev/loop0 rw\n";
        assert_eq!(mounted_at(mounts, "7:0"), Some("/mnt/x\\040y"));
        assert_eq!(mounted_at(mounts, "7:1"), None);
    }

    #[test]
    fn locks_are_read_from_fdinfo() {
        assert!(covers("lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101", 101));
        assert!(!covers("lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101", 102));
        assert!(covers("lock:\t1: POSIX  ADVISORY  WRITE 5 fe:00:1234 0 EOF", 203));
        assert!(!covers("pos:\t0", 0));
        assert!(!covers("lock:\t", 0));
    }
}
