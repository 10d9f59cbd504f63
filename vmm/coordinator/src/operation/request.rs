//! What is asked of an operation, and what can be refused before anything has changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::freeze::Freezer;
use super::report::Observer;
use super::steps::Runner;
use super::vm::{DiskNow, VmSession};
use super::{Connection, OperationError};
use crate::SessionError;
use crate::chain;
use crate::device::{self, Keeps};
use crate::durable::{self, DurableError};
use crate::journal::{
    self, AGENT, DiskPlan, ImageId, Journal, MONITOR, OperationKind, OperationLog, Plan, PlanFlags, Protocol,
    new_operation_id,
};
use crate::state_dir::StateDir;

/// When a guest's write is done while its disk is mirrored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// When the source has it.
    #[default]
    Background,
    /// When both have it.
    WriteBlocking,
}

impl CopyMode {
    /// QEMU's spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}

/// How an operation is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How disks are mirrored.
    pub copy_mode: CopyMode,
    /// The pivot waits until the VM expects to hold the guest no longer than this.
    pub max_hold: Option<Duration>,
    /// After which a frozen guest thaws itself; at least a millisecond.
    pub lease: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { copy_mode: CopyMode::Background, max_hold: None, lease: Duration::from_secs(30) }
    }
}

impl Settings {
    fn details(self) -> Map<String, Value> {
        let mut details = Map::new();
        details.insert("copy-mode".into(), self.copy_mode.name().into());
        details.insert("lease-ms".into(), ms(self.lease).into());
        if let Some(hold) = self.max_hold {
            details.insert("max-hold-us".into(), u64::try_from(hold.as_micros()).unwrap_or(u64::MAX).into());
        }
        details
    }

    /// As they were when the operation began.
    pub(super) fn of(operation: &OperationLog) -> Self {
        let number = |name| operation.detail(name).and_then(Value::as_u64);
        let default = Self::default();
        let write_blocking = Some(CopyMode::WriteBlocking.name());
        Self {
            copy_mode: match operation.detail("copy-mode").and_then(Value::as_str) == write_blocking {
                true => CopyMode::WriteBlocking,
                false => CopyMode::Background,
            },
            max_hold: number("max-hold-us").map(Duration::from_micros),
            lease: number("lease-ms").map_or(default.lease, Duration::from_millis),
        }
    }
}

pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What is asked of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which kind.
    pub kind: OperationKind,
    /// Who decides.
    pub protocol: Protocol,
    /// Disks by id, and the image that each is copied to. A target that is there has to be a block device, unless
    /// [`reuse`](Self::reuse).
    pub disks: Vec<(String, PathBuf)>,
    /// The guest's filesystems are frozen for it.
    pub freeze: bool,
    /// The VM is stopped for it.
    pub pause: bool,
    /// The source is stamped as superseded: nobody boots it by mistake.
    pub retire_source: bool,
    /// A target may be there, whatever it holds.
    pub reuse: bool,
    /// How.
    pub settings: Settings,
}

impl Request {
    fn new<D: Into<String>, T: Into<PathBuf>>(
        kind: OperationKind,
        disks: impl IntoIterator<Item = (D, T)>,
    ) -> Self {
        Self {
            kind,
            protocol: Protocol::A,
            disks: disks.into_iter().map(|(disk, target)| (disk.into(), target.into())).collect(),
            freeze: false,
            pause: false,
            retire_source: kind == OperationKind::Pivot,
            reuse: false,
            settings: Settings::default(),
        }
    }

    /// The targets become the disks, all or none.
    pub fn pivot<D: Into<String>, T: Into<PathBuf>>(disks: impl IntoIterator<Item = (D, T)>) -> Self {
        Self::new(OperationKind::Pivot, disks)
    }

    /// The targets become copies of the disks as of the end of the operation.
    pub fn mirror<D: Into<String>, T: Into<PathBuf>>(disks: impl IntoIterator<Item = (D, T)>) -> Self {
        Self::new(OperationKind::Mirror, disks)
    }

    /// The targets become copies of the disks as of the beginning of the copy.
    pub fn backup<D: Into<String>, T: Into<PathBuf>>(disks: impl IntoIterator<Item = (D, T)>) -> Self {
        Self::new(OperationKind::Backup, disks)
    }
}

