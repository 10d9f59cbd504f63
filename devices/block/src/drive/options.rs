//! What a mirror is asked to do, and what it has to say.

use std::time::Duration;

use crate::disk::Disk;
use crate::engine::Engine;
use crate::errno::Errno;

/// When a guest's write is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyMode {
    /// When the source has it; the target gets it later.
    Background,
    /// When both images have it: the target, once equal, stays so. Where the target cannot follow (paused, in error,
    /// a write wider than the bounce memory) the write is copied later, as in the background.
    WriteBlocking,
}

/// What is copied. For a backup, [`MirrorSync::None`] copies only what the guest is about to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorSync {
    /// The whole disk, and what is written meanwhile.
    Full,
    /// Only what is written from now on.
    None,
}

/// What to do about an error of one of the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The mirror has failed.
    Report,
    /// Try again, a little later.
    Ignore,
    /// Stop until [`super::Drive::resume`], which tries again.
    Stop,
    /// Stop when there is no room left, else report.
    Enospc,
}

impl OnError {
    /// What this policy means for `errno`.
    pub fn action(self, errno: Errno) -> MirrorAction {
        match self {
            Self::Ignore => MirrorAction::Ignore,
            Self::Stop => MirrorAction::Stop,
            Self::Enospc if errno.is_no_space() => MirrorAction::Stop,
            Self::Report | Self::Enospc => MirrorAction::Report,
        }
    }
}

/// What was done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorAction {
    /// The mirror has failed; the guest works on, on the source.
    Report,
    /// It tries again soon.
    Ignore,
    /// It tries again when it is resumed.
    Stop,
}

/// How to mirror a disk. [`MirrorOptions::default`] has QEMU's defaults.
#[derive(Debug, Clone)]
pub struct MirrorOptions {
    /// When a guest's write is done.
    pub mode: CopyMode,
    /// Bytes that are dirty or clean as one: a power of two, 512 bytes to 64 MiB.
    pub granularity: u32,
    /// Bytes of memory for copies under way, rounded up to 64 KiB; bounce memory comes on top, as much again.
    pub buf_size: u64,
    /// What is copied.
    pub sync: MirrorSync,
    /// Bytes per second, 0 = as fast as it goes.
    pub speed: u64,
    /// Whether the target may get holes where the source reads as zeroes.
    pub unmap: bool,
    /// The target reads as zeroes everywhere: zeroes need not be copied.
    pub target_is_zero: bool,
    /// On errors when the source is read.
    pub on_source_error: OnError,
    /// On errors when the target is written or flushed.
    pub on_target_error: OnError,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        Self {
            mode: CopyMode::Background,
            granularity: 64 << 10,
            buf_size: 16 << 20,
            sync: MirrorSync::Full,
            speed: 0,
            unmap: true,
            target_is_zero: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
        }
    }
}

/// One of the two images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What the guest works on.
    Source,
    /// The copy.
    Target,
}

/// What could not be done for a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorOperation {
    /// A read of the source.
    Read,
    /// A write to the target, of data or zeroes.
    Write,
    /// A flush of the target.
    Flush,
}

/// Why a mirror does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MirrorError {
    /// Whose error it is.
    pub side: Side,
    /// What could not be done.
    pub operation: MirrorOperation,
    /// Why.
    pub errno: Errno,
    /// Where on the disk, in bytes; 0 for flushes.
    pub offset: u64,
}

/// Something the owner of a mirror should know. Each is told once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorEvent {
    /// For the first time the target has been equal to the source, and durable. Of a backup: it is complete, and durable.
    Ready,
    /// Something failed. An error that is ignored is told once for each time the mirror tries again.
    Error {
        /// What, and why.
        error: MirrorError,
        /// What was done about it.
        action: MirrorAction,
    },
    /// What [`super::Drive::prepare`] began is done.
    Prepared,
    /// The end that [`super::Drive::finish`] began is reached: the images are equal and the target is durable. It stays
    /// so until a guest's request is queued.
    Quiesced,
    /// The end that [`super::Drive::finish`] or [`super::Drive::prepare`] began will not be reached: an error, a pause, or
    /// a write.
    Unfinished,
}

