//! What an engine is asked, and what it answers.

use super::memory::Buffer;
use crate::errno::Errno;

/// What to do to a disk. Offsets and lengths in bytes, of any value.
#[derive(Debug, Clone)]
pub enum Operation {
    /// Fill the buffers from `offset` on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        buffers: Vec<Buffer>,
    },
    /// Store the buffers from `offset` on.
    Write {
        /// Where on the disk.
        offset: u64,
        /// What.
        buffers: Vec<Buffer>,
    },
    /// Make all completed writes durable. Once it has failed, without direct I/O, it fails for good:
    /// nobody knows what the page cache has lost.
    Flush,
    /// The range's content is not needed any more; it reads as anything afterwards.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
        /// Whether the range may be given back to the host.
        unmap: bool,
    },
    /// Tell what lies at `offset`, and how far: the answer is an [`Extent`].
    Extent {
        /// Where on the disk.
        offset: u64,
        /// Memory of one [`Extent`].
        answer: Buffer,
    },
}

/// What a stretch of a disk is, as far as the host's metadata tells. It holds for the moment of the question: what is
/// written meanwhile may or may not be in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Extent {
    /// A hole: reads as zeroes and takes no room. Data may be zeroes as well.
    pub hole: bool,
    /// Where it ends; beyond the disk where nothing follows.
    pub end: u64,
}

impl Extent {
    /// All data: what is known of a disk whose host does not tell.
    pub const UNKNOWN: Self = Self { hole: false, end: u64::MAX };
}

/// An operation is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// As given to [`Engine::queue`](super::Engine::queue).
    pub token: u64,
    /// Done entirely, or the error; a failed write may have stored a part.
    pub result: Result<(), Errno>,
}
