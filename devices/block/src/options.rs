//! What a user may ask of a disk: plain data, no file is opened here.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Where the image is.
#[derive(Debug)]
pub enum Source {
    /// A regular file or a block device.
    Path(PathBuf),
    /// Already open, handed over by whoever had the right to open it.
    Descriptor {
        /// Open for reading, and for writing unless the disk is read-only.
        fd: OwnedFd,
        /// What messages call it.
        name: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Descriptor { name, .. } => f.write_str(name),
        }
    }
}

/// What the bytes of an image mean. Always stated, never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte *n* of the image is byte *n* of the disk.
    Raw,
}

/// When a write is durable (QEMU's `cache=` has the same names).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// After the next flush. What a disk with a volatile cache does.
    #[default]
    Writeback,
    /// Before it is reported as done.
    Writethrough,
    /// Never promised: flushes do nothing. For disks that are thrown away.
    Unsafe,
}

/// How to open a disk.
#[derive(Debug)]
pub struct DiskOptions {
    /// The image.
    pub source: Source,
    /// `None` = not stated: a raw image, refused when it begins like another format.
    pub format: Option<Format>,
    /// Nothing is ever written; other readers are welcome.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Durability of writes.
    pub cache: Cache,
    /// Whether discarded ranges are given back to the host.
    pub discard: bool,
    /// Whether to take QEMU-compatible image locks.
    pub lock: bool,
}

impl DiskOptions {
    /// A writable, locked, cached (writeback) disk that passes discards on.
    pub fn new(source: Source) -> Self {
        Self {
            source,
            format: None,
            read_only: false,
            direct: false,
            cache: Cache::default(),
            discard: true,
            lock: true,
        }
    }

    /// The same for a path.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self::new(Source::Path(path.into()))
    }
}