/// Where a mirror stands.
#[derive(Debug, Clone, PartialEq)]
pub struct MirrorStatus {
    /// When a guest's write is done.
    pub mode: CopyMode,
    /// Bytes done and bytes that remain, together; grows when the guest writes.
    pub total: u64,
    /// Bytes done, holes included.
    pub done: u64,
    /// At most how many bytes differ, those under way included.
    pub remaining: u64,
    /// Bytes under way.
    pub in_flight: u64,
    /// Bytes per second, 0 = as fast as it goes.
    pub speed: u64,
    /// [`MirrorEvent::Ready`] has been told.
    pub ready: bool,
    /// Paused by [`super::Drive::pause`].
    pub paused: bool,
    /// Stopped by an error; [`super::Drive::resume`] tries again.
    pub stopped: bool,
    /// Failed for good.
    pub failed: bool,
    /// Images are equal and every write goes to both.
    pub actively_synced: bool,
    /// [`MirrorEvent::Quiesced`] holds.
    pub quiesced: bool,
    /// The last error, while it matters: the mirror is stopped, has failed, or waits to try again.
    pub error: Option<MirrorError>,
    /// Bytes copied per second lately.
    pub copy_rate: Option<u64>,
    /// Bytes per second that became dirty lately.
    pub dirty_rate: Option<u64>,
    /// How long it takes until nothing remains at these rates; `None` for never, or not known yet.
    pub remaining_time: Option<Duration>,
    /// How long the guest would be held by [`super::Drive::finish`] now: what remains, and a flush.
    pub expected_hold: Option<Duration>,
}

/// A mirror was not attached: here is its target.
#[derive(thiserror::Error)]
#[error("Cannot mirror to '{image}'", image = .target.disk().name())]
pub struct AttachError {
    /// As it was given.
    pub target: Engine,
    /// Why.
    #[source]
    pub reason: AttachReason,
}

impl std::fmt::Debug for AttachError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("AttachError").field(&self.reason).finish()
    }
}

/// A mirror cannot be attached. Target and source are as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AttachReason {
    /// Drain first.
    #[error("Requests are in flight")]
    Busy,
    /// One at a time.
    #[error("The disk has a mirror already")]
    Mirrored,
    /// It must hold all of the source.
    #[error("The target has {target} bytes, fewer than the source's {disk}")]
    TooSmall {
        /// The target's size in bytes.
        target: u64,
        /// The source's size in bytes.
        disk: u64,
    },
    /// Opened read-only.
    #[error("The target is read-only")]
    ReadOnly,
    /// Too many chunks to keep in mind.
    #[error("Granularity {granularity} is too fine for a disk of {disk} bytes")]
    TooFine {
        /// What was asked for.
        granularity: u32,
        /// The source's size in bytes.
        disk: u64,
    },
    /// Not a power of two, too small or too large.
    #[error("Granularity {granularity} is not a power of two from 512 to 67108864")]
    Granularity {
        /// What was asked for.
        granularity: u32,
    },
}

/// A mirror does not do what it is told. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MirrorRefusal {
    /// There is none.
    #[error("The disk has no mirror")]
    NotMirrored,
    /// Requests of the guest, or operations of the mirror's own, are in flight.
    #[error("I/O is in flight")]
    Busy,
    /// Paused, or stopped by an error.
    #[error("The mirror is paused")]
    Paused,
    /// Failed for good.
    #[error("The mirror has failed: {operation:?} of the {side:?} at byte {offset}", side = .0.side, operation = .0.operation, offset = .0.offset)]
    Failed(MirrorError),
    /// More remains than the guest should be held for.
    #[error("{remaining} bytes remain to be copied")]
    NotConverged {
        /// How many.
        remaining: u64,
    },
    /// [`MirrorEvent::Ready`] has not been told.
    #[error("The mirror is not ready")]
    NotReady,
    /// It is a backup: it is detached, and not switched to.
    #[error("The disk has a backup, not a mirror")]
    Backup,
    /// Images may differ: finish first.
    #[error("The mirror is not finished")]
    NotQuiesced,
}

/// A bitmap of them has 128 MiB.
const MOST_CHUNKS: u64 = 1 << 30;
const GRANULARITY: std::ops::RangeInclusive<u32> = 512..=64 << 20;

/// What a target lacks, if anything.
pub(super) fn unfit(source: &Disk, target: &Disk, options: &MirrorOptions) -> Option<AttachReason> {
    let MirrorOptions { granularity, .. } = *options;
    if !granularity.is_power_of_two() || !GRANULARITY.contains(&granularity) {
        return Some(AttachReason::Granularity { granularity });
    }
    if target.size() < source.size() {
        return Some(AttachReason::TooSmall { target: target.size(), disk: source.size() });
    }
    if source.size() / u64::from(granularity) > MOST_CHUNKS {
        return Some(AttachReason::TooFine { granularity, disk: source.size() });
    }
    target.is_read_only().then_some(AttachReason::ReadOnly)
}
