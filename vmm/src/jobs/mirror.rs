//! `blockdev-mirror` and `drive-mirror`: what they are asked, what is refused, and how one begins.
//!
//! Checks come in QEMU's order, with its words. One comes late, as there: images of different size fail the job, not the
//! command.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use block::{CopyMode, MirrorOptions, MirrorSync, OnError};
use protocol::Error;

use super::create::{self, Preallocation};
use super::disks::{DiskFacts, Disks};
use super::entry::Work;
use super::lifecycle::{JobKind, JobOptions};
use super::nodes::{NodeInfo, NodeSource, NodeSpec, is_well_formed};
use super::registry::Jobs;

/// What is copied (QEMU's `MirrorSyncMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// All of the disk.
    Full,
    /// All of its top image: of images without a backing file, all.
    Top,
    /// What is written from now on.
    None,
    /// By a bitmap; refused.
    Incremental,
    /// By a bitmap; refused.
    Bitmap,
}

/// Where the copy goes.
#[derive(Debug)]
pub enum Target {
    /// To a node.
    Node(String),
    /// To an image that gets a node for as long as it is used.
    Image {
        /// The image.
        source: NodeSource,
        /// Its format; that of the disk if absent.
        format: Option<String>,
        /// The node's name.
        node_name: Option<String>,
        /// It is there already.
        existing: bool,
    },
}

/// What a client asks for.
#[derive(Debug)]
pub struct MirrorRequest {
    /// Name of the job; the disk's if absent.
    pub job_id: Option<String>,
    /// Name of a disk, or of its node.
    pub device: String,
    /// Where to.
    pub target: Target,
    /// Name of the node that the target is to replace: only the disk's own can be.
    pub replaces: Option<String>,
    /// What is copied.
    pub sync: Sync,
    /// Bytes per second; 0 is no limit.
    pub speed: i64,
    /// Bytes that are dirty or clean as one; 0 for the default.
    pub granularity: u32,
    /// Bytes of memory; 0 for the default.
    pub buf_size: i64,
    /// What to do when the source cannot be read.
    pub on_source_error: OnError,
    /// What to do when the target cannot be written.
    pub on_target_error: OnError,
    /// Whether the target may get holes.
    pub unmap: bool,
    /// When a guest's write is done.
    pub mode: CopyMode,
    /// Name of the filter that QEMU would insert; nothing here has it.
    pub filter_node_name: Option<String>,
    /// It goes on by itself from pending.
    pub auto_finalize: bool,
    /// It goes by itself once it is over.
    pub auto_dismiss: bool,
}

impl MirrorRequest {
    /// QEMU's defaults.
    pub fn new(device: impl Into<String>, target: Target, sync: Sync) -> Self {
        Self {
            job_id: None,
            device: device.into(),
            target,
            replaces: None,
            sync,
            speed: 0,
            granularity: 0,
            buf_size: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: true,
            mode: CopyMode::Background,
            filter_node_name: None,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }
}

/// What has been found out about the source.
pub(super) struct Source {
    pub(super) disk: usize,
    pub(super) facts: DiskFacts,
    pub(super) root: NodeInfo,
}

impl Jobs {
    /// Begins to mirror a disk.
    ///
    /// # Errors
    ///
    /// There is no job, and the disk is as it was. An image that was made for it stays.
    pub fn mirror(&mut self, disks: &dyn Disks, request: &MirrorRequest) -> Result<(), Error> {
        let source = self.source(disks, &request.device)?;
        if self.on_disk(source.disk).is_some() {
            return Err(Error::generic("Need a root block node"));
        }
        let node_target = matches!(request.target, Target::Node(_));
        if !node_target {
            self.check(disks, request, &source)?;
        }
        let (target, is_zero) = self.target(disks, &request.target, &source)?;
        let begun = if node_target { self.check(disks, request, &source) } else { Ok(()) };
        let begun = begun.and_then(|()| self.begin(disks, request, &source, &target, is_zero));
        self.nodes.drop_unnamed(&target);
        begun
    }

