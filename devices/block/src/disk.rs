//! An image, opened, checked and locked.

#![expect(unsafe_code, reason = "fcntl(2) for the flags of an open file has no wrapper in std")]

use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Holder, OpenError, ResizeError};
use crate::geometry::{self, Geometry};
use crate::lock::{self, ImageLock, LockError};
use crate::options::{Cache, DiskOptions, Source};
use crate::signature;

/// How often a lock is asked for that somebody holds.
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

/// An open disk image. Its lock is held, and its file open, for as long as it lives.
pub struct Disk {
    // Fixed.
    name: String,
    geometry: Geometry,
    read_only: bool,
    direct: bool,
    cache: Cache,
    discard: bool,
    // Kept for its Drop, which comes before the file's.
    _lock: Option<ImageLock>,
    file: Arc<File>,
    // Changes with `resize` and `refresh_size` only.
    size: u64,
}

impl Disk {
    /// Opens, checks and locks an image.
    ///
    /// # Errors
    ///
    /// One [`OpenError`] for each way an image can be unfit. Nothing was written, and nothing stays
    /// open or locked.
    pub fn open(options: DiskOptions) -> Result<Self, OpenError> {
        let image = options.source.to_string();
        let DiskOptions { source, format, read_only, direct, cache, discard, lock } = options;
        let file = Arc::new(match source {
            Source::Path(path) => open_path(&path, &image, read_only, direct, lock)?,
            Source::Descriptor { fd, .. } => adopt(File::from(fd), &image, read_only, direct)?,
        });
        let io_error = |source| OpenError::Io { image: image.clone(), source };
        check_kind(file.metadata().map_err(io_error)?.file_type(), &image)?;
        let lock = if lock { Some(take_lock(&file, &image, read_only)?) } else { None };

        // Only now: whoever held the lock until a moment ago may have changed everything.
        let geometry = Geometry::probe(&file, direct)
            .map_err(io_error)?
            .ok_or_else(|| OpenError::NoDirectIo { image: image.clone() })?;
        if format.is_none()
            && let Some(looks_like) = foreign_format(&file).map_err(io_error)?
        {
            return Err(OpenError::UnknownFormat { image, looks_like });
        }
        let size = geometry::size_of(&file).map_err(io_error)?;
        let multiple = geometry.size_multiple();
        if !size.is_multiple_of(u64::from(multiple)) {
            return Err(OpenError::OddSize { image, size, multiple });
        }
        Ok(Self { name: image, geometry, read_only, direct, cache, discard, _lock: lock, file, size })
    }

    /// [`Self::open`], for who starts where another process may just have been killed. What that had under way in io_uring
    /// keeps its files open and locked until it is over, and by then the process may be gone: so a lock of which nobody is
    /// found to be the holder is waited for, up to `patience`.
    ///
    /// # Errors
    ///
    /// Those of [`Self::open`].
    pub fn open_after_another(
        options: impl Fn() -> DiskOptions,
        patience: Duration,
    ) -> Result<Self, OpenError> {
        let began = Instant::now();
        loop {
            match Self::open(options()) {
                // Of a lock there is no telling when it goes but to try.
                Err(OpenError::Locked { holder: Holder::Unknown, .. }) if began.elapsed() < patience => {
                    thread::sleep(BETWEEN_TRIES);
                }
                opened => return opened,
            }
        }
    }

    /// The path it was opened from, or the name given with its descriptor.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Block sizes and alignment.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Whether every write is refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the host's page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// When writes are durable.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// Whether discarded ranges go back to the host.
    pub fn discards(&self) -> bool {
        self.discard
    }

    /// Learns a size that was changed from outside; the part of a last, incomplete sector does not
    /// count. Returns the new size.
    ///
    /// # Errors
    ///
    /// The host cannot say; the old size stays.
    pub fn refresh_size(&mut self) -> Result<u64, ResizeError> {
        let size = geometry::size_of(&self.file)
            .map_err(|source| ResizeError::Io { image: self.name.clone(), source })?;
        self.size = size - size % u64::from(self.geometry.size_multiple());
        Ok(self.size)
    }

    /// Grows or shrinks a regular file to `size` bytes; what lies beyond is lost, what is new reads as
    /// zeroes. For a block device, takes notice that it has been resized to at least `size`. Nothing
    /// may be in flight beyond the new end.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; the old size stays.
    pub fn resize(&mut self, size: u64) -> Result<(), ResizeError> {
        let multiple = self.geometry.size_multiple();
        let image = || self.name.clone();
        if self.read_only {
            return Err(ResizeError::ReadOnly { image: image() });
        }
        if !size.is_multiple_of(u64::from(multiple)) || i64::try_from(size).is_err() {
            return Err(ResizeError::OddSize { size, multiple });
        }
        let io_error = |source| ResizeError::Io { image: image(), source };
        if self.geometry.is_block_device {
            let actual = geometry::size_of(&self.file).map_err(io_error)?;
            if size > actual {
                return Err(ResizeError::Device { image: image(), size: actual, wanted: size });
            }
        } else {
            self.file.set_len(size).map_err(io_error)?;
        }
        self.size = size;
        Ok(())
    }

