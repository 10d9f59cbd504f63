//! What jobs need of the VM's disks.

use std::any::Any;
use std::time::Duration;

use block::{Disk, EngineOptions, MirrorOptions, MirrorStatus};

use super::lifecycle::Order;

/// What a disk is to jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFacts {
    /// Its device name.
    pub device: String,
    /// In bytes.
    pub size: u64,
    /// Bytes in a logical block, as the guest knows it.
    pub block_size: u32,
}

/// An order that was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotDone {
    /// It may still be: the disk has not answered in time.
    #[error("{0}")]
    Late(String),
    /// It will not be.
    #[error("{0}")]
    Refused(String),
}

/// Waits, for a bounded time, until an order is carried out. Need not be called.
pub type Answer = Box<dyn FnOnce() -> Result<(), NotDone>>;

/// Keeps disks from taking requests until it is dropped.
pub type Held = Box<dyn Any>;

/// The VM's disks, numbered from 0. Every call returns at once, but for [`Self::start_mirror`], [`Self::start_backup`] and
/// [`Self::hold`], which wait, for a bounded time, until the disk has nothing in flight, and what an [`Answer`] does.
///
/// What a disk has to say of its mirror or its backup comes later, as [`super::lifecycle::Report`]s in the order of its doing; each
/// Switch and each Detach that is carried out is reported, once, also when its answer was waited for.
pub trait Disks {
    /// How many there are.
    fn count(&self) -> usize;
    /// What disk `disk` is.
    fn facts(&self, disk: usize) -> DiskFacts;
    /// Begins to mirror disk `disk` to `target`, which is closed when the mirror ends without a switch; after a switch,
    /// the source is.
    ///
    /// # Errors
    ///
    /// There is no mirror, and the target is closed.
    fn start_mirror(
        &self,
        disk: usize,
        target: Disk,
        engine: EngineOptions,
        options: MirrorOptions,
    ) -> Result<(), NotDone>;
    /// Begins to save to `target` what disk `disk` holds now. The target is closed when the backup ends, which is when it is
    /// detached.
    ///
    /// # Errors
    ///
    /// There is no backup, and the target is closed.
    fn start_backup(
        &self,
        disk: usize,
        target: Disk,
        engine: EngineOptions,
        options: MirrorOptions,
    ) -> Result<(), NotDone>;
    /// Holds these disks: once it is done, they show one moment of the guest.
    ///
    /// # Errors
    ///
    /// One of them has not answered; none is held.
    fn hold(&self, disks: &[usize]) -> Result<Held, NotDone>;
    /// Tells the mirror or the backup of disk `disk` something.
    fn order(&self, disk: usize, order: Order) -> Answer;
    /// How long guest I/O was held for the end of the last mirror of disk `disk`.
    fn held(&self, disk: usize) -> Option<Duration>;
    /// Where the mirror or the backup of disk `disk` stands.
    fn mirror_status(&self, disk: usize) -> Option<MirrorStatus>;
}
