//! What the host knows about an image: size, block sizes, alignment of direct I/O.

#![expect(unsafe_code, reason = "ioctl(2), statx(2) and aligned reads have no wrapper in std")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

/// One sector, virtio's unit of address whatever the disk's block size.
pub(crate) const SECTOR: u32 = 512;

/// `_IOR(0x12, 114, size_t)` of <linux/fs.h>, 64-bit.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// Facts about a disk, read once when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// A block device, not a regular file.
    pub is_block_device: bool,
    /// Bytes in one logical block. For files always 512: partition tables inside an image count in it,
    /// so it must not depend on where the image lies.
    pub logical_block_size: u32,
    /// Bytes that are written as one without a read-modify-write; at least the logical block.
    pub physical_block_size: u32,
    /// What offsets and lengths of direct I/O must be multiples of; 1 without direct I/O.
    pub offset_alignment: u32,
    /// What memory addresses of direct I/O must be multiples of; 1 without direct I/O.
    pub memory_alignment: u32,
    /// Discards should begin and end at multiples of this many bytes.
    pub discard_granularity: u32,
}

impl Geometry {
    /// Asks the host about `file`; `direct` when it is open with `O_DIRECT`. `None` when direct I/O is
    /// not possible.
    pub(crate) fn probe(file: &File, direct: bool) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        let is_block_device = metadata.file_type().is_block_device();
        let preferred = u32::try_from(metadata.blksize()).unwrap_or(SECTOR).max(SECTOR);
        let (logical, physical, discard_granularity) = if is_block_device {
            let logical = block_size(file, libc::BLKSSZGET)?.max(SECTOR);
            let physical = block_size(file, libc::BLKPBSZGET).unwrap_or(logical).max(logical);
            (logical, physical, discard_granularity(metadata.rdev()).unwrap_or(logical).max(logical))
        } else {
            (SECTOR, SECTOR, preferred)
        };
        let alignment = match direct {
            false => Some((1, 1)),
            true => direct_alignment(file, is_block_device.then_some(logical))?,
        };
        Ok(alignment.map(|(memory_alignment, offset_alignment)| Self {
            is_block_device,
            logical_block_size: logical,
            physical_block_size: physical.max(offset_alignment),
            offset_alignment,
            memory_alignment,
            discard_granularity,
        }))
    }

    /// What a disk's size must be a multiple of.
    pub fn size_multiple(&self) -> u32 {
        SECTOR.max(self.offset_alignment)
    }
}

/// The current size of a regular file or block device, in bytes.
pub(crate) fn size_of(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Ok(metadata.len());
    }
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) } {
        0 => Ok(size),
        _ => Err(io::Error::last_os_error()),
    }
}

fn block_size(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: both requests write one int.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut size) } {
        0 => Ok(u32::try_from(size).unwrap_or(SECTOR)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From sysfs; a partition has no queue of its own but its disk's.
fn discard_granularity(device: u64) -> Option<u32> {
    let base = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = fs::read_to_string(format!("{base}/{queue}/discard_granularity")).ok()?;
        text.trim().parse().ok().filter(|bytes| *bytes > 0)
    })
}

/// (memory, offset) alignment of direct I/O, `None` when there is no direct I/O.
fn direct_alignment(file: &File, logical: Option<u32>) -> io::Result<Option<(u32, u32)>> {
    // SAFETY: `statx` is plain old data.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; one struct statx is written.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    if result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0 {
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        let possible = memory.is_power_of_two() && offset.is_power_of_two();
        return Ok(possible.then(|| (memory, offset.max(SECTOR))));
    }
    // Before Linux 6.1, or a file system that does not say.
    if let Some(logical) = logical {
        return Ok(Some((logical, logical)));
    }
    for alignment in [SECTOR, 4096] {
        if try_direct_read(file, alignment)? {
            return Ok(Some((alignment.max(SECTOR), alignment)));
        }
    }
    Ok(None)
}

/// Whether a direct read of `length` bytes to an address aligned to `length` works.
fn try_direct_read(file: &File, length: u32) -> io::Result<bool> {
    let length = length as usize;
    let mut memory = vec![0_u8; length * 3];
    let address = memory.as_mut_ptr();
    // An odd multiple of `length`, so that a coarser requirement shows.
    let mut skip = address.align_offset(length * 2) + length;
    if skip + length > memory.len() {
        skip -= length * 2;
    }
    let target = &mut memory[skip..skip + length];
    // SAFETY: the slice is valid for `length` bytes.
    let result = unsafe { libc::pread(file.as_raw_fd(), target.as_mut_ptr().cast(), length, 0) };
    if result >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(false) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_512_byte_blocks_wherever_it_lies() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1024).unwrap();
        let geometry = Geometry::probe(&file, false).unwrap().unwrap();
        assert_eq!((geometry.logical_block_size, geometry.offset_alignment), (512, 1));
        assert_eq!(geometry.size_multiple(), 512);
        assert_eq!(size_of(&file).unwrap(), 1024);
    }

    #[test]
    fn a_direct_read_can_be_tried_on_any_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!(try_direct_read(&file, 512).unwrap());
        assert!(try_direct_read(&file, 4096).unwrap());
    }
}
