//! A job beside its life: what it works on, how far it is, and what clients get to see of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use block::{CopyMode, MirrorStatus};

use super::disks::{Answer, Disks};
use super::lifecycle::{Job, JobKind, Note};
use super::state::JobStatus;
use crate::monitor::{BlockJobFacts, Event};

/// What a job works on.
pub(super) enum Work {
    /// Disk `disk` is mirrored, or a backup is made of it.
    Mirror {
        disk: usize,
        mode: CopyMode,
        /// The disk's thread has the target.
        attached: bool,
    },
    /// A thread makes an image.
    Create(Maker),
}

/// The thread that makes an image. Dropping it ends it.
pub(super) struct Maker {
    pub(super) stop: Arc<AtomicBool>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that makes an image has panicked");
        }
    }
}

/// A job, and what it is about.
pub(super) struct Entry {
    pub(super) number: u64,
    /// The transaction whose jobs succeed together or not at all.
    pub(super) group: Option<u64>,
    pub(super) job: Job,
    pub(super) work: Work,
    /// Bytes done, and bytes in all.
    pub(super) progress: (u64, u64),
    pub(super) actively_synced: bool,
    /// The disk copies, or has not yet seen that it should not.
    pub(super) copying: bool,
    /// While its disk can tell.
    estimates: Estimates,
    /// The disk has been told to end its mirror.
    pub(super) leaving: Option<Answer>,
}

/// What `query-jobs` and `query-block-jobs` tell of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// Its kind.
    pub kind: JobKind,
    /// Where it is.
    pub status: JobStatus,
    /// Bytes done.
    pub offset: u64,
    /// Bytes in all, as far as is known.
    pub len: u64,
    /// Bytes per second; 0 is no limit.
    pub speed: u64,
    /// It works, or what it had under way when it was paused still is.
    pub busy: bool,
    /// It stands still.
    pub paused: bool,
    /// It has reached its goal and keeps it up.
    pub ready: bool,
    /// Whether an error has stopped it (QEMU's spelling).
    pub io_status: &'static str,
    /// It goes on by itself from pending.
    pub auto_finalize: bool,
    /// It goes by itself once it is over.
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// Mirrors: both images are the same, and each write goes to both.
    pub actively_synced: Option<bool>,
    /// What is to be expected.
    pub estimates: Estimates,
}

/// What a job that copies a disk expects at the rates of the last seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Estimates {
    /// How long it takes until nothing remains to be copied; not known while it stands still, nor when the guest writes
    /// faster than it copies.
    pub remaining: Option<Duration>,
    /// Mirrors: how long the guest would be held for a pivot now.
    pub hold: Option<Duration>,
}

impl Entry {
    pub(super) fn new(number: u64, group: Option<u64>, job: Job, work: Work) -> Self {
        let (progress, actively_synced, copying, estimates, leaving) =
            ((0, 0), false, false, Estimates::default(), None);
        Self { number, group, job, work, progress, actively_synced, copying, estimates, leaving }
    }

    /// Learns how far it is, as long as its disk can tell.
    pub(super) fn refresh(&mut self, disks: &dyn Disks) {
        let Work::Mirror { disk, attached: true, .. } = self.work else { return };
        if let Some(status) = disks.mirror_status(disk) {
            let MirrorStatus { done, total, actively_synced, in_flight, paused, stopped, .. } = status;
            let MirrorStatus { remaining_time, expected_hold, .. } = status;
            self.progress = (done, total);
            self.actively_synced = actively_synced;
            self.copying = in_flight > 0 || !(paused || stopped);
            self.estimates = Estimates { remaining: remaining_time, hold: expected_hold };
        }
    }

    pub(super) fn info(&self) -> JobInfo {
        let Self { job, progress: (offset, len), .. } = self;
        let (auto_finalize, auto_dismiss) = job.automatic();
        JobInfo {
            id: job.id().to_owned(),
            kind: job.kind(),
            status: job.status(),
            offset: *offset,
            len: *len,
            speed: job.speed(),
            busy: job.is_busy() || job.status().is_paused() && self.copying,
            paused: job.status().is_paused(),
            ready: matches!(job.status(), JobStatus::Ready | JobStatus::Standby),
            io_status: job.io_status().name(),
            auto_finalize,
            auto_dismiss,
            error: job.error().map(str::to_owned),
            actively_synced: (job.kind() == JobKind::Mirror).then_some(self.actively_synced),
            estimates: self.estimates(),
        }
    }

    fn estimates(&self) -> Estimates {
        let Estimates { remaining, hold } = self.estimates;
        match (&self.work, self.job.kind()) {
            (Work::Mirror { attached: true, .. }, kind) if self.job.is_busy() => {
                Estimates { remaining, hold: hold.filter(|_| kind == JobKind::Mirror) }
            }
            _ => Estimates::default(),
        }
    }

    fn facts(&self) -> BlockJobFacts {
        BlockJobFacts {
            kind: self.job.kind().name(),
            device: self.job.id().to_owned(),
            len: self.progress.1,
            offset: self.progress.0,
            speed: self.job.speed(),
        }
    }

    pub(super) fn event(&self, note: &Note) -> Option<Event> {
        let id = || self.job.id().to_owned();
        Some(match note {
            Note::Status(status) => Event::JobStatusChange { id: id(), status: *status },
            _ if !self.job.kind().is_block_job() => return None,
            Note::Ready => Event::BlockJobReady(self.facts()),
            Note::Pending => Event::BlockJobPending { kind: self.job.kind().name(), id: id() },
            Note::Completed(error) => Event::BlockJobCompleted { facts: self.facts(), error: error.clone() },
            Note::Cancelled => Event::BlockJobCancelled(self.facts()),
            Note::Error { is_read, action } => {
                Event::BlockJobError { device: id(), is_read: *is_read, action: *action }
            }
        })
    }
}
