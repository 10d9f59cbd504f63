//! `blockdev-backup` and `drive-backup`: what they are asked, what is refused, and how one begins.
//!
//! ```text
//!   stage: checked, target open, job created ─▶ attach: the disk saves what the guest changes ─▶ begin: job running
//!                    │                                       │
//!                    └──────────────── undo ◀────────────────┘ any of a transaction is refused
//! ```
//!
//! The target becomes what the disk is when the backup begins. A single backup is a transaction of one, as in QEMU; its
//! words come in the order of QEMU's checks, except that an image is made only when nothing else is to be refused.

use block::{Disk, EngineOptions, MirrorOptions, MirrorSync, OnError};
use protocol::Error;

use super::disks::Disks;
use super::entry::Work;
use super::lifecycle::{Job, JobKind, JobOptions, Order};
use super::mirror::{Source, Sync, Target};
use super::registry::Jobs;
use super::transaction::Action;

/// What becomes of the bitmap that a backup goes by (QEMU's `BitmapSyncMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// Cleared if the backup succeeds.
    OnSuccess,
    /// Left as it was.
    Never,
    /// Cleared of what was copied.
    Always,
}

/// What a client asks for.
#[derive(Debug)]
pub struct BackupRequest {
    /// Name of the job; the disk's if absent.
    pub job_id: Option<String>,
    /// Name of a disk, or of its node.
    pub device: String,
    /// Where to.
    pub target: Target,
    /// What is copied; with [`Sync::None`] only what the guest changes, until the job is cancelled.
    pub sync: Sync,
    /// Bytes per second; 0 is no limit.
    pub speed: i64,
    /// Name of a bitmap; there are none.
    pub bitmap: Option<String>,
    /// What becomes of it.
    pub bitmap_mode: Option<BitmapMode>,
    /// Whether the target is to be compressed; refused.
    pub compress: bool,
    /// What to do when the source cannot be read.
    pub on_source_error: OnError,
    /// What to do when the target cannot be written.
    pub on_target_error: OnError,
    /// Name of the filter that QEMU would insert; nothing here has it.
    pub filter_node_name: Option<String>,
    /// It goes on by itself from pending.
    pub auto_finalize: bool,
    /// It goes by itself once it is over.
    pub auto_dismiss: bool,
}

impl BackupRequest {
    /// QEMU's defaults.
    pub fn new(device: impl Into<String>, target: Target, sync: Sync) -> Self {
        Self {
            job_id: None,
            device: device.into(),
            target,
            sync,
            speed: 0,
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            filter_node_name: None,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }
}

/// A backup that has not begun.
pub(super) struct Staged {
    number: u64,
    pub(super) disk: usize,
    stage: Stage,
}

enum Stage {
    /// The target is open here.
    Open(Box<(Disk, EngineOptions, MirrorOptions)>),
    /// The disk's thread has it.
    Attached,
    /// It was refused, and is closed.
    Closed,
}

impl Jobs {
    /// Begins to make a backup of a disk.
    ///
    /// # Errors
    ///
    /// There is no job, and the disk is as it was. An image that was made for it stays.
    pub fn backup(&mut self, disks: &dyn Disks, request: BackupRequest) -> Result<(), Error> {
        self.transact(disks, &[Action::Backup(request)], false)
    }

    /// All that can be refused without the disk's thread. The job exists, and its target is taken.
    pub(super) fn stage(
        &mut self,
        disks: &dyn Disks,
        request: &BackupRequest,
        group: Option<u64>,
    ) -> Result<Staged, Error> {
        let source = self.source(disks, &request.device)?;
        let node = match &request.target {
            Target::Node(name) => Some(self.named(disks, name)?),
            Target::Image { .. } => None,
        };
        check_bitmap(request)?;
        if node.as_ref() == Some(&source.root.name) {
            return Err(Error::generic("Source and target cannot be the same"));
        }
        if request.compress {
            return Err(Error::generic("Compression is not supported for this drive "));
        }
        if let Some(job) = self.on_disk(source.disk) {
            let (device, kind) = (&source.facts.device, job.kind().name());
            let text = format!("Node '{device}' is busy: block device is in use by block job: {kind}");
            return Err(Error::generic(text));
        }
        if let Some(node) = &node {
            self.check_size(&source, node)?;
        }
        if let Some(filter) = &request.filter_node_name {
            let refused = |error: Error| Error::generic(format!("Could not create node: {}", error.desc));
            self.check_filter(disks, filter).map_err(refused)?;
        }
        self.check_id(request.job_id.as_ref().unwrap_or(&source.facts.device))?;
        if request.speed < 0 {
            return Err(Error::invalid_parameter_value("speed", "a non-negative value"));
        }
        let (target, is_zero) = match node {
            Some(node) => (node, false),
            None => self.image(disks, request, &source)?,
        };
        let lent = self.check_size(&source, &target);
        let lent = lent.and_then(|()| self.nodes.lend(&target, source.disk, JobKind::Backup));
        self.nodes.drop_unnamed(&target);
        let (image, engine) = lent?;
        Ok(self.create_backup(request, source, (image, engine, options(request, is_zero)), group))
    }