type Begun<'a> = (Runner<'a>, Plan, Map<String, Value>);

/// Looks at everything, and changes nothing but that this is the VM's coordinator from now on.
pub(super) fn begin<'a>(
    state: &StateDir,
    connection: &Connection,
    request: &Request,
    observer: &'a mut dyn Observer,
) -> Result<Begun<'a>, OperationError> {
    let refuse = |text: String| Err(OperationError::Refused(text));
    if request.disks.is_empty() {
        return refuse("An operation needs a disk".to_owned());
    }
    if request.freeze && connection.agent.is_none() {
        return refuse("A guest without an agent cannot be frozen".to_owned());
    }
    if request.freeze && ms(request.settings.lease) == 0 {
        return refuse("A guest is frozen for a time: its lease is at least 1 ms".to_owned());
    }
    if request.kind == OperationKind::Mirror && request.disks.len() > 1 && !request.freeze && !request.pause {
        let text = "Mirrors of several disks end one after the other: only with --pause or --freeze are they of one moment";
        return refuse(text.to_owned());
    }
    // Looked at again below, when nobody else can begin one: its targets are in the way of everything else.
    if let Some(open) = journal::operations(state)?.last().filter(|last| last.is_open()) {
        return refuse(is_open(state, open));
    }
    let mut vm = VmSession::connect(&connection.monitor)?;
    let protocol = protocol_of(&mut vm, request)?;
    let now = vm.disks()?;
    let disks = plan_all(&now, request).map_err(OperationError::Refused)?;
    let journal = Journal::open(state)?;
    if let Some(open) = journal.open_operation() {
        return refuse(is_open(state, open));
    }
    try_targets(&mut vm, &now, &disks)?;
    if let Some(agent) = connection.agent.as_deref().filter(|_| request.freeze) {
        check_guest(&mut vm, agent, state.name())?;
    }
    let id =
        new_operation_id().map_err(|error| OperationError::Refused(format!("No random numbers: {error}")))?;
    let is_a = request.kind == OperationKind::Pivot && protocol == Protocol::A;
    let plan = Plan {
        kind: request.kind,
        protocol,
        disks,
        witness: is_a.then(|| state.witness(id)),
        flags: PlanFlags {
            freeze: request.freeze,
            pause: request.pause,
            retire_source: request.retire_source && request.kind == OperationKind::Pivot,
        },
    };
    let mut runner = Runner::with_session(journal, id, connection, vm, request.settings, observer);
    if request.kind == OperationKind::Pivot {
        runner.warnings = plan.disks.iter().flat_map(|disk| doubts(&now, disk)).collect();
    }
    let mut details = request.settings.details();
    if connection.foreign {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        details.insert(MONITOR.into(), absolute(&connection.monitor).to_string_lossy().into());
        if let Some(agent) = &connection.agent {
            details.insert(AGENT.into(), absolute(agent).to_string_lossy().into());
        }
    }
    Ok((runner, plan, details))
}

/// A guest that cannot be frozen now will not be when all is copied.
fn check_guest(vm: &mut VmSession, agent: &Path, name: &str) -> Result<(), OperationError> {
    let status = vm.status()?;
    if status != "running" {
        let way = if matches!(status.as_str(), "paused" | "prelaunch" | "suspended" | "io-error") {
            format!("; `tarn resume {name}` lets it go on")
        } else {
            String::new()
        };
        return Err(OperationError::Refused(format!(
            "VM {name} is {status}: its guest cannot be frozen{way}"
        )));
    }
    if Freezer::connect(agent)?.is_frozen()? {
        let text = format!(
            "The guest's filesystems are frozen already, for somebody else; `tarn thaw {name}` ends that"
        );
        return Err(OperationError::Refused(text));
    }
    Ok(())
}

/// Who decides. A VM that knows no operations cannot; where there is nothing to decide it makes no difference.
fn protocol_of(vm: &mut VmSession, request: &Request) -> Result<Protocol, OperationError> {
    if request.protocol == Protocol::B || vm.knows("tarn-pivot")? {
        return Ok(request.protocol);
    }
    if request.kind == OperationKind::Pivot {
        let text = "The VM cannot decide a pivot by itself, as those of Tarn can: it has no command tarn-pivot. \
                    `--protocol b` moves its disks";
        return Err(OperationError::Refused(text.to_owned()));
    }
    Ok(Protocol::B)
}

