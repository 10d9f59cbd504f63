//! The kernel as it is.
#![expect(unsafe_code, reason = "neither std nor rustix has FIFREEZE and FITHAW")]

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, statx};

use super::engine::Kernel;
use super::mounts::{Device, Superblock};
use super::order::Backing;
use super::uncover;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` (Linux `include/uapi/linux/fs.h`).
const FIFREEZE: libc::Ioctl = 0xC004_5877;
const FITHAW: libc::Ioctl = 0xC004_5878;

/// The running kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linux;

impl Kernel for Linux {
    type Handle = OwnedFd;

    fn mountinfo(&self) -> io::Result<Vec<u8>> {
        fs::read("/proc/self/mountinfo")
    }

    fn block_device(&self, path: &Path) -> Option<Device> {
        let metadata = fs::metadata(path).ok()?;
        let device = metadata.rdev();
        metadata.file_type().is_block_device().then(|| (rustix::fs::major(device), rustix::fs::minor(device)))
    }

    fn backing(&self, (major, minor): Device) -> Vec<Backing> {
        let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        let mut found = Vec::new();
        if let Ok(file) = fs::read(device.join("loop/backing_file")) {
            let path = PathBuf::from(String::from_utf8_lossy(&file).trim_end_matches('\n'));
            found.push(mount_of(&path).map_or(Backing::Lost, |mount| Backing::File { mount }));
        }
        let members = fs::read_dir(device.join("slaves")).into_iter().flatten().filter_map(Result::ok);
        let mut below: Vec<PathBuf> = members.map(|member| member.path()).collect();
        if device.join("partition").exists() {
            // The entry is a link into the device tree, where a partition lies in its disk.
            below.push(device.join(".."));
        }
        found.extend(below.iter().filter_map(|path| device_number(path)).map(Backing::Device));
        found
    }

    fn open(&self, path: &Path, mount: u64) -> io::Result<OwnedFd> {
        let fd = open(path)?;
        match mount_id(&fd) {
            Some(found) if found != mount => Err(hidden()),
            // Kernels before 5.8 give no id; there the path has to do.
            _ => Ok(fd),
        }
    }

    fn uncover(&self, superblock: &Superblock) -> io::Result<OwnedFd> {
        uncover::open(superblock.identity())
    }

    fn sync(&self, handle: &OwnedFd) -> io::Result<()> {
        Ok(rustix::fs::syncfs(handle)?)
    }

    fn freeze(&self, handle: &OwnedFd) -> io::Result<()> {
        ioctl(handle, FIFREEZE)
    }

    fn thaw(&self, handle: &OwnedFd) -> io::Result<()> {
        ioctl(handle, FITHAW)
    }
}

pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    // Without O_DIRECTORY: a file can be a mount point.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// The id of the mount through which this is open, if the kernel tells.
pub(super) fn mount_id(fd: impl AsFd) -> Option<u64> {
    let found = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id)
}

pub(super) fn hidden() -> io::Error {
    io::Error::new(ErrorKind::NotFound, "Hidden by another mount")
}

fn mount_of(path: &Path) -> Option<u64> {
    let flags = AtFlags::NO_AUTOMOUNT;
    let found = statx(rustix::fs::CWD, path, flags, StatxFlags::MNT_ID | StatxFlags::TYPE).ok()?;
    (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id)
}

/// The number in a block device's directory of sysfs.
fn device_number(directory: &Path) -> Option<Device> {
    let text = fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn ioctl(handle: impl AsFd, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: both requests ignore their argument (Linux `fs/ioctl.c`, `ioctl_fsfreeze` and
    // `ioctl_fsthaw`), and the descriptor is open for as long as it is borrowed.
    let result = unsafe { libc::ioctl(handle.as_fd().as_raw_fd(), request, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `FITHAW` once; for those who hold nothing but a descriptor.
pub(crate) fn thaw_once(handle: impl AsFd) -> io::Result<()> {
    ioctl(handle, FITHAW)
}