    /// The disk of that name, or the one that works on the node of that name.
    pub(super) fn source(&self, disks: &dyn Disks, device: &str) -> Result<Source, Error> {
        let found = (0..disks.count()).find_map(|disk| {
            let (facts, root) = (disks.facts(disk), self.nodes.root(disk)?);
            (facts.device == device || root.name == device).then_some(Source { disk, facts, root })
        });
        match found {
            Some(source) => Ok(source),
            None if self.nodes.find(device).is_some() => {
                Err(Error::generic(format!("Node '{device}' is not the node of a disk of the guest")))
            }
            None => {
                let text = format!("Cannot find device='{device}' nor node-name='{device}'");
                Err(Error::generic(text))
            }
        }
    }

    /// What can be refused without a look at the target.
    fn check(&self, disks: &dyn Disks, request: &MirrorRequest, source: &Source) -> Result<(), Error> {
        let granularity = request.granularity;
        if granularity != 0 && !(512..=64 << 20).contains(&granularity) {
            return Err(Error::invalid_parameter_value("granularity", "a value in range [512B, 64MB]"));
        }
        if granularity != 0 && !granularity.is_power_of_two() {
            return Err(Error::invalid_parameter_value("granularity", "a power of 2"));
        }
        if let Some(replaces) = &request.replaces {
            self.check_replaces(replaces, source)?;
        }
        let unsupported = match request.sync {
            Sync::Incremental => Some("incremental"),
            Sync::Bitmap => Some("bitmap"),
            Sync::Full | Sync::Top | Sync::None => None,
        };
        if let Some(sync) = unsupported {
            return Err(Error::generic(format!("Sync mode '{sync}' not supported")));
        }
        if request.buf_size < 0 {
            return Err(Error::generic("Invalid parameter 'buf-size'"));
        }
        if let Target::Node(name) = &request.target
            && *name == source.root.name
        {
            return Err(Error::generic("Can't mirror node into itself"));
        }
        if let Some(filter) = &request.filter_node_name {
            self.check_filter(disks, filter)?;
        }
        self.check_id(request.job_id.as_ref().unwrap_or(&source.facts.device))?;
        if request.speed < 0 {
            return Err(Error::invalid_parameter_value("speed", "a non-negative value"));
        }
        Ok(())
    }

    fn check_replaces(&self, replaces: &str, source: &Source) -> Result<(), Error> {
        if self.nodes.find(replaces).is_none() {
            return Err(Error::generic(format!("Failed to find node with node-name='{replaces}'")));
        }
        if replaces != source.root.name {
            let device = &source.facts.device;
            return Err(Error::generic(format!(
                "Cannot replace '{replaces}' by a node mirrored from '{device}', because it cannot be guaranteed that \
                 doing so would not lead to an abrupt change of visible data"
            )));
        }
        Ok(())
    }

    pub(super) fn check_filter(&self, disks: &dyn Disks, name: &str) -> Result<(), Error> {
        if !is_well_formed(name) {
            return Err(Error::generic(format!("Invalid node-name: '{name}'")));
        }
        let taken = self.nodes.find(name).is_some() || devices(disks).iter().any(|device| device == name);
        if taken { Err(Error::generic(format!("Duplicate nodes with node-name='{name}'"))) } else { Ok(()) }
    }