    /// A node, or that of a disk.
    fn named(&self, disks: &dyn Disks, name: &str) -> Result<String, Error> {
        let of_disk = (0..disks.count()).find(|disk| disks.facts(*disk).device == name);
        let node = self.nodes.find(name).or_else(|| self.nodes.root(of_disk?));
        let missing = || Error::generic(format!("Cannot find device='{name}' nor node-name='{name}'"));
        node.map(|node| node.name).ok_or_else(missing)
    }

    fn check_size(&mut self, source: &Source, target: &str) -> Result<(), Error> {
        let size = self.check_blocks(source, target)?;
        if size != source.facts.size {
            return Err(Error::generic("Source and target image have different sizes"));
        }
        Ok(())
    }

    fn image(
        &mut self,
        disks: &dyn Disks,
        request: &BackupRequest,
        source: &Source,
    ) -> Result<(String, bool), Error> {
        // What is not saved would be read from the disk as it is now.
        if request.sync == Sync::None && matches!(request.target, Target::Image { existing: false, .. }) {
            return Err(Error::generic("Backing file not supported for file format 'raw'"));
        }
        self.target(disks, &request.target, source)
    }

    fn create_backup(
        &mut self,
        request: &BackupRequest,
        source: Source,
        copy: (Disk, EngineOptions, MirrorOptions),
        group: Option<u64>,
    ) -> Staged {
        let BackupRequest { auto_finalize, auto_dismiss, .. } = *request;
        let id = request.job_id.clone().unwrap_or(source.facts.device);
        let speed = copy.2.speed;
        let options = JobOptions { id, kind: JobKind::Backup, speed, auto_finalize, auto_dismiss };
        let (mut job, steps) = Job::create(options);
        if group.is_some() {
            job.join();
        }
        let work = Work::Mirror { disk: source.disk, mode: copy.2.mode, attached: true };
        let number = self.enlist((job, steps), work, group);
        Staged { number, disk: source.disk, stage: Stage::Open(Box::new(copy)) }
    }

    /// From now on the target is to be what the disk is now.
    pub(super) fn attach(&mut self, disks: &dyn Disks, staged: &mut Staged) -> Result<(), Error> {
        let stage = std::mem::replace(&mut staged.stage, Stage::Closed);
        let Stage::Open(copy) = stage else { return Ok(()) };
        let (image, engine, options) = *copy;
        let attached = disks.start_backup(staged.disk, image, engine, options);
        attached.map_err(|error| Error::generic(error.to_string()))?;
        staged.stage = Stage::Attached;
        Ok(())
    }

    pub(super) fn begin_backup(&mut self, staged: &Staged) {
        let Some(index) = self.position(staged.number) else { return };
        let steps = self.entries[index].job.begin();
        self.publish(staged.number, &steps);
    }

    /// The disk is as it was, and the target a node.
    pub(super) fn undo(&mut self, disks: &dyn Disks, staged: Staged) {
        let Staged { number, disk, stage } = staged;
        match stage {
            Stage::Open(copy) => drop(copy),
            Stage::Attached => match disks.order(disk, Order::Detach)() {
                // Its report is still on its way.
                Ok(()) => self.heard_of[disk] += 1,
                Err(error) => tracing::error!(disk, "A backup does not end: {error}"),
            },
            Stage::Closed => {}
        }
        self.nodes.detached(disk);
        let Some(index) = self.position(number) else { return };
        let steps = self.entries[index].job.discard();
        self.publish(number, &steps);
    }
}

fn check_bitmap(request: &BackupRequest) -> Result<(), Error> {
    let refuse = |text: String| Err(Error::generic(text));
    let by_bitmap = match request.sync {
        Sync::Incremental => Some("incremental"),
        Sync::Bitmap => Some("bitmap"),
        Sync::Full | Sync::Top | Sync::None => None,
    };
    let other_mode = request.bitmap_mode.is_some_and(|mode| mode != BitmapMode::OnSuccess);
    match (&request.bitmap, by_bitmap) {
        (None, Some(sync)) => refuse(format!("must provide a valid bitmap name for '{sync}' sync mode")),
        (Some(_), Some("incremental")) if other_mode => {
            refuse("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'".into())
        }
        (Some(bitmap), _) => refuse(format!("Bitmap '{bitmap}' could not be found")),
        (None, None) if request.bitmap_mode.is_some() => {
            refuse("Cannot specify bitmap sync mode without a bitmap".into())
        }
        (None, None) => Ok(()),
    }
}

fn options(request: &BackupRequest, target_is_zero: bool) -> MirrorOptions {
    MirrorOptions {
        sync: if request.sync == Sync::None { MirrorSync::None } else { MirrorSync::Full },
        speed: u64::try_from(request.speed).unwrap_or(0),
        target_is_zero,
        on_source_error: request.on_source_error,
        on_target_error: request.on_target_error,
        ..MirrorOptions::default()
    }
}
