//! Why a disk could not be opened or resized: one sentence each, with the name of the image.

use std::fmt;
use std::io;

/// Who holds an image, as far as /proc tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// A process, by number and name.
    Process {
        /// Process ID as seen from here.
        pid: u32,
        /// `/proc/PID/comm`.
        name: String,
    },
    /// This process has it open a second time.
    Ourselves,
    /// The host has it mounted.
    Mount {
        /// Where, as /proc/self/mountinfo spells it.
        at: String,
    },
    /// Another block device is made of it.
    Device {
        /// The kernel's name of that.
        name: String,
    },
    /// Somebody whose open files are not visible to us.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, name } => write!(f, "process {pid} ({name})"),
            Self::Ourselves => f.write_str("this very process, a second time"),
            Self::Mount { at } => write!(f, "the host, which has it mounted at {at}"),
            Self::Device { name } => write!(f, "the host, which has made {name} of it"),
            Self::Unknown => f.write_str("another process"),
        }
    }
}

/// A disk image cannot be opened. `image` is its path, or the name given with its descriptor.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing there.
    #[error("Disk image '{image}' does not exist")]
    Missing {
        /// The image.
        image: String,
    },
    /// A directory, a pipe, a terminal …
    #[error("Disk image '{image}' is {kind}, neither a regular file nor a block device")]
    WrongKind {
        /// The image.
        image: String,
        /// With its article: "a directory".
        kind: &'static str,
    },
    /// EACCES, EPERM.
    #[error("No permission to open disk image '{image}' for {access}")]
    Permission {
        /// The image.
        image: String,
        /// "reading" or "reading and writing".
        access: &'static str,
    },
    /// EROFS, or a write-protected block device.
    #[error(
        "Disk image '{image}' cannot be written here (read-only file system or device); attach it read-only"
    )]
    ReadOnly {
        /// The image.
        image: String,
    },
    /// A passed descriptor was opened in a way that does not serve.
    #[error("The descriptor of disk image '{image}' is not open for {access}")]
    DescriptorMode {
        /// The image.
        image: String,
        /// "reading" or "reading and writing".
        access: &'static str,
    },
    /// Somebody else uses the image in a way that excludes ours.
    #[error("Disk image '{image}' is in use by {holder}")]
    Locked {
        /// The image.
        image: String,
        /// Who.
        holder: Holder,
    },
    /// The file system has no locks.
    #[error(
        "Disk image '{image}' cannot be locked on this file system; lock=off opens it without protection"
    )]
    NoLocks {
        /// The image.
        image: String,
        /// What the host said.
        source: io::Error,
    },
    /// Not a whole number of 512-byte sectors.
    #[error("Disk image '{image}' has {size} bytes, not a multiple of {multiple}")]
    OddSize {
        /// The image.
        image: String,
        /// Its size in bytes.
        size: u64,
        /// 512, or what direct I/O needs.
        multiple: u32,
    },
    /// The image begins like one of another format, and the format was not stated.
    #[error(
        "Disk image '{image}' is of unknown format: it begins like {looks_like}; only raw images can be used (format=raw if it is meant to be raw)"
    )]
    UnknownFormat {
        /// The image.
        image: String,
        /// Name of the format it resembles.
        looks_like: &'static str,
    },
    /// O_DIRECT is not to be had.
    #[error("Disk image '{image}' does not allow direct I/O on this file system; use direct=off")]
    NoDirectIo {
        /// The image.
        image: String,
    },
    /// Anything else the host says.
    #[error("Cannot open disk image '{image}'")]
    Io {
        /// The image.
        image: String,
        /// What the host said.
        source: io::Error,
    },
}

/// A disk's size cannot be changed, or not be learnt anew.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// Opened read-only.
    #[error("Disk image '{image}' is attached read-only")]
    ReadOnly {
        /// The image.
        image: String,
    },
    /// Not a whole number of sectors, or too large for any file.
    #[error("Disk size {size} is not a multiple of {multiple} bytes, or too large")]
    OddSize {
        /// The wanted size in bytes.
        size: u64,
        /// 512, or what direct I/O needs.
        multiple: u32,
    },
    /// Block devices are resized by whoever made them.
    #[error("Block device '{image}' has {size} bytes and cannot be made {wanted} bytes large from here")]
    Device {
        /// The image.
        image: String,
        /// Its size in bytes.
        size: u64,
        /// The wanted size in bytes.
        wanted: u64,
    },
    /// The host refused.
    #[error("Cannot change or read the size of disk image '{image}'")]
    Io {
        /// The image.
        image: String,
        /// What the host said.
        source: io::Error,
    },
}