    /// The target's node, and whether it is known to be all zeroes.
    pub(super) fn target(
        &mut self,
        disks: &dyn Disks,
        target: &Target,
        from: &Source,
    ) -> Result<(String, bool), Error> {
        let (source, format, node_name, existing) = match target {
            Target::Node(name) if self.nodes.find(name).is_none() => {
                let text = format!("Cannot find device='{name}' nor node-name='{name}'");
                return Err(Error::generic(text));
            }
            Target::Node(name) => return Ok((name.clone(), false)),
            Target::Image { source, format, node_name, existing } => (source, format, node_name, *existing),
        };
        if let Some(format) = format.as_ref().filter(|format| *format != "raw") {
            let what = if existing { "driver" } else { "file format" };
            return Err(Error::generic(format!("Unknown {what} '{format}'")));
        }
        let mut makes_zeroes = false;
        let source = match source {
            NodeSource::Path(path) => {
                if !existing {
                    makes_zeroes = !is_block_device(path);
                    make(path, from.facts.size, makes_zeroes)?;
                }
                NodeSource::Path(path.clone())
            }
            NodeSource::Descriptor { fd, name } => {
                let fd = fd.try_clone().map_err(|error| Error::generic(error.to_string()))?;
                NodeSource::Descriptor { fd, name: name.clone() }
            }
        };
        let NodeInfo { direct, cache, .. } = from.root;
        // As without a format QEMU would look at the image, and this is one of the few safe looks.
        let stated = format.is_some() || makes_zeroes;
        let spec = NodeSpec { direct, cache, stated, ..NodeSpec::new(source) };
        let name = self.nodes.add(node_name.clone(), false, spec, &devices(disks))?;
        Ok((name, makes_zeroes))
    }

    /// Returns the target's size in bytes.
    pub(super) fn check_blocks(&mut self, source: &Source, target: &str) -> Result<u64, Error> {
        let (size, block_size) = self.nodes.check_target(target)?;
        if block_size > source.facts.block_size {
            return Err(Error::generic(format!(
                "The target's blocks of {block_size} bytes are larger than the disk's of {}",
                source.facts.block_size
            )));
        }
        Ok(size)
    }

    fn begin(
        &mut self,
        disks: &dyn Disks,
        request: &MirrorRequest,
        source: &Source,
        target: &str,
        is_zero: bool,
    ) -> Result<(), Error> {
        let size = self.check_blocks(source, target)?;
        let (id, mode) =
            (request.job_id.clone().unwrap_or_else(|| source.facts.device.clone()), request.mode);
        let same = size == source.facts.size;
        if same {
            let (image, engine) = self.nodes.lend(target, source.disk, JobKind::Mirror)?;
            if let Err(error) = disks.start_mirror(source.disk, image, engine, options(request, is_zero)) {
                self.nodes.detached(source.disk);
                return Err(Error::generic(error.to_string()));
            }
        }
        let speed = u64::try_from(request.speed).unwrap_or(0);
        let MirrorRequest { auto_finalize, auto_dismiss, .. } = *request;
        let job = JobOptions { id, kind: JobKind::Mirror, speed, auto_finalize, auto_dismiss };
        let number = self.start(job, Work::Mirror { disk: source.disk, mode, attached: same });
        if !same {
            self.fail_later(number, "Source and target image have different sizes");
        }
        Ok(())
    }
}

/// Names that no node may have.
pub fn devices(disks: &dyn Disks) -> Vec<String> {
    (0..disks.count()).map(|disk| disks.facts(disk).device).collect()
}

fn options(request: &MirrorRequest, target_is_zero: bool) -> MirrorOptions {
    let default = MirrorOptions::default();
    let or = |given: u64, default: u64| if given == 0 { default } else { given };
    MirrorOptions {
        mode: request.mode,
        granularity: if request.granularity == 0 { default.granularity } else { request.granularity },
        buf_size: or(u64::try_from(request.buf_size).unwrap_or(0), default.buf_size),
        sync: if request.sync == Sync::None { MirrorSync::None } else { MirrorSync::Full },
        speed: u64::try_from(request.speed).unwrap_or(0),
        unmap: request.unmap,
        target_is_zero,
        on_source_error: request.on_source_error,
        on_target_error: request.on_target_error,
    }
}

fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Makes the target's file; a block device is there.
fn make(path: &Path, size: u64, is_file: bool) -> Result<(), Error> {
    if !is_file {
        return Ok(());
    }
    create::create(path, size, Preallocation::Off, &AtomicBool::new(false)).map_err(Error::generic)
}