    /// A disk of `size` bytes whose engine asks no kernel.
    #[cfg(test)]
    pub(crate) fn imagined(size: u64, is_block_device: bool, direct: bool) -> Self {
        let alignment = if direct { 512 } else { 1 };
        Self {
            name: "imagined".to_owned(),
            geometry: Geometry {
                is_block_device,
                logical_block_size: 512,
                physical_block_size: 512,
                offset_alignment: alignment,
                memory_alignment: alignment,
                discard_granularity: 512,
            },
            read_only: false,
            direct,
            cache: Cache::Writeback,
            discard: true,
            _lock: None,
            file: Arc::new(File::open("/dev/null").unwrap()),
            size,
        }
    }

    /// The open file, for engines.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

fn access(read_only: bool) -> &'static str {
    if read_only { "reading" } else { "reading and writing" }
}

/// A block device that is written is claimed: the kernel then gives it to nobody else who asks in the same way, and it is
/// refused here if it is mounted or part of another device. Unlike a lock that holds for all its nodes (open(2), `O_EXCL`).
fn open_path(
    path: &Path,
    image: &str,
    read_only: bool,
    direct: bool,
    alone: bool,
) -> Result<File, OpenError> {
    let name = || image.to_owned();
    let classify = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { image: name() },
        Some(libc::EACCES | libc::EPERM) => {
            OpenError::Permission { image: name(), access: access(read_only) }
        }
        Some(libc::EROFS) => OpenError::ReadOnly { image: name() },
        Some(libc::EINVAL) if direct => OpenError::NoDirectIo { image: name() },
        Some(libc::EBUSY) => OpenError::Locked { image: name(), holder: lock::find_claimant(path) },
        _ => OpenError::Io { image: name(), source },
    };
    // Before opening: to open a pipe or a tape has effects of its own.
    let kind = fs::metadata(path).map_err(classify)?.file_type();
    check_kind(kind, image)?;
    let claim = alone && !read_only && kind.is_block_device();
    let flags =
        libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 } | if claim { libc::O_EXCL } else { 0 };
    let file =
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path).map_err(classify)?;
    set_flags(&file, direct).map_err(classify)?;
    Ok(file)
}

/// Takes over a descriptor that somebody else has opened.
fn adopt(file: File, image: &str, read_only: bool, direct: bool) -> Result<File, OpenError> {
    let name = || image.to_owned();
    let flags = get_flags(&file).map_err(|source| OpenError::Io { image: name(), source })?;
    let serves = match flags & libc::O_ACCMODE {
        libc::O_RDWR => true,
        libc::O_RDONLY => read_only,
        _ => false,
    };
    if !serves || flags & libc::O_PATH != 0 || (flags & libc::O_APPEND != 0 && !read_only) {
        return Err(OpenError::DescriptorMode { image: name(), access: access(read_only) });
    }
    set_flags(&file, direct).map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) if direct => OpenError::NoDirectIo { image: name() },
        _ => OpenError::Io { image: name(), source },
    })?;
    Ok(file)
}

fn get_flags(file: &File) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no pointers.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        flags if flags >= 0 => Ok(flags),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Blocking (io_uring hands EAGAIN to non-blocking files) and direct or not.
fn set_flags(file: &File, direct: bool) -> io::Result<()> {
    let old = get_flags(file)?;
    let new = old & !(libc::O_NONBLOCK | libc::O_DIRECT) | if direct { libc::O_DIRECT } else { 0 };
    // SAFETY: F_SETFL takes no pointers.
    if new != old && unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, new) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn check_kind(kind: FileType, image: &str) -> Result<(), OpenError> {
    let name = match kind {
        k if k.is_file() || k.is_block_device() => return Ok(()),
        k if k.is_dir() => "a directory",
        k if k.is_fifo() => "a pipe",
        k if k.is_socket() => "a socket",
        k if k.is_char_device() => "a character device",
        _ => "something else",
    };
    Err(OpenError::WrongKind { image: image.to_owned(), kind: name })
}

fn take_lock(file: &Arc<File>, image: &str, read_only: bool) -> Result<ImageLock, OpenError> {
    ImageLock::acquire(file, read_only).map_err(|error| match error {
        LockError::Held(holder) => OpenError::Locked { image: image.to_owned(), holder },
        LockError::Unsupported(source) => OpenError::NoLocks { image: image.to_owned(), source },
    })
}

/// Looks at the first bytes, in a way that direct I/O allows too.
fn foreign_format(file: &File) -> io::Result<Option<&'static str>> {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Box::new(Page([0; 4096]));
    let mut filled = 0;
    while filled < signature::PREFIX {
        match file.read_at(&mut page.0[filled..], filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(signature::foreign(&page.0[..filled]))
}

#[cfg(test)]
mod tests;
