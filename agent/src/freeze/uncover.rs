//! Opening a filesystem that no path leads to any more, because something is mounted over it.
//!
//! A thread gets a mount namespace of its own, a copy of everybody's, and in that copy takes away what is
//! mounted on the way. Nobody else sees any of it. The copy goes with the thread; what it opened stays.
#![expect(unsafe_code, reason = "rustix leaves it to the caller what unshare(2) means for other threads")]

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;

use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::linux::{hidden, mount_id, open as open_path};
use super::mounts::{Device, Line, Mount};

/// Things mounted over one mount point that are taken away; nobody stacks more.
const LAYERS: usize = 64;
/// The thread does little.
const STACK: usize = 128 << 10;

/// Opens the filesystem with this `s_dev`.
///
/// # Errors
///
/// Mount namespaces are not allowed (CAP_SYS_ADMIN), or it is mounted nowhere.
pub(super) fn open(identity: Device) -> io::Result<OwnedFd> {
    let thread = thread::Builder::new().name("uncover".into()).stack_size(STACK);
    let opened = thread.spawn(move || open_in_copy(identity))?.join();
    opened.unwrap_or_else(|_| Err(hidden()))
}

fn leave_namespace() -> io::Result<()> {
    // SAFETY: the mount namespace, and the working directory and umask that go with it, are this thread's
    // own from here on; the descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    Ok(())
}

fn open_in_copy(identity: Device) -> io::Result<OwnedFd> {
    leave_namespace()?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let mountinfo = fs::read("/proc/thread-self/mountinfo")?;
    let lines: Vec<Line> = mountinfo.split(|&byte| byte == b'\n').filter_map(Line::parse).collect();
    let mounts = lines.iter().filter(|line| line.device == identity).map(|line| &line.mount);
    let mut failure = hidden();
    for mount in mounts {
        match uncover(mount, &lines) {
            Ok(fd) => return Ok(fd),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Takes away what is mounted over `mount` or over what it is mounted on.
fn uncover(mount: &Mount, lines: &[Line]) -> io::Result<OwnedFd> {
    let way = way(mount, lines);
    for _ in 0..LAYERS {
        let found = open_path(&mount.mountpoint);
        if found.as_ref().is_ok_and(|fd| mount_id(fd) == Some(mount.id)) {
            return found;
        }
        let mut prefixes: Vec<&Path> = mount.mountpoint.ancestors().collect();
        prefixes.reverse();
        let is_cover = |path: &&&Path| mount_at(path).is_some_and(|id| !way.contains(&id));
        let cover = prefixes.iter().find(is_cover).ok_or_else(hidden)?;
        unmount(*cover, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    }
    Err(hidden())
}

/// The ids of a mount and of all those it is mounted on.
fn way(mount: &Mount, lines: &[Line]) -> Vec<u64> {
    let mut way = vec![mount.id];
    let mut parent = mount.parent;
    while let Some(line) = lines.iter().find(|line| line.mount.id == parent && !way.contains(&parent)) {
        way.push(parent);
        parent = line.mount.parent;
    }
    way
}

fn mount_at(path: &Path) -> Option<u64> {
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW;
    let found = statx(rustix::fs::CWD, path, flags, StatxFlags::MNT_ID).ok()?;
    (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id)
}
