//! The kernel as it is.
#![expect(unsafe_code, reason = "neither std nor rustix has FIFREEZE and FITHAW")]

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, statx};

use super::Kernel;
use super::mounts::Device;

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

    fn open(&self, path: &Path, mount: u64) -> io::Result<OwnedFd> {
        // Without O_DIRECTORY: a file can be a mount point.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        let found = statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        // Kernels before 5.8 give no id; there the path has to do.
        let has_id = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        if has_id && found.stx_mnt_id != mount {
            return Err(io::Error::new(ErrorKind::NotFound, "Hidden by another mount"));
        }
        Ok(fd)
    }

    fn freeze(&self, handle: &OwnedFd) -> io::Result<()> {
        ioctl(handle, FIFREEZE)
    }

    fn thaw(&self, handle: &OwnedFd) -> io::Result<()> {
        ioctl(handle, FITHAW)
    }
}

fn ioctl(handle: impl AsFd, request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: both requests ignore their argument (Linux `fs/ioctl.c`, `ioctl_fsfreeze` and
    // `ioctl_fsthaw`), and the descriptor is open for as long as it is borrowed.
    let result = unsafe { libc::ioctl(handle.as_fd().as_raw_fd(), request, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