fn is_open(state: &StateDir, open: &OperationLog) -> String {
    format!(
        "Operation {} of VM {vm} is open, at {}: {}",
        open.id(),
        open.stage().name(),
        open.what_next(state.name()),
        vm = state.name()
    )
}

fn plan_all(now: &[DiskNow], request: &Request) -> Result<Vec<DiskPlan>, String> {
    let mut disks: Vec<DiskPlan> = Vec::new();
    for (id, target) in &request.disks {
        let Some(disk) = now.iter().find(|disk| disk.is_named(id)) else {
            let known: Vec<_> = now.iter().map(DiskNow::name).collect();
            return Err(format!("The VM has no disk '{id}'; it has {}", known.join(", ")));
        };
        let plan = plan(disk, target, request)?;
        let path = &plan.target.path;
        if let Some(user) = now.iter().find(|other| plan.target.is_at(&other.file)) {
            return Err(format!("The target {} is the image of disk '{}'", path.display(), user.name()));
        }
        let is_twice = |other: &DiskPlan| {
            other.disk == plan.disk || other.target.path == *path || other.target.is_at(path)
        };
        if disks.iter().any(is_twice) {
            return Err(format!("Disk '{id}' or its target is named twice"));
        }
        check_blocks(path, disk)?;
        disks.push(plan);
    }
    Ok(disks)
}

/// Targets that are there may be in use. The VM finds out, and says by whom, and gives them back. Not every VM looks
/// whether the host uses a block device.
fn try_targets(vm: &mut VmSession, now: &[DiskNow], disks: &[DiskPlan]) -> Result<(), OperationError> {
    const NODE: &str = "tarn-probe";
    let refused = |error: SessionError| match error.refusal() {
        Some(refusal) => OperationError::Refused(refusal.desc.clone()),
        None => error.into(),
    };
    for DiskPlan { disk: id, target, .. } in disks.iter().filter(|disk| disk.target.file.is_some()) {
        // One that a coordinator has left which died in here.
        match vm.orders().remove_node(NODE) {
            Err(error) if error.refusal().is_none() => return Err(error.into()),
            _ => {}
        }
        if let Some(disk) = now.iter().find(|disk| disk.is_named(id)) {
            vm.orders().add_node(NODE, &target.path, disk).map_err(refused)?;
            vm.orders().remove_node(NODE).map_err(refused)?;
        }
        if target.is_device() {
            claim(&target.path).map_err(OperationError::Refused)?;
        }
    }
    Ok(())
}

fn claim(path: &Path) -> Result<(), String> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match open(path, flags, Mode::empty()) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::BUSY) => {
            Err(format!("The target {} is in use by the host or another process", path.display()))
        }
        Err(error) => Err(format!("Cannot open the target {}: {error}", path.display())),
    }
}

fn plan(disk: &DiskNow, target: &Path, request: &Request) -> Result<DiskPlan, String> {
    let id = disk.name();
    let because = |what: &str, path: &Path| {
        let path = path.display().to_string();
        let what = what.to_owned();
        move |error: std::io::Error| format!("Cannot {what} {path}: {error}")
    };
    if disk.read_only {
        return Err(format!("Disk '{id}' is read-only: it stays where it is"));
    }
    if !disk.file.is_absolute() {
        let file = disk.file.display();
        return Err(format!(
            "Disk '{id}' is {file}, and it cannot be told in which directory: give the VM a path from /"
        ));
    }
    let source = ImageId::of(&disk.file).map_err(because("look at the disk's image", &disk.file))?;
    let absolute = std::path::absolute(target).map_err(because("name the target", target))?;
    let parent = absolute.parent().unwrap_or(Path::new("/"));
    let number = match fs::metadata(&absolute) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(because("look at the target", &absolute)(error)),
        Ok(_) => Some(device::number(&absolute).map_err(because("look at the target", &absolute))?),
    };
    if request.kind == OperationKind::Pivot {
        check_lasting(&absolute, parent, number.flatten())?;
    }
    let Some(number) = number else {
        let planned = ImageId::planned(&absolute, disk.size);
        check_space(parent, &source)?;
        let target = planned.map_err(because("find the directory of", &absolute))?;
        return Ok(DiskPlan { disk: id.to_owned(), source, target });
    };
    let name = absolute.display();
    let target = ImageId::of(&absolute).map_err(because("look at the target", &absolute))?;
    if number.is_none() && !request.reuse {
        return Err(format!("The target {name} is there already"));
    }
    if target.size != disk.size {
        return Err(format!("The target {name} has {} bytes, and the disk has {}", target.size, disk.size));
    }
    Ok(DiskPlan { disk: id.to_owned(), source, target })
}

