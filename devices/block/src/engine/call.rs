//! One system call's worth of work, and how to do it on the spot.

#![expect(unsafe_code, reason = "vectored, positioned and per-call-flag I/O has no wrapper in std")]

use std::io;
use std::os::fd::RawFd;

use super::Extent;

/// `_IO(0x12, 119)` of <linux/fs.h>.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Most segments the kernel takes in one call (UIO_MAXIOV).
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// What a call does; [`super::fault::Faults`] and tests tell calls apart by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallKind {
    /// `preadv2`.
    Read,
    /// `pwritev2`.
    Write,
    /// `pwritev2` with `RWF_DSYNC`.
    DurableWrite,
    /// `fdatasync`.
    Sync,
    /// `fallocate` that makes a hole.
    PunchHole,
    /// `fallocate` that makes zeroes.
    ZeroRange,
    /// `ioctl(BLKDISCARD)`.
    DeviceDiscard,
    /// `lseek(SEEK_DATA)`, and `SEEK_HOLE` where there is data.
    Extent,
}

/// A call to the kernel. The segments, and the memory they point to, belong to whoever started it and
/// stay until its result is reaped; so does the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) fd: RawFd,
    pub(crate) kind: CallKind,
    pub(crate) offset: u64,
    /// Bytes, for calls without segments.
    pub(crate) length: u64,
    pub(crate) segments: *const libc::iovec,
    pub(crate) segment_count: u32,
    /// Not on the thread that submits it.
    pub(crate) aside: bool,
}

// SAFETY: a call is a description; the pointers are only followed under the contract of `run` and
// `Backend::start`, which does not depend on the thread.
unsafe impl Send for Call {}

impl Call {
    /// A call without segments.
    pub(crate) fn on_range(fd: RawFd, kind: CallKind, offset: u64, length: u64) -> Self {
        Self { fd, kind, offset, length, segments: std::ptr::null(), segment_count: 0, aside: false }
    }

    /// The mode of `fallocate`, for the calls that are one. Sizes never change.
    pub(crate) fn fallocate_mode(&self) -> i32 {
        match self.kind {
            CallKind::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            _ => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }

    /// The flags of `preadv2` and `pwritev2`.
    pub(crate) fn rw_flags(&self) -> i32 {
        if self.kind == CallKind::DurableWrite { libc::RWF_DSYNC } else { 0 }
    }

    /// Carries the call out and waits for it: bytes transferred, or zero, or `-errno`.
    ///
    /// # Safety
    ///
    /// The segments are valid, and the memory they describe may be read (writes) or written (reads)
    /// until this returns.
    pub(crate) unsafe fn run(&self) -> i32 {
        // Beyond i64 only when unchecked; the kernel then answers EINVAL.
        let offset = i64::try_from(self.offset).unwrap_or(-1);
        let length = i64::try_from(self.length).unwrap_or(-1);
        let count = i32::try_from(self.segment_count).unwrap_or(-1);
        let result = match self.kind {
            // SAFETY: by the contract of this function.
            CallKind::Read => unsafe {
                libc::preadv2(self.fd, self.segments, count, offset, self.rw_flags())
            },
            // SAFETY: by the contract of this function.
            CallKind::Write | CallKind::DurableWrite => unsafe {
                libc::pwritev2(self.fd, self.segments, count, offset, self.rw_flags())
            },
            // SAFETY: no pointers.
            CallKind::Sync => unsafe { libc::fdatasync(self.fd) as isize },
            // SAFETY: no pointers.
            CallKind::PunchHole | CallKind::ZeroRange => unsafe {
                libc::fallocate(self.fd, self.fallocate_mode(), offset, length) as isize
            },
            CallKind::DeviceDiscard => {
                let range = [self.offset, self.length];
                // SAFETY: BLKDISCARD reads two u64.
                unsafe { libc::ioctl(self.fd, BLKDISCARD, range.as_ptr()) as isize }
            }
            CallKind::Extent => match self.extent(offset) {
                Ok(extent) => {
                    // SAFETY: one segment, with room for an extent, by the contract and the engine's check.
                    unsafe { (*self.segments).iov_base.cast::<Extent>().write_unaligned(extent) };
                    0
                }
                Err(error) => return -error.raw_os_error().unwrap_or(libc::EIO),
            },
        };
        if result < 0 {
            -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
        } else {
            // At most MAX_RW_COUNT, which is below 2³¹.
            i32::try_from(result).unwrap_or(i32::MAX)
        }
    }

    /// What is at `offset`. Moves the file's position, which nobody uses.
    fn extent(&self, offset: i64) -> io::Result<Extent> {
        let seek = |whence| {
            // SAFETY: no pointers.
            u64::try_from(unsafe { libc::lseek(self.fd, offset, whence) })
                .map_err(|_| io::Error::last_os_error())
        };
        match seek(libc::SEEK_DATA) {
            Ok(data) if data > self.offset => Ok(Extent { hole: true, end: data }),
            Ok(_) => Ok(Extent { hole: false, end: seek(libc::SEEK_HOLE)? }),
            // No data from here to the end.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                Ok(Extent { hole: true, end: u64::MAX })
            }
            Err(error) => Err(error),
        }
    }
}
