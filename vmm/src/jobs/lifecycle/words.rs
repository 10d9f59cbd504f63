//! What goes into the life of a job and what comes out of it.

use block::CopyMode;

use super::super::state::{JobStatus, Verb, VerbRefused};

/// What a client gets to see of a job's kind (QEMU's `JobType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// `drive-mirror`, `blockdev-mirror`.
    Mirror,
    /// `drive-backup`, `blockdev-backup`.
    Backup,
    /// `blockdev-create`. It works on no disk, and so has none of the BLOCK_JOB_ events.
    Create,
}

impl JobKind {
    /// QEMU's spelling.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
        }
    }

    /// Whether `block-job-` commands and events are about it (QEMU's `BlockJob`).
    pub fn is_block_job(self) -> bool {
        self != Self::Create
    }
}

/// Whether the job has run into an error (QEMU's `BlockDeviceIoStatus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No.
    #[default]
    Ok,
    /// Yes, and it stands still.
    Failed,
    /// Yes: a disk is full.
    NoSpace,
}

impl IoStatus {
    /// QEMU's spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// What was done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is tried again later.
    Ignore,
    /// The job fails; a [`Report::Failed`] follows.
    Report,
    /// The job stands still until it is resumed.
    Stop,
}

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// So many bytes per second; 0 is no limit.
    SetSpeed(u64),
    /// Mirrors: when a guest's write is done.
    SetMode(CopyMode),
    /// End. Without `force`, a job that is ready finishes its copy.
    Cancel {
        /// At once, whatever becomes of the copy.
        force: bool,
    },
    /// Make the target the disk.
    Complete,
    /// Go on from pending.
    Finalize,
    /// Forget the job.
    Dismiss,
}

impl Request {
    pub(super) fn verb(self) -> Verb {
        match self {
            Self::Pause => Verb::Pause,
            Self::Resume => Verb::Resume,
            Self::SetSpeed(_) => Verb::SetSpeed,
            Self::SetMode(_) => Verb::Change,
            Self::Cancel { .. } => Verb::Cancel,
            Self::Complete => Verb::Complete,
            Self::Finalize => Verb::Finalize,
            Self::Dismiss => Verb::Dismiss,
        }
    }
}

/// What the disk reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The copy is complete: that of a mirror is kept up, a backup is over.
    Ready,
    /// Something could not be read or written.
    Error {
        /// A read (of the source), or a write (to the target).
        is_read: bool,
        /// What was done about it.
        action: Action,
        /// A disk is full.
        nospace: bool,
    },
    /// It cannot go on.
    Failed(String),
    /// Nothing is in flight, both images are the same, the target's is on its disk; guest I/O is held.
    Quiesced,
    /// The target is the disk now; guest I/O goes on.
    Switched,
    /// The source is the disk, and the job has left it; guest I/O goes on.
    Detached,
    /// All there was to do is done, and it was nothing that a client has to decide on.
    Done,
}

/// What the disk is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Copy nothing for now.
    Pause,
    /// Copy again, also what has failed.
    Resume,
    /// So many bytes per second.
    SetSpeed(u64),
    /// Mirror in this way from now on.
    SetMode(CopyMode),
    /// Hold guest I/O, copy what is left, sync the target; then [`Report::Quiesced`] or [`Report::Failed`].
    Quiesce,
    /// Then [`Report::Switched`].
    Switch,
    /// Then [`Report::Detached`]. Whatever is in flight or held.
    Detach,
}

/// What clients are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// JOB_STATUS_CHANGE.
    Status(JobStatus),
    /// BLOCK_JOB_READY.
    Ready,
    /// BLOCK_JOB_PENDING.
    Pending,
    /// BLOCK_JOB_COMPLETED, with an error if there is one.
    Completed(Option<String>),
    /// BLOCK_JOB_CANCELLED.
    Cancelled,
    /// BLOCK_JOB_ERROR.
    Error {
        /// A read, or a write.
        is_read: bool,
        /// What was done about it.
        action: Action,
    },
}

/// What follows, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// For the disk.
    Order(Order),
    /// For the clients.
    Note(Note),
}

/// A request that is refused, with QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobRefused {
    /// Not in this state.
    #[error(transparent)]
    Verb(#[from] VerbRefused),
    /// A client paused it before.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// No client paused it, nor did an error.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// It would have to copy, and may not.
    #[error("The block job for device '{0}' is currently paused")]
    Paused(String),
    /// It is completing already.
    #[error("The active block job '{0}' cannot be completed")]
    Completing(String),
}