/// A disk does not move to where it would be gone when the machine ends.
fn check_lasting(target: &Path, directory: &Path, device: Option<u64>) -> Result<(), String> {
    let in_memory = |file: &Path| {
        let directory = file.parent().unwrap_or(Path::new("/"));
        matches!(durable::check_directory(directory, "the target"), Err(DurableError::Volatile { .. }))
    };
    let why = match device.map(device::keeps) {
        None => {
            return durable::check_directory(directory, "the target").map_err(|error| chain(&error));
        }
        Some(Keeps::AsFile(file)) if in_memory(&file) => format!("{} is in memory", file.display()),
        Some(Keeps::AsFile(file)) if file.as_os_str().as_encoded_bytes().ends_with(b" (deleted)") => {
            "the file behind it is deleted".to_owned()
        }
        Some(Keeps::Nothing) => "it is memory".to_owned(),
        Some(Keeps::AsFile(_) | Keeps::All) => return Ok(()),
    };
    Err(format!("The target {} does not survive a crash of this machine: {why}", target.display()))
}

/// Bytes in a block of what is at `path`. Whatever lies below a file, its blocks are sectors.
fn block_size(path: &Path) -> Option<u64> {
    match device::number(path) {
        Ok(Some(number)) => device::block_size(number),
        _ => Some(512),
    }
}

/// A guest cannot write half a block.
fn check_blocks(target: &Path, disk: &DiskNow) -> Result<(), String> {
    match (block_size(target), disk.block_size) {
        (Some(after), Some(before)) if after > before => {
            let (name, id) = (target.display(), disk.name());
            Err(format!("The target {name} has blocks of {after} bytes, and disk '{id}' of {before}"))
        }
        _ => Ok(()),
    }
}

/// What will matter when the machine, or the VM, starts again.
fn doubts(now: &[DiskNow], DiskPlan { disk: id, target, .. }: &DiskPlan) -> Vec<String> {
    let mut doubts = Vec::new();
    let name = target.path.display();
    if target.is_device() && target.device.is_none() {
        doubts.push(format!(
            "Nothing tells {name} from other devices but its name and size: see to it that it has that name when this \
             machine starts again"
        ));
    }
    let before = now.iter().find(|disk| disk.is_named(id)).and_then(|disk| disk.block_size);
    if let (Some(before), Some(after)) = (before, block_size(&target.path))
        && after < before
    {
        doubts.push(format!(
            "Disk '{id}' has blocks of {before} bytes until the VM is started anew, and of {after} then, like {name}: a \
             partition table counts in them"
        ));
    }
    doubts
}

/// A copy takes about what its source takes.
fn check_space(directory: &Path, source: &ImageId) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let Ok(space) = rustix::fs::statvfs(directory) else { return Ok(()) };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let needed = match fs::metadata(&source.path) {
        Ok(metadata) if metadata.is_file() => metadata.blocks() * 512,
        _ => return Ok(()),
    };
    if free >= needed {
        return Ok(());
    }
    Err(format!(
        "{} has {free} bytes left, and {} takes {needed}",
        directory.display(),
        source.path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_whose_directory_only_the_vm_knows_is_not_guessed() {
        let disk = DiskNow { id: "vda".into(), file: "Cargo.toml".into(), ..DiskNow::default() };
        let request = Request::mirror([("vda", "/nowhere/x.raw")]);
        let refused = plan(&disk, Path::new("/nowhere/x.raw"), &request).unwrap_err();
        assert!(refused.contains("'vda' is Cargo.toml") && refused.contains("a path from /"), "{refused}");
    }
}
